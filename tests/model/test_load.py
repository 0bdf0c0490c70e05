"""Weights from safetensors, GGUF and 4-bit checkpoints against transformers, and every bad input that users have."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_decoder import draw_rows, packed_logits, their_logits
from safetensors.torch import load_file, save_file

from deepdoctor.errors import DeepDoctorError, HubError, ModelError, TrainingError, UnsupportedModelError
from deepdoctor.kernels.nf4 import NF4Weight, quantize_nf4
from deepdoctor.model import load
from deepdoctor.model.decoder import Decoder, DecoderLayer
from deepdoctor.model.load import choose_device, load_decoder, load_tokenizer, open_weights, resolve_model
from deepdoctor.model.stream import Ring
from helpers_models import save_tiny_model, tiny_model
from helpers_tokenizer import build_r1_tokenizer

ROWS = draw_rows(5, 1, 12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Llama's folder, one shard, and the transformers model."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, save_tiny_model(folder, "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, saved: tuple[Path, Any]) -> Path:
    """The same model in several shards with an index."""
    folder = tmp_path_factory.mktemp("sharded")
    saved[1].save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def broken(tmp_path: Path, saved: tuple[Path, Any]) -> Path:
    """A copy of the one-shard folder to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "model"))


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory, saved: tuple[Path, Any]) -> tuple[Path, Any]:
    """A bitsandbytes NF4 checkpoint saved by transformers, head and one projection left in 16 bits, and its model."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("four-bit")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.layers.0.self_attn.v_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        saved[0], quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    # In eval mode bitsandbytes multiplies in bf16 on some CPUs, whatever the compute dtype says.
    return folder, model.train()


def linears(decoder: Decoder) -> list[Any]:
    """All frozen matrices."""
    return [linear for layer in decoder.layers if isinstance(layer, DecoderLayer) for linear in layer.linears]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights reach a CPU the way they reach a GPU: through a ring, here of three slots of 1 KiB."""
    monkeypatch.setattr(load, "STREAMED", {"cpu": Ring(3, 1024, 2, direct_bytes=300)})


