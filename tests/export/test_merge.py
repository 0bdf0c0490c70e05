"""Merged weights are base + scale B A, rounded once, from every kind of base, and plain transformers loads them."""

import ctypes
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepdoctor.export import merge as merging
from deepdoctor.export.measure import logits_of
from deepdoctor.export.merge import merge
from deepdoctor.export.parity import check_parity
from deepdoctor.kernels.nf4 import dequantize_nf4, quantize_nf4
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.load import load_decoder, open_weights, projection_name
from deepdoctor.model.quantize import write_bnb_state
from helpers_gguf import write_gguf
from helpers_models import tiny_model
from helpers_train import synthetic_rows

ROWS = synthetic_rows(2, seed=5, shortest=30)
IDS = torch.tensor([ROWS[0].input_ids])


def new_adapter(config: ModelConfig, **settings) -> Adapter:
    """An adapter that clearly changes the logits."""
    adapter = Adapter(config, LoraSettings(**{"rank": 4, "alpha": 8, **settings}), seed=1).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for b in adapter.b.values():
            b.normal_(std=0.1)
    return adapter


def save_base(folder, dtype):
    """A tiny untied Llama in ``dtype``."""
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The same weights published in fp32, bf16, fp16, as bitsandbytes 4-bit and as GGUF; norms are never quantised."""
    root = tmp_path_factory.mktemp("bases")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        save_base(root / name, dtype)
    bnb = root / "bnb"
    bnb.mkdir()
    tensors = {}
    for name, tensor in load_file(root / "bfloat16" / "model.safetensors").items():
        if "_proj" in name:
            tensors |= write_bnb_state(quantize_nf4(tensor), name)
        else:
            tensors[name] = tensor
    save_file(tensors, bnb / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "bfloat16" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    (bnb / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_gguf(root / "gguf.gguf", "llama", tiny_model("llama"), "Q8_0")
    return root


def source(bases, kind):
    """Path of a base."""
    return bases / ("gguf.gguf" if kind == "gguf" else kind)


def stocklogits_of(folder):
    """Logits of a folder in plain transformers, fp32, and the dtype its weights are stored in."""
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(input_ids=IDS).logits[0]


def dense_base(path) -> dict[str, torch.Tensor]:
    """Every weight of a base in fp32, 4-bit ones dequantised by name."""
    decoder = load_decoder(path, "auto" if path.name == "bnb" else "fp32", compute_dtype=torch.float32)
    found = {}
    for layer in decoder.layers:
        for linear in layer.linears:
            for name, start, size in zip(linear.names, linear.starts, linear.sizes, strict=True):
                found[f"{projection_name(layer.number, name)}.weight"] = linear.dense()[start : start + size].float()
    return found


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("bnb", torch.bfloat16),
        ("gguf", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"targets": ("q_proj", "down_proj"), "rslora": True}])
def test_every_weight_is_base_plus_adapter_rounded_once(bases, tmp_path, kind, dtype, settings):
    """Adapted projections are the fp32 sum in the published dtype, bit for bit; everything else is the base's own."""
    path = source(bases, kind)
    config, opened = open_weights(path)
    adapter = new_adapter(config, **settings)
    counted = []
    assert merge(path, adapter, tmp_path, lambda: counted.append(1)) == dtype
    merged = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == dtype for tensor in merged.values())
    assert not [name for name in merged if "absmax" in name or "quant" in name]
    dense = dense_base(path)
    changed = set()
    for name, tensor in merged.items():
        before = dense.get(name)
        if before is None:
            before = opened.read(name).float()
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        delta = adapter.delta(int(layer), rest.split(".")[-2]) if "_proj" in name else None
        expected = before if delta is None else before + delta
        assert torch.equal(tensor, expected.to(dtype)), name
        if delta is not None:
            changed.add(name)
    opened.close()
    assert len(changed) == config.num_layers * len(adapter.settings.targets)
    assert len(counted) == len(merged) == 9 * config.num_layers + 3


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bnb", "gguf"])
def test_plain_transformers_answers_as_base_plus_adapter(bases, tmp_path, kind):
    """The folder loads without our code and its logits are those of base + adapter to what rounding explains."""
    path = source(bases, kind)
    reference = load_decoder(path, "nf4" if kind == "bnb" else "fp32", compute_dtype=torch.float32)
    adapter = new_adapter(reference.config)
    dtype = merge(path, adapter, tmp_path)
    parity = check_parity(reference, adapter, load_decoder(tmp_path, "fp32"), ROWS[:1], dtype)
    # In fp32 the sums' own rounding used to fail a right merge.
    assert parity.passed
    assert parity.adapter_effect > 3 * parity.allowed, "the adapter must make a difference for this to mean anything"
    if kind == "float32":
        assert parity.max_difference < 1e-3
        assert parity.greedy_agreement == 1.0
    ours = load_decoder(tmp_path, "fp32")
    torch.testing.assert_close(stocklogits_of(tmp_path), logits_of(ours, None, ROWS[:1]), rtol=1e-4, atol=1e-3)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == dtype
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config


