"""Schedules equal transformers', AdamW equals PyTorch's own, 8-bit state is kept, saved and read as bitsandbytes'."""

import logging
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepdoctor.errors import RunError
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.config import ModelConfig
from deepdoctor.train.flat import FlatAdapter
from deepdoctor.train.optimizer import (
    can_flatten,
    clip_on_device,
    learning_rate_at,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
)

CPU = torch.device("cpu")


def parameters(seed=0, rows=80, columns=80):
    """Two matrices; 80 x 80 is large enough for 8-bit state."""
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(rows, columns)), nn.Parameter(torch.randn(3, 5))]


def steps(optimizer, params, n, seed=1):
    """Take n steps with random gradients that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.fixture(scope="module")
def config(tiny_r1):
    """64 hidden, 128 feed-forward, keys 32 wide: from rank 128 on every matrix has 4,096 elements."""
    return ModelConfig.from_folder(tiny_r1)


def optimizer_of(kind, params):
    """The optimizer at the settings of most tests."""
    return make_optimizer(params, kind, 1e-2, 0.1, (0.9, 0.999), CPU)[0]


def flat_steps(optimizer, flat, n, seed=1):
    """The steps of ``steps`` with the same gradients, through the flat parameter."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        flat.zero_grad()
        for p in flat.adapter.parameters():
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(60, 5), (7, 0), (5, 5), (1, 0)])
def test_schedules_equal_transformers(schedule, total, warmup):
    """Every step's rate is that of transformers' get_*_schedule_with_warmup."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert learning_rate_at(step, total, 2e-4, schedule, warmup) == pytest.approx(
            theirs.get_last_lr()[0], abs=1e-18
        )
        optimizer.step()
        theirs.step()


def test_adamw_is_pytorchs():
    """Ten steps, weight decay and betas included, end where PyTorch's plain AdamW ends."""
    mine, theirs = parameters(), parameters()
    optimizer, name = make_optimizer(mine, "adamw", 1e-2, 0.1, (0.8, 0.99), CPU)
    assert name == "adamw"
    steps(optimizer, mine, 10)
    steps(torch.optim.AdamW(theirs, 1e-2, (0.8, 0.99), 1e-8, 0.1, foreach=False, fused=False), theirs, 10)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_8_bit_adamw_keeps_8_bit_state_and_stays_near(monkeypatch):
    """Without bitsandbytes the large matrix has uint8 moments, and ten steps stay near the fp32 optimizer's."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    mine, theirs = parameters(), parameters()
    optimizer, name = make_optimizer(mine, "adamw_8bit", 1e-2, 0.0, (0.9, 0.999), CPU)
    assert name == "adamw_8bit"
    steps(optimizer, mine, 10)
    tensors, _ = optimizer_state(optimizer)
    assert tensors["0.state1"].dtype == torch.uint8
    steps(make_optimizer(theirs, "adamw", 1e-2, 0.0, (0.9, 0.999), CPU)[0], theirs, 10)
    moved = (theirs[0] - parameters()[0]).abs().mean()
    assert (mine[0] - theirs[0]).abs().mean() < 0.1 * moved
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-6, atol=1e-6)


def test_a_closure_is_called_with_gradients_on():
    """As for PyTorch's optimizers, its loss is returned."""
    params = parameters()[:1]
    optimizer = optimizer_of("adamw_8bit", params)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = float(closure().detach())
    assert float(optimizer.step(closure).detach()) == before > float(closure().detach())


def saved_by_bitsandbytes(optimizer):
    """Tensors and numbers as checkpoints held them while bitsandbytes was the optimizer: its inner dicts laid flat."""
    tensors, numbers = {}, {}
    for number, state in optimizer.state_dict()["state"].items():
        inner = next((value for value in state.values() if isinstance(value, dict)), {})
        for name, value in {**state, **inner}.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.clone()
            elif not isinstance(value, dict):
                numbers[f"{number}.{name}"] = value
    return tensors, numbers


