"""The engine against the decoder's own autograd path, on every rung."""

import pytest
import torch

from deepdoctor.data.pack import pack
from deepdoctor.engine.layout import RUNGS
from deepdoctor.engine.step import Engine, EngineSettings, Rows
from deepdoctor.kernels.linear_cross_entropy import linear_cross_entropy
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.decoder import Decoder, PackedAttention
from deepdoctor.model.load import load_decoder
from deepdoctor.train.flat import FlatAdapter
from helpers_models import save_tiny_model
from helpers_train import synthetic_rows

KINDS = ("llama", "qwen2", "qwen3")
ALL = LoraSettings(rank=4, alpha=8)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A tiny model of each family; Qwen2 has biases, Qwen3 norms on q and k."""
    path = tmp_path_factory.mktemp(request.param)
    save_tiny_model(path, request.param)
    return path


def fresh(folder, lora=ALL, precision="fp32", dtype=None) -> tuple[Decoder, Adapter]:
    """Decoder and an adapter whose B is not zero, so that every gradient is there."""
    decoder = load_decoder(folder, precision, "cpu", dtype)
    adapter = Adapter(decoder.config, lora, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for b in adapter.b.values():
            b.normal_(0, 0.05, generator=draw)
    return decoder, adapter


def plain(decoder: Decoder, adapter: Adapter, batch, scale: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by autograd."""
    adapter.zero_grad()
    attend = PackedAttention(decoder.config.num_kv_heads, batch.row_lengths)
    hidden = decoder(batch.input_ids, batch.positions, attend, adapter.prepare(decoder))
    loss = linear_cross_entropy(hidden[batch.predict], decoder.head, batch.labels).sum()
    (loss * scale).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def by_engine(decoder: Decoder, adapter: Adapter, batch, scale: float, **settings):
    """Loss, gradients and the engine itself."""
    flat = FlatAdapter(adapter)
    layers = decoder.config.num_layers
    tokens = sum(batch.row_lengths)
    rung = settings.pop("rung", "keep")
    chosen = EngineSettings(
        **{
            "rungs": (rung,) * layers if isinstance(rung, str) else rung,
            "max_tokens": tokens,
            "chunk_tokens": tokens,
            "logit_tokens": 64,
            "keep_matrices": True,
            "attention": "rows",
            **settings,
        }
    )
    engine = Engine(decoder, flat, adapter.settings, chosen)
    rows = Rows(batch.input_ids, batch.positions, batch.row_lengths, batch.predict, batch.labels)
    loss = engine.gradients(rows, scale)
    return loss, {name: p.grad.clone() for name, p in adapter.named_parameters()}, engine


def close(mine, theirs, rtol=2e-4):
    """Every gradient within rtol of the largest of its tensor."""
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (mine[name] - gradient).abs().max()
        assert error <= rtol * gradient.abs().max() + 1e-9, f"{name}: {error:.2e} of {gradient.abs().max():.2e}"


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_equals_autograd(folder, rung, chunk) -> None:
    """Loss and every gradient are autograd's, on every rung, in chunks or whole."""
    decoder, adapter = fresh(folder)
    batch = pack(synthetic_rows(4))
    expected_loss, expected = plain(decoder, adapter, batch, 0.01)
    loss, gradients, _ = by_engine(decoder, adapter, batch, 0.01, rung=rung, chunk_tokens=chunk)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    close(gradients, expected)


@pytest.mark.parametrize("rung", RUNGS[1:])
def test_recompute_changes_no_bit(folder, rung) -> None:
    """Recomputing gives the bits that keeping gives."""
    batch = pack(synthetic_rows(5, seed=3))
    kept_loss, kept, _ = by_engine(*fresh(folder), batch, 1.0, chunk_tokens=16)
    loss, again, _ = by_engine(*fresh(folder), batch, 1.0, rung=rung, chunk_tokens=16)
    assert torch.equal(loss, kept_loss)
    for name, gradient in kept.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("chunk", [8, 33, 10_000])
def test_memory_is_as_planned(folder, chunk, keep) -> None:
    """The arena is used to its last byte, whatever the rungs; a second micro-batch fits the same memory."""
    batch = pack(synthetic_rows(6, seed=4))
    layers = fresh(folder)[0].config.num_layers
    ladders = [(rung,) * layers for rung in RUNGS] + [("host",) + ("keep",) * (layers - 1), ("layer", "gate_up")]
    for rungs in ladders:
        _, _, engine = by_engine(*fresh(folder), batch, 1.0, rung=rungs, chunk_tokens=chunk, keep_matrices=keep)
        assert engine.arena.high_water == engine.arena.memory.numel(), rungs
        rows = Rows(batch.input_ids, batch.positions, batch.row_lengths, batch.predict, batch.labels)
        engine.gradients(rows, 1.0)
        engine.losses(rows)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj"), ("down_proj",)])