def held(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Every tensor of a decoder by name, NF4 parts taken apart."""
    found = dict(decoder.named_buffers())
    for number, linear in enumerate(linears(decoder)):
        for place, part in enumerate(linear.parts or ()):
            values = (
                {f.name: getattr(part, f.name) for f in fields(part)} if isinstance(part, NF4Weight) else {"": part}
            )
            found |= {f"{number}.{place}.{n}": v for n, v in values.items() if isinstance(v, torch.Tensor)}
    return found


def assert_same(one: Decoder, other: Decoder) -> None:
    """Two decoders hold the same bits under the same names."""
    a, b = held(one), held(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor.cpu(), b[name].cpu()), name


def test_one_shard_and_several(saved: tuple[Path, Any], sharded: Path) -> None:
    """One file and an indexed set of shards load to the same bits, and to transformers' logits."""
    layers: list[tuple[int, int]] = []
    one = load_decoder(saved[0], "fp32", on_layer=lambda done, total: layers.append((done, total)))
    assert layers == [(1, 2), (2, 2)]
    logits = packed_logits(one, ROWS)
    assert torch.allclose(logits, their_logits(saved[1], ROWS), rtol=0, atol=1e-4)
    assert torch.equal(packed_logits(load_decoder(sharded, "fp32"), ROWS), logits)


def test_tied_head(tmp_path: Path) -> None:
    """A tied head is the embedding itself, also where the file holds a copy of it, as some publishers' do."""
    theirs = save_tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    decoder = load_decoder(tmp_path, "fp32")
    assert decoder.head is decoder.embedding
    expected = their_logits(theirs, ROWS)
    assert torch.allclose(packed_logits(decoder, ROWS), expected, rtol=0, atol=1e-4)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(packed_logits(load_decoder(tmp_path, "fp32"), ROWS), packed_logits(decoder, ROWS))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_gguf_file(tmp_path: Path, arch: str) -> None:
    """A .gguf file in fp32 gives the logits of the model it was written from, biases and tied heads included."""
    pytest.importorskip("gguf")
    from helpers_gguf import build_model, write_gguf

    theirs = build_model(arch, tie_word_embeddings=arch == "qwen3")
    path = write_gguf(tmp_path / "m.gguf", arch, theirs)
    rows = draw_rows(5, 9, vocab=64)
    assert torch.allclose(
        packed_logits(load_decoder(path, "fp32"), rows), their_logits(theirs, rows), rtol=0, atol=1e-4
    )
    config, source = open_weights(path)
    assert config.hidden_size == 64 and "model.norm.weight" in source and "model.norm.weight" in set(source.keys())
    with pytest.raises(ModelError, match="has no tensor nothing"):
        source.read("nothing")
    source.close()


def test_gguf_tokenizer(tmp_path: Path) -> None:
    """The tokenizer comes from the .gguf file, or from a folder, with the same ids."""
    pytest.importorskip("gguf")
    from helpers_gguf import write_r1_gguf

    folder = load_tokenizer(build_r1_tokenizer(tmp_path / "r1"))
    inside = load_tokenizer(write_r1_gguf(tmp_path / "m.gguf", folder))
    text = "The patient has chest pain.\n<think>\n38.2 °C</think>"
    assert inside.encode(text) == folder.encode(text)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_dense_precisions(saved: tuple[Path, Any], precision: str) -> None:
    """Weights are held, and hidden states computed, in the dtype named; values are the file's, rounded once."""
    decoder = load_decoder(saved[0], precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    state = saved[1].state_dict()
    assert decoder.precision == precision and decoder.compute_dtype == dtype
    up = state["model.layers.1.mlp.up_proj.weight"].to(dtype)
    assert torch.equal(linears(decoder)[6].weight[128:], up)
    assert torch.equal(decoder.embedding, state["model.embed_tokens.weight"].to(dtype))
    assert packed_logits(decoder, ROWS).dtype == dtype


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_is_quantised_while_reading(saved: tuple[Path, Any], double_quant: bool) -> None:
    """Every projection is quantised by itself, to the bytes quantize_nf4 gives; embedding and head stay dense."""
    decoder = load_decoder(saved[0], "nf4", compute_dtype=torch.float32, double_quant=double_quant)
    state = saved[1].state_dict()
    assert decoder.precision == "nf4" and torch.equal(decoder.head, state["lm_head.weight"])
    for linear, prefix in zip(linears(decoder)[:2], ("q_proj", "o_proj"), strict=True):
        part = linear.parts[0]
        wanted = quantize_nf4(state[f"model.layers.0.self_attn.{prefix}.weight"], double_quant=double_quant)
        assert isinstance(part, NF4Weight) and part.double_quant == double_quant
        assert torch.equal(part.packed, wanted.packed) and torch.equal(part.absmax, wanted.absmax)
    assert [len(linear.parts) for linear in linears(decoder)] == [3, 1, 2, 1] * 2


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("precision", ["nf4", "bf16", "fp32"])
def test_streamed_weights_equal_mapped(
    tmp_path: Path, case: str, precision: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Several bf16 shards through the ring give every tensor the bits it has from mapped files, and map nothing."""
    family, options = FAMILIES[case]
    tiny_model(family, **options).bfloat16().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    mapped = load_decoder(tmp_path, precision)
    request.getfixturevalue("streamed")
    maps = Path("/proc/self/maps")
    seen = []
    streamed = load_decoder(
        tmp_path, precision, on_layer=lambda *_: seen.append(maps.exists() and str(tmp_path) in maps.read_text())
    )
    assert_same(streamed, mapped)
    assert seen == [False, False]
    assert (streamed.head is streamed.embedding) == ("tied" in case)


def test_bitsandbytes_checkpoint(four_bit: tuple[Path, Any]) -> None:
    """A published-style 4-bit checkpoint gives transformers' own 4-bit logits; what it left in 16 bits stays so."""
    folder, theirs = four_bit
    decoder = load_decoder(folder, "auto", compute_dtype=torch.float32)
    parts = [part for linear in linears(decoder) for part in linear.parts]
    assert decoder.precision == "nf4"
    assert [isinstance(part, NF4Weight) for part in parts] == [number != 2 for number in range(14)]
    expected = their_logits(theirs, ROWS)
    assert torch.allclose(packed_logits(decoder, ROWS), expected, rtol=0, atol=1e-4)
    in_bf16 = packed_logits(load_decoder(folder, "nf4", compute_dtype=torch.bfloat16), ROWS).float()
    assert (in_bf16 - expected).abs().max() < 0.05 * expected.abs().max()
    dense = packed_logits(load_decoder_of_original(theirs, folder), ROWS)
    assert (dense - expected).abs().max() > 0.01


def test_bitsandbytes_checkpoint_streamed(four_bit: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4-bit checkpoint comes through the ring with the bits of the mapped file."""
    mapped = load_decoder(four_bit[0], "auto", compute_dtype=torch.float32)
    monkeypatch.setattr(load, "STREAMED", {"cpu": Ring(2, 256, 2, direct_bytes=100)})
    assert_same(load_decoder(four_bit[0], "auto", compute_dtype=torch.float32), mapped)


def load_decoder_of_original(theirs: Any, folder: Path) -> Decoder:
    """The unquantised model the checkpoint was made from."""
    original = folder.parent / "original"
    save_tiny_model(original, "llama")
    return load_decoder(original, "fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_4_bit_checkpoint_is_nf4(four_bit: tuple[Path, Any], precision: str) -> None:
    """Asking for 16 or 32 bits of a 4-bit checkpoint is refused with the key and both ways out."""
    with pytest.raises(ModelError, match=f"4-bit weights, but model.precision is {precision}") as caught:
        load_decoder(four_bit[0], precision)
    assert caught.value.hint and "--model.precision nf4" in caught.value.hint


def test_4_bit_of_another_shape(four_bit: tuple[Path, Any], tmp_path: Path) -> None:
    """A 4-bit weight whose stored shape is not the config's is refused by name."""
    folder = Path(shutil.copytree(four_bit[0], tmp_path / "model"))
    edit_config(folder, intermediate_size=256)
    with pytest.raises(ModelError, match=r"gate_proj.weight is \(128, 64\), expected \(256, 64\)"):
        load_decoder(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a one-shard folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path) -> None:
    """Keep the first 90 % of the shard, as a broken download does."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])


def only_bin(folder: Path) -> None:
    """Leave a pickle alone."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def poison(tensors: dict[str, torch.Tensor]) -> None:
    """A nan in one weight."""
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], type[DeepDoctorError], str]] = {
    "no config.json": (lambda f: (f / "config.json").unlink(), ModelError, "has no config.json .*model.safetensors"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{'a'"), ModelError, "config.json cannot be read"),
    "unknown architecture": (
        lambda f: edit_config(f, architectures=["GemmaForCausalLM"]),
        UnsupportedModelError,
        "config.json: architecture 'GemmaForCausalLM'",
    ),
    "GPTQ": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
        UnsupportedModelError,
        "quantised with gptq",
    ),
    "8-bit": (
        lambda f: edit_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ModelError,
        "load_in_8bit is True",
    ),
    "sliding window": (lambda f: edit_config(f, use_sliding_window=True), UnsupportedModelError, "use_sliding_window"),
    "rope type": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "longrope"}),
        UnsupportedModelError,
        "rope type 'longrope'",
    ),
    "truncated shard": (cut, ModelError, r"model.safetensors \([\d,]+ bytes\) is truncated"),
    "tensor of wrong shape": (
        lambda f: edit_weights(f, lambda t: t.update({UP: t[UP][:-1].clone()})),
        ModelError,
        rf"{UP} is \(127, 64\), expected \(128, 64\)",
    ),
    "tensor of wrong dtype": (
        lambda f: edit_weights(f, lambda t: t.update({UP: t[UP].to(torch.int8)})),
        ModelError,
        rf"{UP} is stored as torch.int8",
    ),
    "missing tensor": (lambda f: edit_weights(f, lambda t: t.pop(UP)), ModelError, rf"has no tensor {UP}"),
    "head missing though not tied": (
        lambda f: edit_weights(f, lambda t: t.pop("lm_head.weight")),
        ModelError,
        "has no tensor lm_head.weight",
    ),
    "only .bin files": (only_bin, ModelError, "has no .safetensors file"),
}


