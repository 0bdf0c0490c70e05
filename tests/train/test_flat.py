"""The flat buffer is the adapter: every parameter and gradient is a view, in an order that needs no copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deepdoctor.model.adapter import ADAPTER_FILE, Adapter, LoraSettings
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.decoder import DecoderLayer, PackedAttention
from deepdoctor.model.load import load_decoder
from deepdoctor.train.flat import FlatAdapter

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def config(tiny_r1):
    """Two layers of 64 hidden, 128 feed-forward."""
    return ModelConfig.from_folder(tiny_r1)


def filled(config, seed=3, **lora):
    """An adapter whose B are not zero."""
    adapter = Adapter(config, LoraSettings(**lora), seed)
    torch.manual_seed(seed)
    for b in adapter.b.values():
        torch.nn.init.normal_(b)
    return adapter


@settings(deadline=None, max_examples=30)
@given(st.permutations(ALL), st.integers(1, 7), st.integers(1, 5))
def test_every_parameter_is_a_view_of_the_buffer(config, order, n, rank):
    """Values stay, pieces tile the buffer in the order of parameters(), and A blocks are views of A's and gradients."""
    adapter = filled(config, targets=tuple(order[:n]), rank=rank)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    flat = FlatAdapter(adapter)
    flat.gradient.copy_(torch.arange(flat.gradient.numel()))
    assert [piece.key for piece in flat.pieces] == [name for name, _ in adapter.named_parameters()]
    covered = torch.cat([torch.arange(piece.start, piece.start + piece.size) for piece in flat.pieces])
    assert torch.equal(covered.sort().values, torch.arange(flat.parameter.numel()))
    for piece, parameter in zip(flat.pieces, adapter.parameters(), strict=True):
        own = slice(piece.start, piece.start + piece.size)
        assert parameter.shape == piece.shape
        assert torch.equal(parameter, before[piece.key])
        for view, buffer in ((parameter, flat.parameter), (parameter.grad, flat.parameter.grad)):
            assert view.data_ptr() == buffer[own].data_ptr()
            assert torch.equal(view.flatten(), buffer[own])
    for layer in range(config.num_layers):
        for names in (linear.names for linear in DecoderLayer(config, layer, torch.float32).linears):
            present = [name for name in names if name in adapter.settings.targets]
            if not present:
                with pytest.raises(KeyError, match=f"layer {layer} has no adapter on {names[0]}"):
                    flat.a_block(layer, names)
                continue
            weights, gradients = flat.a_block(layer, names)
            assert torch.equal(weights, torch.cat([before[f"a.{layer}_{name}"] for name in present]))
            assert torch.equal(gradients, torch.cat([adapter.a[f"{layer}_{name}"].grad for name in present]))
            assert weights.data_ptr() == adapter.a[f"{layer}_{present[0]}"].data_ptr()
            assert flat.a_block(layer, present)[1].data_ptr() == gradients.data_ptr()
            assert not weights.requires_grad
            for name in present:
                weight, gradient = flat.b(layer, name)
                assert weight.data_ptr() == adapter.b[f"{layer}_{name}"].data_ptr()
                assert gradient.data_ptr() == adapter.b[f"{layer}_{name}"].grad.data_ptr()


def test_targets_in_the_usual_order_keep_it(config):
    """With the default targets the buffer is the parameters one after another."""
    flat = FlatAdapter(Adapter(config, LoraSettings(rank=2)))
    starts = [piece.start for piece in flat.pieces]
    assert starts == sorted(starts)


def test_state_save_load_and_delta_work_on_the_views(config, tmp_path):
    """Files and products are those of the single tensors; loading writes through to the buffer."""
    single, adapter = filled(config, rank=3), filled(config, rank=3)
    flat = FlatAdapter(adapter)
    adapter.to("cpu").train()
    assert torch.equal(adapter.delta(1, "v_proj"), single.delta(1, "v_proj"))
    for one, folder in ((single, "single"), (adapter, "flat")):
        one.save(tmp_path / folder, "base")
    assert (tmp_path / "single" / ADAPTER_FILE).read_bytes() == (tmp_path / "flat" / ADAPTER_FILE).read_bytes()
    flat.parameter.data.zero_()
    assert not any(p.any() for p in adapter.parameters())
    adapter.load_state(load_file(tmp_path / "flat" / ADAPTER_FILE), "here")
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), single.parameters(), strict=True))
    piece = flat.pieces[-1]
    assert torch.equal(flat.parameter[piece.start :].view(piece.shape), list(single.parameters())[-1])


def test_autograd_accumulates_into_the_buffer(tiny_r1):
    """Two backward passes through the decoder leave the single adapter's gradients; zero_grad empties them in place."""
    decoder = load_decoder(tiny_r1, "fp32")
    single, adapter = (filled(decoder.config, rank=3).train() for _ in range(2))
    flat = FlatAdapter(adapter)
    ids, positions = torch.arange(12), torch.tensor([*range(7), *range(5)])
    for one in (single, adapter):
        for _ in range(2):
            attend = PackedAttention(decoder.config.num_kv_heads, (7, 5))
            decoder(ids, positions, attend, one.prepare(decoder)).square().mean().backward()
    expected = [p.grad for p in single.parameters()]
    assert all(g.any() for g in expected)
    for piece, gradient in zip(flat.pieces, expected, strict=True):
        assert torch.equal(flat.gradient[piece.start : piece.start + piece.size].view(piece.shape), gradient)
    flat.parameter.grad = None
    flat.zero_grad()
    assert flat.parameter.grad is flat.gradient
    assert not any(p.grad.any() for p in adapter.parameters())
