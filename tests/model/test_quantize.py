"""Checkpoints that transformers and bitsandbytes write are read bit for bit, and ours load there."""

import json
import logging
import math
from collections.abc import Mapping

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepdoctor.errors import ModelError
from deepdoctor.kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from deepdoctor.model.quantize import (
    BnbConfig,
    check_bnb_config,
    is_bnb_config,
    quantized_names,
    read_bnb_state,
    write_bnb_state,
)

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


class Checkpoint:
    """A saved model: its folder, its tensors by name, and the model that wrote it."""

    def __init__(self, folder, model):
        self.folder = folder
        self.model = model
        self.tensors = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def transformers():
    """transformers with bitsandbytes; progress bars and a word about an optional package are silenced."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    yield transformers
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def plain_folder(transformers, tmp_path_factory):
    """A two-layer Llama in bf16, saved."""
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["double", "single", "stored_as_bf16"])
def checkpoint(request, transformers, plain_folder, tmp_path_factory):
    """The same Llama quantised and saved by transformers with bitsandbytes."""
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param != "single",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16 if request.param == "stored_as_bf16" else torch.uint8,
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        plain_folder, quantization_config=options, device_map="cpu", dtype=torch.bfloat16
    )
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return Checkpoint(folder, model)


def test_every_weight_reads_as_bitsandbytes_reads_it(checkpoint):
    """Shape, dtype and values, in fp32, bf16 and fp16, of all 14 projections equal bitsandbytes' own."""
    from bitsandbytes.functional import dequantize_4bit

    names = quantized_names(checkpoint.tensors)
    assert len(names) == 14
    for name in names:
        parameter = checkpoint.model.get_parameter(name)
        weight = read_bnb_state(checkpoint.tensors, name)
        state = parameter.quant_state
        assert weight.shape == tuple(state.shape)
        assert weight.dtype == torch.bfloat16
        assert weight.double_quant == state.nested
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if dtype == torch.float16 and torch.cuda.is_available():
                continue  # the CPU code inside its CUDA build rounds ties away from zero
            state.dtype = dtype
            expected = dequantize_4bit(parameter.data, state)
            assert torch.equal(dequantize_nf4(weight, dtype), expected)
        state.dtype = torch.bfloat16


def test_write_gives_the_bytes_of_bitsandbytes(checkpoint):
    """What is read and written again has the same names, dtypes, shapes and bytes, the JSON included."""
    for name in quantized_names(checkpoint.tensors):
        stored = {key: t for key, t in checkpoint.tensors.items() if key == name or key.startswith(f"{name}.")}
        written = write_bnb_state(read_bnb_state(checkpoint.tensors, name), name)
        assert written.keys() == stored.keys()
        assert stored[name].view(torch.uint8).equal(written.pop(name).view(-1, stored[name].element_size()))
        for key, tensor in written.items():
            assert tensor.dtype == stored[key].dtype
            assert torch.equal(tensor, stored[key])


def test_config_of_the_checkpoint(checkpoint):
    """Its config.json is recognised and its double quantisation read."""
    assert is_bnb_config(checkpoint.config)
    double = any(key.endswith(".nested_absmax") for key in checkpoint.tensors)
    assert check_bnb_config(checkpoint.config) == BnbConfig(double_quant=double, skip_modules=())


@pytest.mark.parametrize("double_quant", [True, False])
def test_our_checkpoint_loads_in_transformers(transformers, plain_folder, tmp_path, double_quant):
    """A checkpoint we quantised gives, in transformers, the logits of the one that bitsandbytes quantised."""
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        plain_folder, quantization_config=options, device_map="cpu", dtype=torch.bfloat16
    )
    tensors = {}
    for name, tensor in load_file(plain_folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors |= write_bnb_state(quantize_nf4(tensor, double_quant=double_quant), name)
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs.config.save_pretrained(tmp_path)
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    # One scale moved by a step must show, or the comparison above sees nothing.
    name = "model.layers.1.mlp.down_proj.weight.absmax"
    tensors[name] = tensors[name].clone()
    tensors[name][3] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        assert not torch.equal(other(tokens).logits, theirs(tokens).logits)


@pytest.fixture
def entries():
    """The entries of one double-quantised weight of shape (96, 130), as a fresh dict."""
    w = torch.randn(96, 130, generator=torch.Generator().manual_seed(0)) * 0.02
    return write_bnb_state(quantize_nf4(w.bfloat16()), NAME)


def test_reading_shares_and_touches_only_its_entries(entries, tmp_path):
    """A mapping that reads lazily from disk is enough, and only the weight's own entries are read."""

    class Lazy(Mapping):
        def __init__(self, handle):
            self.handle, self.read = handle, set()

        def __getitem__(self, key):
            self.read.add(key)
            return self.handle.get_tensor(key)

        def __contains__(self, key):
            return key in self.handle.keys()  # noqa: SIM118

        def __iter__(self):
            raise AssertionError("walked through the whole checkpoint")

        __len__ = __iter__

    save_file(entries | {"other": torch.zeros(3)}, tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as handle:
        lazy = Lazy(handle)
        weight = read_bnb_state(lazy, NAME)
    assert lazy.read == entries.keys()
    assert torch.equal(weight.packed, entries[NAME])
    assert read_bnb_state(entries, NAME).packed.data_ptr() == entries[NAME].data_ptr()


def with_state(entries: dict, **changes) -> dict:
    """The entries with some values of the JSON changed."""
    state = json.loads(bytes(entries[STATE].tolist())) | changes
    return entries | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant_type", "fp4", "quant_type is 'fp4'; supported: nf4"),
        ("blocksize", 48, "blocksize is 48; supported: 32, 64, 128"),
        ("blocksize", None, "blocksize is None"),
        ("dtype", "float64", "dtype is 'float64'; supported: float32, bfloat16, float16"),
        ("nested_blocksize", 128, "nested_blocksize is 128; supported: 256"),
        ("nested_offset", None, "nested_offset is None"),
        ("nested_offset", math.nan, "nested_offset is nan"),
        ("shape", None, "shape is None"),
        ("shape", [96, 0], r"shape is \[96, 0\]"),
        ("shape", [96, 128], r"holds 6240 bytes; a weight of shape \(96, 128\) in NF4 needs 6144"),
        ("blocksize", 128, "holds 195 values"),
    ],
)
def test_states_we_cannot_read(entries, key, value, message):
    """Another type, block size, dtype or shape than supported is refused with tensor and value."""
    with pytest.raises(ModelError, match=message) as error:
        read_bnb_state(with_state(entries, **{key: value}), NAME)
    assert NAME in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("suffix", ["", ".absmax", ".quant_map", ".nested_quant_map", STATE.removeprefix(NAME)])
