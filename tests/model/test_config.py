"""config.json: what is read, what is refused, and the rotary frequencies against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepdoctor.errors import ModelError, UnsupportedModelError
from deepdoctor.model.config import ModelConfig, known_config
from helpers_models import ROPES, tiny_model

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_and_counts_are_those_of_the_model(family: str, tied: bool) -> None:
    """Every size is transformers', and the parameter count is the model's less biases and head norms."""
    model = tiny_model(family, tie_word_embeddings=tied)
    config = ModelConfig.from_dict(model.config.to_dict() | {"architectures": [type(model).__name__]})
    theirs = model.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (640, 64, 128)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert config.head_dim == (32 if family == "qwen3" else 16)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (theirs.rms_norm_eps, tied)
    assert config.qkv_bias == (family == "qwen2") and config.qk_norm == (family == "qwen3")
    small = ("bias", "q_norm.weight", "k_norm.weight")
    counted = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(small))
    assert config.parameters == counted
    linear = sum(p.numel() for n, p in model.named_parameters() if "_proj.weight" in n)
    assert config.linear_parameters == linear


def test_old_and_new_spelling_of_rope_agree() -> None:
    """``rope_theta`` and ``rope_scaling`` of transformers 4 read as ``rope_parameters`` of transformers 5."""
    numbers = {k: v for k, v in ROPES["llama3"].items() if k not in ("rope_type", "rope_theta")}
    new = ModelConfig.from_dict({**BASE, "rope_parameters": ROPES["llama3"]})
    for key in ("type", "rope_type"):
        old = ModelConfig.from_dict({**BASE, "rope_theta": 500000.0, "rope_scaling": {key: "llama3", **numbers}})
        assert old == new
        assert old.inverse_frequencies() == new.inverse_frequencies()
    assert (new.rope_type, new.rope_theta, new.rope["factor"]) == ("llama3", 500000.0, 8.0)
    plain = ModelConfig.from_dict({**BASE, "rope_scaling": None})
    assert (plain.rope_type, plain.rope_theta) == ("default", 10000.0)


ROPE_CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": ROPES["llama3"],
    "Llama 3.1": ROPES["llama3"] | {"original_max_position_embeddings": 8192},
    "yarn": ROPES["yarn"],
    "yarn, its own factor": ROPES["yarn"] | {"attention_factor": 0.8},
    "yarn, mscale": ROPES["yarn"] | {"mscale": 1.3, "mscale_all_dim": 0.6},
    "yarn, other ramp": ROPES["yarn"] | {"beta_fast": 20, "beta_slow": 3, "truncate": False},
    "yarn, no original length": {k: v for k, v in ROPES["yarn"].items() if not k.startswith("original")},
}


@pytest.mark.parametrize("case", ROPE_CASES)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_frequencies_equal_transformers(case: str, head_dim: int) -> None:
    """Frequencies and attention factor of every supported rope equal transformers' to fp32 rounding."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = ROPE_CASES[case]
    theirs = LlamaRotaryEmbedding(LlamaConfig(**BASE, head_dim=head_dim, rope_parameters=dict(rope)))
    ours, factor = ModelConfig.from_dict({**BASE, "head_dim": head_dim, "rope_parameters": rope}).inverse_frequencies()
    assert torch.allclose(torch.tensor(ours), theirs.inv_freq, rtol=2e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


def test_defaults_follow_the_family() -> None:
    """What a config leaves out: key heads as query heads, head dim as the quotient, epsilon 1e-6."""
    values = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    config = ModelConfig.from_dict(values)
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (4, 16, 2048)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-6, False)
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)
    biased = {**BASE, "attention_bias": True, "mlp_bias": True}
    llama = ModelConfig.from_dict(biased)
    assert llama.qkv_bias and llama.o_bias and llama.mlp_bias
    qwen3 = ModelConfig.from_dict({**biased, "architectures": ["Qwen3ForCausalLM"]})
    assert qwen3.qkv_bias and qwen3.o_bias and not qwen3.mlp_bias
    qwen2 = ModelConfig.from_dict({**BASE, "architectures": ["Qwen2ForCausalLM"]})
    assert qwen2.qkv_bias and not qwen2.o_bias and not qwen2.mlp_bias


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["MistralForCausalLM"]}, "architecture 'MistralForCausalLM' is not supported"),
    "no architecture": ({"architectures": None}, r"architecture '\(none\)' is not supported"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised with gptq"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantised with fp8"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window is true"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    "rope type": ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
    "old rope type": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
    "half rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_models_are_refused(case: str) -> None:
    """What the decoder lacks is refused by key and value, not computed wrongly."""
    changes, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModelError, match=rf"here/config.json: .*{message}"):
        ModelConfig.from_dict({**BASE, **changes}, "here/config.json")


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "no hidden size": ({"hidden_size": None}, "hidden_size is None, expected a positive whole number"),
    "text": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    "zero": ({"vocab_size": 0}, "vocab_size is 0"),
    "truth": ({"num_attention_heads": True}, "num_attention_heads is True"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    "rope number missing": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
        "rope type 'llama3' with low_freq_factor None",
    ),
    "rope factor": ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope type 'linear' with factor 0"),
    "rope text": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected a dict"),
    "quantisation text": ({"quantization_config": "gptq"}, "quantization_config is 'gptq', expected a dict"),
    "architecture text": (
        {"architectures": "LlamaForCausalLM"},
        "architectures is 'LlamaForCausalLM', expected a list",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_values_are_refused(case: str) -> None:
    """A size that cannot be is refused with place, key, value and expectation."""
    changes, message = IMPOSSIBLE[case]
    with pytest.raises(ModelError, match=rf"here/config.json: {message}"):
        ModelConfig.from_dict({**BASE, **changes}, "here/config.json")


def test_folder_faults(tmp_path: Path) -> None:
    """A folder without config.json says what it has, broken JSON and a list name the file; each carries a hint."""
    (tmp_path / "notes.txt").write_text("x")
    cases = {"notes.txt": None, "config.json cannot be read": "{", "must hold a JSON object, not list": "[]"}
    for message, text in cases.items():
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=message) as caught:
            ModelConfig.from_folder(tmp_path)
        assert str(tmp_path) in caught.value.message and caught.value.hint
    with pytest.raises(ModelError, match="no such folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(BASE)


def test_published_shapes_are_known_by_name() -> None:
    """Any publisher's copy, 4-bit ones too, is known without a network; counts are those the publishers name."""
    for name, billions in (
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8.03),
        ("unsloth/DeepSeek-R1-Distill-Llama-8B-unsloth-bnb-4bit", 8.03),
        ("unsloth/DeepSeek-R1-Distill-Qwen-7B-bnb-4bit", 7.62),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.78),
        ("embedded:smollm2-135m-instruct", 0.1345),
    ):
        config = known_config(name)
        assert config is not None
        assert config.parameters / 1e9 == pytest.approx(billions, rel=0.003), name
    assert known_config("someone/else-8b") is None