def test_state_written_with_bitsandbytes_goes_on():
    """Names, types and shapes are its, its state comes out again bit for bit, and the next step is as near as its."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    before, mine = parameters(), parameters()
    theirs = bitsandbytes.optim.AdamW8bit(before, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    steps(theirs, before, 5)
    saved = saved_by_bitsandbytes(theirs)
    optimizer = optimizer_of("adamw_8bit", mine)
    steps(optimizer, mine, 5)
    written = optimizer_state(optimizer)
    assert written[1] == saved[1]
    assert {name: (value.dtype, value.shape) for name, value in written[0].items()} == {
        name: (value.dtype, value.shape) for name, value in saved[0].items()
    }
    mine = [nn.Parameter(p.detach().clone()) for p in before]
    optimizer = optimizer_of("adamw_8bit", mine)
    restore_optimizer(optimizer, *saved)
    again = optimizer_state(optimizer)
    assert all(torch.equal(again[0][name], value) for name, value in saved[0].items())
    steps(optimizer, mine, 1, seed=2)
    steps(theirs, before, 1, seed=2)
    for p, q in zip(mine, before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_saved_state_goes_on_bit_for_bit(kind):
    """Five steps, state out and into a fresh optimizer, five more: exactly ten steps without a break."""
    whole = parameters()
    optimizer = optimizer_of(kind, whole)
    steps(optimizer, whole, 5, seed=1)
    tensors, numbers = optimizer_state(optimizer)
    halves = [nn.Parameter(p.detach().clone()) for p in whole]
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    steps(optimizer, whole, 5, seed=2)
    fresh = optimizer_of(kind, halves)
    restore_optimizer(fresh, tensors, numbers)
    steps(fresh, halves, 5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_state_of_another_adapter_is_refused():
    """State of one tensor does not go into an optimizer of two."""
    one = parameters()[:1]
    optimizer, _ = make_optimizer(one, "adamw", 1e-2, 0.0, (0.9, 0.999), CPU)
    steps(optimizer, one, 1)
    with pytest.raises(RunError, match="belongs to another adapter"):
        restore_optimizer(
            make_optimizer(parameters(), "adamw", 1e-2, 0.0, (0.9, 0.999), CPU)[0], *optimizer_state(optimizer)
        )


@pytest.mark.parametrize(("saved", "resumed"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_state_of_the_other_kind_is_refused(saved, resumed):
    """Resumed with the other optimizer: an error now, where the first step used to fail with a KeyError."""
    params = parameters()
    optimizer, fresh = optimizer_of(saved, params), optimizer_of(resumed, params)
    steps(optimizer, params, 1)
    with pytest.raises(RunError, match=r"keeps the optimizer's state in (8-bit|fp32)") as caught:
        restore_optimizer(fresh, *optimizer_state(optimizer))
    assert "train.optimizer" in caught.value.hint


def test_what_can_be_flattened(config):
    """fp32 always; 8-bit where each matrix is whole blocks of 256 and at least 4,096 elements."""

    def adapter(rank, *targets):
        return Adapter(config, LoraSettings(rank=rank, targets=targets))

    assert can_flatten(adapter(3, "q_proj"), "adamw")
    assert can_flatten(adapter(128, "k_proj"), "adamw_8bit")
    assert can_flatten(adapter(68, "q_proj"), "adamw_8bit")
    assert not can_flatten(adapter(127, "k_proj"), "adamw_8bit"), "4,064 elements: fp32 state"
    assert not can_flatten(adapter(65, "q_proj"), "adamw_8bit"), "4,160 elements: the last block is not whole"


def test_blocks_and_smallest_size_are_what_can_flatten_counts_on():
    """One absmax for 256 elements, 8-bit state from 4,096 elements on."""
    params = [nn.Parameter(torch.ones(n)) for n in (4095, 4096, 4097)]
    optimizer = optimizer_of("adamw_8bit", params)
    steps(optimizer, params, 1)
    tensors, _ = optimizer_state(optimizer)
    assert [tensors[f"{n}.state1"].dtype for n in range(3)] == [torch.float32, torch.uint8, torch.uint8]
    assert [tensors[f"{n}.absmax1"].shape for n in (1, 2)] == [(16,), (17,)]


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_one_flat_tensor_is_updated_as_the_single_ones(config, kind):
    """Eight steps: 8-bit weights and state bit for bit; fp32 up to how the vector loop is cut."""
    lora = LoraSettings(rank=128, targets=("v_proj", "gate_proj", "q_proj", "k_proj"))
    single, flat = Adapter(config, lora), FlatAdapter(Adapter(config, lora))
    assert can_flatten(single, kind)
    of_single, of_flat = optimizer_of(kind, single.parameters()), optimizer_of(kind, [flat.parameter])
    steps(of_single, list(single.parameters()), 8)
    flat_steps(of_flat, flat, 8)
    exact = {"rtol": 0, "atol": 0} if kind == "adamw_8bit" else {"rtol": 1e-6, "atol": 1e-7}
    for mine, theirs in zip(flat.adapter.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **exact)
    (mine, my_numbers), (theirs, their_numbers) = optimizer_state(of_flat, flat.pieces), optimizer_state(of_single)
    assert my_numbers == their_numbers
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, **exact, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("flat_first", [True, False])
def test_flat_state_goes_on_in_single_tensors_and_back(config, kind, flat_first):
    """Saved one way and restored the other, state comes out again bit for bit, and so does the next 8-bit step."""
    lora = LoraSettings(rank=128, targets=("up_proj", "v_proj", "gate_proj"))
    single, flat = Adapter(config, lora), FlatAdapter(Adapter(config, lora))
    of_single, of_flat = optimizer_of(kind, single.parameters()), optimizer_of(kind, [flat.parameter])
    if flat_first:
        flat_steps(of_flat, flat, 3)
        saved = optimizer_state(of_flat, flat.pieces)
        restore_optimizer(of_single, *saved)
        single.load_state(flat.adapter.state(), "here")
        again = optimizer_state(of_single)
    else:
        steps(of_single, list(single.parameters()), 3)
        saved = optimizer_state(of_single)
        restore_optimizer(of_flat, *saved, flat.pieces)
        flat.adapter.load_state(single.state(), "here")
        again = optimizer_state(of_flat, flat.pieces)
    assert again[1] == saved[1]
    assert again[0].keys() == saved[0].keys()
    for name, value in saved[0].items():
        assert again[0][name].shape == value.shape
        assert torch.equal(again[0][name], value)
    steps(of_single, list(single.parameters()), 2, seed=4)
    flat_steps(of_flat, flat, 2, seed=4)
    for mine, theirs in zip(flat.adapter.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0 if kind == "adamw_8bit" else 1e-7)


def test_flat_state_of_another_adapter_is_refused(config):
    """Another number of matrices, other sizes, or steps that differ from matrix to matrix."""
    flat = FlatAdapter(Adapter(config, LoraSettings(rank=4, targets=("q_proj", "v_proj"))))
    optimizer = optimizer_of("adamw", [flat.parameter])
    flat_steps(optimizer, flat, 1)
    tensors, numbers = optimizer_state(optimizer, flat.pieces)
    for targets, rank in ((("q_proj",), 4), (("q_proj", "v_proj"), 8)):
        other = FlatAdapter(Adapter(config, LoraSettings(rank=rank, targets=targets)))
        with pytest.raises(RunError, match="belongs to another adapter"):
            restore_optimizer(optimizer_of("adamw", [other.parameter]), tensors, numbers, other.pieces)
    tensors["1.step"] += 1
    with pytest.raises(RunError, match="belongs to another adapter"):
        restore_optimizer(optimizer, tensors, numbers, flat.pieces)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_state_before_the_first_step_is_empty(config, kind):
    """A checkpoint of step 0 has no entries and restores to none."""
    flat = FlatAdapter(Adapter(config, LoraSettings(rank=128)))
    optimizer = optimizer_of(kind, [flat.parameter])
    assert optimizer_state(optimizer, flat.pieces) == ({}, {})
    restore_optimizer(optimizer, {}, {}, flat.pieces)
    flat_steps(optimizer, flat, 1)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-3, 1.0, 1e3]), st.sampled_from([0.0, 1e-6, 1.0, 1e6]))
def test_clipping_scales_to_the_norm_and_no_further(n, max_norm, size):
    """The norm is the fp64 norm to fp32 rounding; shorter gradients stay bit for bit, longer ones end at max_norm."""
    gradient = torch.randn(n, generator=torch.Generator().manual_seed(n)) * size
    before, truth = gradient.clone(), float(gradient.double().norm())
    norm = clip_on_device(gradient, max_norm)
    assert norm.shape == ()
    assert float(norm) == pytest.approx(truth, rel=1e-6)
    if max_norm == 0 or truth <= max_norm:
        assert torch.equal(gradient, before)
    else:
        torch.testing.assert_close(gradient, before * (max_norm / truth), rtol=1e-6, atol=0)
        assert float(gradient.double().norm()) == pytest.approx(max_norm, rel=1e-6)


@pytest.mark.parametrize("at", [0, 512, 9999])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_left_alone(at, value):
    """The norm says so and nothing is scaled, so that the rows can be looked at."""
    gradient = torch.randn(10_000)
    gradient[at] = value
    before = gradient.clone()
    assert not clip_on_device(gradient, 1.0).isfinite()
    assert torch.equal(gradient.nan_to_num(), before.nan_to_num())


def test_the_norm_of_a_long_gradient_is_exact():
    """20 million equal elements: one fp32 sum of all squares on a CPU is 1 % short."""
    gradient = torch.full((20_000_001,), 0.1)
    truth = float(gradient[0].double() * 20_000_001**0.5)
    assert float(clip_on_device(gradient, 0.0)) == pytest.approx(truth, rel=1e-6)


@pytest.mark.gpu
def test_clipping_does_not_wait_for_the_gpu():
    """Norm and scaling raise no synchronisation, and give what the CPU gives."""
    gradient = torch.randn(1_000_003, generator=torch.Generator().manual_seed(1))
    there = gradient.cuda()
    clip_on_device(there.clone(), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        norm = clip_on_device(there, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.is_cuda
    assert float(norm) == pytest.approx(float(clip_on_device(gradient, 1.0)), rel=1e-6)
    torch.testing.assert_close(there.cpu(), gradient, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_an_8_bit_step_does_not_wait_for_the_gpu():
    """After the first, which makes the state, a step raises no synchronisation."""
    params = [nn.Parameter(p.detach().cuda()) for p in parameters()]
    optimizer = make_optimizer(params, "adamw_8bit", 1e-2, 0.1, (0.9, 0.999), torch.device("cuda"))[0]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in params)