@pytest.mark.parametrize("way", ["mapped", "streamed"])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_folders_are_refused(broken: Path, fault: str, way: str, request: pytest.FixtureRequest) -> None:
    """Each fault names file or key and value, and says what to do; the same for mapped and for streamed weights."""
    damage, kind, message = FAULTS[fault]
    damage(broken)
    if way == "streamed":
        request.getfixturevalue("streamed")
    with pytest.raises(kind, match=message) as caught:
        load_decoder(broken, "fp32")
    assert str(broken) in caught.value.message or "quantization_config" in caught.value.message
    if fault != "sliding window":
        assert caught.value.hint


@pytest.mark.parametrize("way", ["mapped", "streamed"])
def test_nan_in_a_weight_names_it(broken: Path, way: str, request: pytest.FixtureRequest) -> None:
    """Quantising a weight that holds nan names folder and tensor."""
    edit_weights(broken, poison)
    if way == "streamed":
        request.getfixturevalue("streamed")
    with pytest.raises(ModelError, match=rf"{UP}: .*nan or infinity") as caught:
        load_decoder(broken, "nf4")
    assert str(broken) in caught.value.message


def test_shard_faults(sharded: Path, tmp_path: Path) -> None:
    """A shard that the index names but the folder lacks, and a broken index, are named."""
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ModelError, match=f"lacks {last.name}, which its index names") as caught:
        load_decoder(folder, "fp32")
    assert caught.value.hint == "download the model again"
    for text in ("{", "{}", "[]", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"index\.json is broken"):
            load_decoder(folder, "fp32")


