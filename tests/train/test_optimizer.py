"""Schedules equal transformers', AdamW equals PyTorch's own, the 8-bit state works or says why not."""

import logging
import sys

import pytest
import torch
from torch import nn

from deepdoctor.errors import MissingExtraError, RunError
from deepdoctor.train.optimizer import learning_rate_at, make_optimizer, optimizer_state, restore_optimizer

CPU = torch.device("cpu")


def parameters(seed=0, rows=80, columns=80):
    """Two matrices; 80 x 80 is large enough that bitsandbytes keeps 8-bit state for it."""
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(rows, columns)), nn.Parameter(torch.randn(3, 5))]


def steps(optimizer, params, n, seed=1):
    """Take n steps with random gradients that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
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


def test_8_bit_adamw_keeps_8_bit_state_and_stays_near():
    """With bitsandbytes the large matrix has uint8 moments, and ten steps stay near the fp32 optimizer's."""
    pytest.importorskip("bitsandbytes")
    mine, theirs = parameters(), parameters()
    optimizer, name = make_optimizer(mine, "adamw_8bit", 1e-2, 0.0, (0.9, 0.999), CPU)
    assert name == "adamw_8bit"
    steps(optimizer, mine, 10)
    tensors, _ = optimizer_state(optimizer)
    assert tensors["0.state1"].dtype == torch.uint8
    steps(make_optimizer(theirs, "adamw", 1e-2, 0.0, (0.9, 0.999), CPU)[0], theirs, 10)
    moved = (theirs[0] - parameters()[0]).abs().mean()
    assert (mine[0] - theirs[0]).abs().mean() < 0.1 * moved


def test_without_bitsandbytes_a_cpu_run_says_so(monkeypatch, caplog):
    """The fp32 optimizer takes over and a log line names the reason."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with caplog.at_level(logging.WARNING):
        optimizer, name = make_optimizer(parameters(), "adamw_8bit", 1e-2, 0.0, (0.9, 0.999), CPU)
    assert name == "adamw"
    assert type(optimizer) is torch.optim.AdamW
    assert "bitsandbytes is not installed" in caplog.text


def test_without_bitsandbytes_a_gpu_run_stops(monkeypatch):
    """On a GPU the memory plan counts on 8-bit state, so the run stops with the install line."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match="bitsandbytes is not installed") as caught:
        make_optimizer(parameters(), "adamw_8bit", 1e-2, 0.0, (0.9, 0.999), torch.device("cuda"))
    assert 'pip install "deepdoctor[gpu]"' in caught.value.hint


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_saved_state_goes_on_bit_for_bit(kind):
    """Five steps, state out and into a fresh optimizer, five more: exactly ten steps without a break."""
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")

    def make(params):
        return make_optimizer(params, kind, 1e-2, 0.1, (0.9, 0.999), CPU)[0]

    whole = parameters()
    optimizer = make(whole)
    steps(optimizer, whole, 5, seed=1)
    tensors, numbers = optimizer_state(optimizer)
    halves = [nn.Parameter(p.detach().clone()) for p in whole]
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    steps(optimizer, whole, 5, seed=2)
    fresh = make(halves)
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