def test_missing_entries(entries, suffix):
    """Each missing entry is named."""
    del entries[NAME + suffix]
    with pytest.raises(ModelError, match=f"no tensor {NAME}{suffix}"):
        read_bnb_state(entries, NAME)


def test_entries_that_do_not_fit(entries):
    """A shortened weight, scales of another dtype, another value table and broken JSON are refused."""
    wrong = [
        ({NAME: entries[NAME][:-1]}, "holds 6239 bytes; .* needs 6240"),
        ({f"{NAME}.absmax": entries[f"{NAME}.absmax"].float()}, r"absmax holds 195 values of torch\.float32"),
        ({f"{NAME}.nested_absmax": torch.ones(2)}, "nested_absmax holds 2 values"),
        ({f"{NAME}.quant_map": torch.linspace(-1, 1, 16)}, "quant_map is -1, .* 16 values of NF4"),
        ({STATE: torch.tensor(list(b"{'a'"), dtype=torch.uint8)}, "is no JSON"),
        ({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "expected a JSON object"),
        ({STATE: torch.tensor([0.5])}, "is no JSON"),
    ]
    for changes, message in wrong:
        with pytest.raises(ModelError, match=message):
            read_bnb_state(entries | changes, NAME)
    del entries[f"{NAME}.nested_absmax"]
    with pytest.raises(ModelError, match=r"absmax holds 195 values of torch\.uint8; .* 195 of torch\.float32"):
        read_bnb_state(entries, NAME)


def test_fp4_weights_are_named():
    """A checkpoint in bitsandbytes' other 4-bit type says so."""
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(torch.randn(64, 64), quant_type="fp4")
    entries = {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert quantized_names(entries) == [NAME]
    with pytest.raises(ModelError, match="quant_type is 'fp4'; supported: nf4"):
        read_bnb_state(entries, NAME)


def test_odd_count_round_trip():
    """A weight of odd element count survives writing and reading."""
    weight = quantize_nf4(torch.randn(7, 33).half(), double_quant=False)
    again = read_bnb_state(write_bnb_state(weight, "w"), "w")
    assert isinstance(again, NF4Weight)
    assert (again.shape, again.dtype) == ((7, 33), torch.float16)
    assert torch.equal(dequantize_nf4(again, torch.float32), dequantize_nf4(weight, torch.float32))


NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_config_is_recognised():
    """bitsandbytes sections are told from other methods and from plain models, with and without quant_method."""
    assert is_bnb_config({"quantization_config": NF4_CONFIG})
    assert is_bnb_config({"quantization_config": {"load_in_8bit": True}})
    for other in ({}, {"quantization_config": None}, {"quantization_config": {}}, {"model_type": "llama"}):
        assert not is_bnb_config(other)
    assert not is_bnb_config({"quantization_config": {"quant_method": "gptq", "bits": 4}})


def test_config_is_read():
    """Double quantisation and the modules left out come from the section."""
    section = NF4_CONFIG | {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head", "model.layers.3"]}
    assert check_bnb_config({"quantization_config": section}) == BnbConfig(True, ("lm_head", "model.layers.3"))
    assert check_bnb_config({"quantization_config": NF4_CONFIG}) == BnbConfig(False, ())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (NF4_CONFIG | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4'; expected 'nf4'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_type is 'fp4'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit is True"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit is None; expected true"),
        ({"quant_method": "awq"}, "quant_method is 'awq'; expected 'bitsandbytes'"),
        (None, "quant_method is None"),
    ],
)
def test_configs_we_cannot_read(section, message):
    """8-bit, FP4 and other methods are refused with key, value and a way out."""
    with pytest.raises(ModelError, match=message) as error:
        check_bnb_config({"quantization_config": section})
    assert "16-bit model" in error.value.hint