def test_a_wrong_merge_does_not_pass(bases, tmp_path):
    """The adapter left out, added twice, added with the wrong sign, or one weight spoilt: the parity check notices."""
    path = source(bases, "bfloat16")
    reference = load_decoder(path, "fp32")
    adapter = new_adapter(reference.config)
    dtype = merge(path, adapter, tmp_path)
    right = load_file(tmp_path / "model.safetensors")
    base = load_file(path / "model.safetensors")
    name, query = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    wrong = {
        "left out": base,
        "twice": {key: right[key] + (right[key] - base[key]) for key in right},
        "wrong sign": {key: base[key] - (right[key] - base[key]) for key in right},
        "transposed": {**right, query: right[query].T.contiguous()},
        "spoilt": {**right, name: torch.roll(right[name], 1, 0)},
    }
    for what, tensors in wrong.items():
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        parity = check_parity(reference, adapter, load_decoder(tmp_path, "fp32"), ROWS, dtype)
        assert not parity.passed, what
        assert parity.logit_difference > parity.allowed


def test_large_models_are_written_in_shards_with_an_index(bases, tmp_path, monkeypatch):
    """With small shards: several files, an index that names each tensor once, and the same weights in transformers."""
    path = source(bases, "float32")
    adapter = new_adapter(ModelConfig.from_folder(path))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    merge(path, adapter, whole)
    monkeypatch.setattr(merging, "SHARD_BYTES", 100_000)
    merge(path, adapter, cut)
    files = sorted(p.name for p in cut.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((cut / "model.safetensors.index.json").read_text(encoding="utf-8"))
    expected = load_file(whole / "model.safetensors")
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(cut / file)[name], expected[name])
    # Only a tensor that alone is larger exceeds the limit.
    for file in files:
        tensors = load_file(cut / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
    torch.testing.assert_close(stocklogits_of(cut), stocklogits_of(whole), rtol=0, atol=0)


def anonymous_bytes() -> int:
    """What this process holds beside mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by /proc")
def test_memory_stays_near_one_shard(tmp_path, monkeypatch):
    """800 MB of weights in shards of 100 MB never take more than a shard and a quarter of a GiB."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    values = tiny_model("llama").config.to_dict() | {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128}
    values |= {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 24, "torch_dtype": "bfloat16"}
    values |= {"architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = ModelConfig.from_folder(base)
    wide, high = torch.randn(4096, 1024).bfloat16(), torch.randn(1024, 4096).bfloat16()
    ends = {"model.embed_tokens.weight": (config.vocab_size, 1024), "lm_head.weight": (config.vocab_size, 1024)}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in ends.items()}
    tensors["model.norm.weight"] = torch.ones(1024, dtype=torch.bfloat16)
    for number in range(24):
        layer = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}.self_attn.{name}.weight"] = wide[:1024].clone()
        for name, value in (("gate_proj", wide), ("up_proj", wide), ("down_proj", high)):
            tensors[f"{layer}.mlp.{name}.weight"] = value.clone()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = torch.ones(1024, dtype=torch.bfloat16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    written = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    shard, seen = 100 << 20, []
    monkeypatch.setattr(merging, "SHARD_BYTES", shard)
    adapter = new_adapter(config)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed above is not to count as there before
    before = anonymous_bytes()
    merge(base, adapter, out, on_tensor=lambda: seen.append(anonymous_bytes()))
    assert written > 7 * shard
    print(f"{(max(seen) - before) >> 20} MiB for {written >> 20} MiB")
    assert max(seen) - before < shard + (256 << 20)


def test_dequantised_values_are_the_4_bit_bases(bases):
    """What is merged into is exactly what the 4-bit base computes with."""
    name = "model.layers.0.mlp.up_proj.weight"
    plain = load_file(bases / "bfloat16" / "model.safetensors")[name]
    expected = dequantize_nf4(quantize_nf4(plain), torch.float32)
    assert torch.equal(dense_base(bases / "bnb")[name], expected)
