"""The engine with fp8 products against float64; on a CPU the same 8-bit values, multiplied in fp32."""

import pytest
import torch

from deepdoctor.engine import bordered_fp8, layer
from deepdoctor.engine.bordered_fp8 import BorderedFp8, Fp8Rows
from deepdoctor.engine.layout import RUNGS
from deepdoctor.engine.memory import fp8_bytes, fp8_matrix_bytes, widest_row
from deepdoctor.errors import ModelError, TrainingError
from deepdoctor.kernels.fp8 import fp8_matmul
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.decoder import FrozenLinear
from deepdoctor.model.precision import resolve_precision
from deepdoctor.recipe import TrainSection
from deepdoctor.train.flat import FlatAdapter
from helpers_engine import (
    DEVICES,
    LORA,
    assert_same_bits,
    by_autograd,
    by_engine,
    by_float64,
    distances,
    engine_plan,
    loaded,
    new_engine,
    packed,
    plain_attention,
    rows_of,
    run_engine,
    worst,
)
from helpers_models import save_tiny_model

GRADIENT_ERROR = 0.15
"""All gradients together. Values are off by 2.6 % (a step of 1/8 of the power of two below them over sqrt(12)), the
products of two layers and their backward add about ten such errors: 0.06 to 0.09 is seen."""


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request, tmp_path_factory):
    """A tiny model of each family; Qwen2 has biases, Qwen3 norms on q and k."""
    path = tmp_path_factory.mktemp(request.param)
    save_tiny_model(path, request.param)
    return path


def fresh(folder, device="cpu", lora=LORA):
    """Decoder and adapter as precision fp8 has them, but in fp32 on a CPU."""
    return loaded(folder, "fp8" if device == "cuda" else "fp32", device, lora=lora)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_near(folder, device) -> None:
    """Loss and gradients lie within a few roundings to e4m3 of float64."""
    batch = packed()
    truth = by_float64(*fresh(folder, device), batch)
    found = by_engine(*fresh(folder, device), batch, products="fp8")
    apart = distances(found.gradients, truth.gradients)
    assert apart["all"] < GRADIENT_ERROR, worst(apart)
    assert max(apart.values()) < 3 * GRADIENT_ERROR, worst(apart)
    assert abs(found.loss - truth.loss) < 0.01 * truth.loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rung", RUNGS[1:])
def test_recompute_changes_no_bit(folder, rung, device) -> None:
    """Every rung gives the bits that keeping gives."""
    batch = packed()
    with plain_attention(device):
        kept, again = (
            by_engine(*fresh(folder, device), batch, chunk_tokens=64, rung=name, products="fp8")
            for name in ("keep", rung)
        )
    assert_same_bits(again, kept, rung)


def test_some_projections_and_nf4(folder) -> None:
    """Borders of other widths, none at all, and a 4-bit base work too."""
    batch = packed()
    for targets in (("q_proj", "v_proj"), ("down_proj",)):
        lora = LoraSettings(rank=3, alpha=6, targets=targets)
        truth = by_float64(*fresh(folder, lora=lora), batch)
        found = by_engine(*fresh(folder, lora=lora), batch, products="fp8", rung="layer")
        assert distances(found.gradients, truth.gradients)["all"] < 2 * GRADIENT_ERROR
    held = [loaded(folder, "nf4", compute_dtype=torch.float32) for _ in range(2)]
    found, truth = by_engine(*held[0], batch, products="fp8"), by_float64(*held[1], batch)
    assert distances(found.gradients, truth.gradients)["all"] < GRADIENT_ERROR


@pytest.mark.parametrize("device", DEVICES)
def test_refresh_brings_the_masters_in(folder, device) -> None:
    """After an update, refreshed matrices are those of an engine made anew."""
    batch = packed()
    with plain_attention(device):
        decoder, adapter = fresh(folder, device)
        engine = new_engine(decoder, adapter, sum(batch.row_lengths), products="fp8")
        before = run_engine(engine, adapter, batch)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.5)
        engine.refresh()
        after = run_engine(engine, adapter, batch)
        engine.close()
        anew = by_engine(decoder, adapter, batch, products="fp8")
    assert after.loss != before.loss
    assert_same_bits(after, anew, "refreshed")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rung", ["keep", "layer"])