def test_some_projections_only(folder, targets) -> None:
    """Adapters on some projections give autograd's gradients too."""
    lora = LoraSettings(rank=3, alpha=6, rslora=True, targets=targets)
    decoder, adapter = fresh(folder, lora)
    batch = pack(synthetic_rows(3))
    expected_loss, expected = plain(decoder, adapter, batch, 0.5)
    for rung in ("keep", "elementwise", "layer"):
        decoder, adapter = fresh(folder, lora)
        loss, gradients, _ = by_engine(decoder, adapter, batch, 0.5, rung=rung)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        close(gradients, expected)


def test_nf4_made_anew_equals_nf4_kept(folder) -> None:
    """Dequantising at each use and keeping the values give the same bits, and autograd's gradients."""
    batch = pack(synthetic_rows(4))
    decoder, adapter = fresh(folder, precision="nf4", dtype=torch.float32)
    expected_loss, expected = plain(decoder, adapter, batch, 1.0)
    results = [
        by_engine(*fresh(folder, precision="nf4", dtype=torch.float32), batch, 1.0, keep_matrices=keep, rung=rung)
        for keep in (True, False)
        for rung in ("keep", "layer")
    ]
    for loss, gradients, _ in results:
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        close(gradients, expected)
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


def test_packed_equals_alone(folder) -> None:
    """The gradient of packed rows is the sum of the rows' own."""
    rows = synthetic_rows(3, seed=9)
    _, together, _ = by_engine(*fresh(folder), pack(rows), 1.0)
    total: dict[str, torch.Tensor] = {}
    for row in rows:
        _, gradients, _ = by_engine(*fresh(folder), pack([row]), 1.0, max_tokens=200)
        total = {name: total.get(name, 0) + g for name, g in gradients.items()}
    close(together, total)


def test_gradients_add_up_over_micro_batches(folder) -> None:
    """Two micro-batches add to the same buffers, and the refreshed matrices follow the masters."""
    decoder, adapter = fresh(folder)
    batch = pack(synthetic_rows(3))
    _, once, engine = by_engine(decoder, adapter, batch, 1.0)
    rows = Rows(batch.input_ids, batch.positions, batch.row_lengths, batch.predict, batch.labels)
    engine.gradients(rows, 1.0)
    close({n: p.grad for n, p in adapter.named_parameters()}, {n: 2 * g for n, g in once.items()}, 1e-6)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
    engine.refresh()
    expected, _ = plain_copy(folder, adapter, batch)
    torch.testing.assert_close(engine.losses(rows).sum(), expected, rtol=1e-5, atol=0)


def plain_copy(folder, adapter, batch):
    """Autograd's loss with the same adapter weights in a fresh decoder."""
    decoder, other = fresh(folder)
    other.load_state(adapter.state(), "copy")
    return plain(decoder, other, batch, 1.0)


def test_losses_equal_the_decoder(folder) -> None:
    """Losses without gradients are the decoder's, and closing leaves the decoder as it was."""
    decoder, adapter = fresh(folder)
    batch = pack(synthetic_rows(4))
    expected, _ = plain(decoder, adapter, batch, 1.0)
    _, _, engine = by_engine(decoder, adapter, batch, 1.0)
    rows = Rows(batch.input_ids, batch.positions, batch.row_lengths, batch.predict, batch.labels)
    torch.testing.assert_close(engine.losses(rows).sum(), expected, rtol=1e-5, atol=0)
    engine.close()
    again, _ = plain(decoder, adapter, batch, 1.0)
    torch.testing.assert_close(again, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rung", ["keep", "layer", "host"])
def test_a_few_layers_warm_up(folder, rung) -> None:
    """Running the first layer only leaves the next full pass as it was."""
    batch = pack(synthetic_rows(3))
    expected_loss, expected, _ = by_engine(*fresh(folder), batch, 1.0, rung=rung)
    decoder, adapter = fresh(folder)
    _, _, engine = by_engine(decoder, adapter, batch, 1.0, rung=rung)
    rows = Rows(batch.input_ids, batch.positions, batch.row_lengths, batch.predict, batch.labels)
    engine.gradients(rows, 1.0, layers=1)
    adapter.zero_grad(set_to_none=False)
    assert torch.equal(engine.gradients(rows, 1.0), expected_loss)
    for name, parameter in adapter.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