def test_resolving_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing folder is itself; a path that is not there, and what is neither path nor Hub id, are refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("owner/name") == Path("owner/name")
    for wrong in (str(tmp_path / "nowhere"), "./nowhere", "~/no/where", "nowhere", "a/b/c", "files/model.gguf"):
        with pytest.raises(ModelError, match=r"is no existing folder or \.gguf file, and no Hub id") as caught:
            resolve_model(wrong)
        assert repr(wrong) in caught.value.message and caught.value.hint


def test_a_hub_id_offline() -> None:
    """A model that is not in the cache, with the Hub out of reach, is a HubError with id, revision and a way round."""
    with pytest.raises(HubError, match="model nobody/nothing-8b at revision abc123 is not in") as caught:
        resolve_model("nobody/nothing-8b", "abc123")
    assert caught.value.hint and "--model.id /path/to/model" in caught.value.hint
    with pytest.raises(HubError, match="model nobody/nothing-8b is not in the local cache"):
        resolve_model("nobody/nothing-8b")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto takes a GPU where there is one; cuda without one is an error that names key and remedy."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(TrainingError, match=r"model\.device is cuda, but PyTorch sees no CUDA device") as caught:
        choose_device("cuda")
    assert caught.value.hint and "--model.device cpu" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


def test_reading_leaves_files_closed(saved: tuple[Path, Any]) -> None:
    """Names and stored shapes are known without reading values."""
    config, source = open_weights(saved[0])
    state = tiny_model("llama").state_dict()
    assert set(source.keys()) == set(state) and config.num_layers == 2
    assert all(source.shape(name) == tuple(tensor.shape) for name, tensor in state.items())
    source.close()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["nf4", "bf16", "fp16"])
@pytest.mark.parametrize("ring", [Ring(3, 1024, 2, 300), Ring()])
def test_streamed_weights_equal_mapped_on_a_gpu(
    tmp_path: Path, precision: str, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU several shards through the ring give every tensor the bits the mapped files give."""
    config = {"hidden_size": 256, "intermediate_size": 512, "attention_bias": True}
    tiny_model("llama", **config).bfloat16().save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    monkeypatch.setattr(load, "STREAMED", {})
    mapped = load_decoder(tmp_path, precision, "cuda")
    monkeypatch.setattr(load, "STREAMED", {"cuda": ring})
    streamed = load_decoder(tmp_path, precision, "cuda")
    assert_same(streamed, mapped)
    assert all(tensor.is_cuda for tensor in held(streamed).values())


@pytest.mark.gpu
def test_bitsandbytes_checkpoint_on_a_gpu(four_bit: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4-bit checkpoint reaches the GPU with the bits the CPU reads."""
    monkeypatch.setattr(load, "STREAMED", {"cuda": Ring(2, 256, 2, direct_bytes=100)})
    streamed = load_decoder(four_bit[0], "auto", "cuda", torch.float32)
    assert all(tensor.is_cuda for tensor in held(streamed).values())
    assert_same(streamed, load_decoder(four_bit[0], "auto", "cpu", torch.float32))