def test_thin_products_of_swiglu(folder, rung, device, monkeypatch) -> None:
    """u and v from SwiGLU's own pass give the gradients of thin products that read its output again."""
    batch = packed()
    with plain_attention(device):
        found = by_engine(*fresh(folder, device), batch, rung=rung, products="fp8")
        monkeypatch.setattr(layer, "FUSE_THIN", False)
        apart = by_engine(*fresh(folder, device), batch, rung=rung, products="fp8")
    # A u or v that is rounded otherwise moves a whole row by up to a step of e4m3, here and there.
    assert distances(found.gradients, apart.gradients)["all"] < (GRADIENT_ERROR / 3 if device == "cuda" else 1e-3)


def test_rows_are_quantised_once(folder, monkeypatch) -> None:
    """With u or v where these are computed; alone where SwiGLU has computed them: twice in a layer."""
    counts = dict.fromkeys(("quantize_rows", "quantize_rows_lora"), 0)

    def counted(name: str):
        original = getattr(bordered_fp8, name)

        def call(*arguments, **options):
            counts[name] += 1
            return original(*arguments, **options)

        return call

    batch = packed()
    decoder, adapter = fresh(folder)
    engine = new_engine(decoder, adapter, sum(batch.row_lengths), products="fp8")
    for name in counts:
        monkeypatch.setattr(bordered_fp8, name, counted(name))
    run_engine(engine, adapter, batch)
    layers = decoder.config.num_layers
    # qkv, o and gate/up forward; down, o and qkv backward.
    assert counts == {"quantize_rows": 2 * layers, "quantize_rows_lora": 6 * layers}


def test_held_rows_are_for_one_product(folder) -> None:
    """What ``extend`` quantised serves the next product with that matrix and these rows; any other quantises anew."""
    bordered, _, _ = new_bordered(fresh(folder)[0])
    draw = torch.Generator().manual_seed(4)
    matrix, rank = bordered.kept, bordered.rank
    x = torch.randn(5, bordered.inn + rank, generator=draw)
    dy = torch.randn(5, bordered.out + rank, generator=draw)
    y, dx, expected = (torch.empty(5, size) for size in (bordered.out, bordered.inn, bordered.out))
    bordered.extend(x, matrix)
    fp8_matmul(*quantised(x), bordered.by_out, bordered.out_scales, expected)
    if bordered.linear.bias is not None:
        expected.add_(bordered.linear.bias)
    bordered.forward(x, matrix, y)
    assert torch.equal(y, expected)
    bordered.extend(x, matrix)
    bordered.input_gradient(dy, matrix, dx)
    bordered.forward(x, matrix, y)
    assert torch.equal(y, expected)
    x.mul_(2)
    bordered.forward(x, matrix, y)
    x.mul_(0.5)
    assert not torch.equal(y, expected)
    bordered.extend(x, matrix)
    bordered.forward(x[1:], matrix, y[1:])
    assert torch.equal(y[1:], expected[1:])


def quantised(x):
    """x in e4m3 with its scales."""
    return Fp8Rows(*x.shape, x.device).quantize(x, x)


def test_close_leaves_the_decoder(folder) -> None:
    """The base is neither moved nor rounded: afterwards it answers as before."""
    batch = packed()
    decoder, adapter = fresh(folder)
    weight = decoder.layers[0].qkv.weight
    expected = by_autograd(*fresh(folder), batch)
    by_engine(decoder, adapter, batch, products="fp8")
    assert decoder.layers[0].qkv.weight is weight
    assert_same_bits(by_autograd(decoder, adapter, batch), expected, "after the engine")


def new_bordered(decoder, lora=LORA) -> tuple[BorderedFp8, Adapter, FlatAdapter]:
    """The gate and up matrices of the first layer, kept."""
    adapter = Adapter(decoder.config, lora, seed=1)
    masters = FlatAdapter(adapter)
    linear = decoder.layers[0].gate_up
    rows = Fp8Rows(8, 4096, torch.device("cpu"))
    bordered = BorderedFp8(linear, 0, lora.targets, 2 * lora.rank, lora.scale, masters, rows=rows)
    bordered.keep_matrix()
    return bordered, adapter, masters


def test_border_in_both_directions(folder) -> None:
    """The copies hold W, B beside it and s A below it, each to a rounding of e4m3; what is too large is limited."""
    decoder, _ = fresh(folder)
    bordered, adapter, _ = new_bordered(decoder)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.startswith(("a.0_gate", "a.0_up", "b.0_gate", "b.0_up")):
                parameter.normal_(0, 0.05)
        adapter.b["0_up_proj"][3, 2] = 1e6
    bordered.write_adapter(bordered.kept)
    weight, rank, out, inn = bordered.linear.weight, LORA.rank, bordered.out, bordered.inn
    half = out // 2
    by_out = bordered.by_out.float() * bordered.out_scales.T
    by_in = bordered.by_in.float() * bordered.in_scales.T
    b = torch.zeros(out, 2 * rank)
    b[:half, :rank], b[half:, rank:] = adapter.b["0_gate_proj"], adapter.b["0_up_proj"]
    b[half + 3, rank + 2] = weight[half + 3].abs().max()
    a = LORA.scale * torch.cat([adapter.a["0_gate_proj"], adapter.a["0_up_proj"]])
    for found, expected, largest in (
        (by_out, torch.cat([weight, b], 1), weight.abs().amax(1, keepdim=True)),
        (by_in, torch.cat([weight.T, a.T], 1), weight.abs().amax(0).unsqueeze(1)),
    ):
        within = torch.minimum(torch.maximum(expected, -largest), largest)
        assert (found - within).abs().sub(within.abs() / 16).sub(largest * 2**-19).max() <= 0
    assert by_in.shape == (inn, out + 2 * rank)


def test_memory_is_as_planned(folder) -> None:
    """The tables of engine/memory.py count what is held, and the plan adds it up."""
    decoder, adapter = fresh(folder)
    engine = new_engine(decoder, adapter, 200, chunk_tokens=64, products="fp8")
    held = 0
    for matrix in engine.layers[0].matrices:
        assert isinstance(matrix, BorderedFp8)
        parts = (matrix.by_out, matrix.by_in, matrix.out_scales, matrix.in_scales, matrix.b16, matrix.kept)
        held += sum(part.nbytes for part in parts)
    counted = fp8_matrix_bytes(engine.shape, 4)
    assert held <= counted < held + 24 * 512
    rows = matrix.rows
    assert rows.values.numel() == 64 * widest_row(engine.shape)
    assert 0 <= fp8_bytes(engine.shape, 64) - rows.values.nbytes - rows.scales.nbytes < 1024
    rows = rows_of((40, 130, 23, 64))
    section = TrainSection(lora_rank=8, lora_alpha=16, global_batch_size=4, max_steps=1)
    decoder.precision, decoder.compute_dtype = "fp8", torch.bfloat16
    choice = engine_plan(decoder, section, rows).engine
    assert choice is not None and choice.settings.products == "fp8" and choice.keep_matrices
    assert choice.parts["matrices"] == decoder.config.num_layers * fp8_matrix_bytes(engine.shape, 2)
    assert choice.parts["weights"] >= 2 * decoder.config.linear_parameters
    assert choice.parts["fp8 rows"] == fp8_bytes(engine.shape, choice.chunk_tokens)
    with pytest.raises(TrainingError, match="lora_dropout"):
        engine_plan(decoder, section.model_copy(update={"lora_dropout": 0.1}), rows)


def test_what_cannot_be(folder) -> None:
    """Widths that are no multiple of 16, matrices made at each use, and a CPU are refused with a reason."""
    decoder, adapter = fresh(folder)
    masters = FlatAdapter(adapter)
    linear = FrozenLinear(("o_proj",), (64,), 40, torch.float32)
    with pytest.raises(TrainingError, match="64 x 40"):
        BorderedFp8(linear, 0, (), 0, 1.0, masters, rows=Fp8Rows(1, 64, torch.device("cpu")))
    with pytest.raises(TrainingError, match="kept"):
        by_engine(decoder, adapter, packed(), products="fp8", keep_matrices=False)
    with pytest.raises(ModelError, match="fp8 products need a GPU"):
        resolve_precision("fp8", torch.device("cpu"))
