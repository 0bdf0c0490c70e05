"""The Triton 8-bit AdamW against the reference bit for bit, and on a GPU against bitsandbytes and the clock."""

import logging

import pytest
import torch
from test_adamw_8bit import (
    NAMES,
    SETTINGS,
    SIZES,
    advance,
    check_not_finite,
    check_parts,
    check_truth,
    check_zeros,
    copied,
    fresh,
    some_gradient,
)

from deepdoctor.kernels.adamw_8bit import BLOCK, adamw_8bit
from helpers_triton import DEVICE, needs_triton

ADAPTER = 41_943_040
"""Elements of an 8B Llama's adapter at rank 16."""

pytestmark = needs_triton


@pytest.mark.parametrize("n", SIZES)
def test_one_step_against_float64(n: int) -> None:
    """What the reference is held to."""
    check_truth("triton", n)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_corners() -> None:
    """Zeros, gradients that are not finite, views."""
    check_zeros("triton")
    check_not_finite("triton")
    check_parts("triton")


@pytest.mark.parametrize("n", SIZES)
def test_bits_of_the_reference_over_steps(n: int) -> None:
    """Codes and absmax equal; parameters too on a GPU, where PyTorch's root is rounded to nearest as ours."""
    state = fresh(n, DEVICE)
    for step in range(1, 7):
        state["gradient"].copy_(some_gradient(n, step))
        if step == 4:
            state["gradient"][n // 2] = float("nan")
        other = copied(state)
        adamw_8bit(**state, step=step, **SETTINGS, impl="triton")
        adamw_8bit(**other, step=step, **SETTINGS, impl="torch")
        for name in NAMES[2:]:
            assert torch.equal(state[name], other[name]), name
        torch.testing.assert_close(state["parameter"], other["parameter"], rtol=5e-7, atol=1e-9)
        if DEVICE.type == "cuda":
            assert torch.equal(state["parameter"], other["parameter"])


@pytest.mark.gpu
def test_step_and_learning_rate_compile_nothing() -> None:
    """One kernel serves every step, rate, size below 2**31 and alignment."""
    from deepdoctor.kernels import adamw_8bit_triton

    def compiled() -> int:
        return len(adamw_8bit_triton._update.device_caches[torch.cuda.current_device()][0])

    state = advance(fresh(4096, DEVICE), range(1, 2), "triton")
    before = compiled()
    for step, rate in ((2, 1e-3), (3, 0.0), (4, 1.0), (10_000, 1e-2)):
        adamw_8bit(**state, step=step, **{**SETTINGS, "learning_rate": rate}, impl="triton")
    advance(fresh(16 * BLOCK + 1, DEVICE), range(1, 2), "triton")
    views = {name: value[1:] for name, value in fresh(4097, DEVICE).items()}
    adamw_8bit(**views, step=1, **SETTINGS, impl="triton")
    assert compiled() == before


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    """The last blocks of more than 2**31 elements are updated as they are alone."""
    n = 2**31 + 3 * BLOCK
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    state = {
        name: torch.zeros(n // BLOCK if "absmax" in name else n, dtype=value.dtype, device="cuda")
        for name, value in fresh(1).items()
    }
    last = 2 * BLOCK
    alone = fresh(last, DEVICE)
    alone["gradient"].copy_(some_gradient(last, 1))
    state["parameter"][-last:], state["gradient"][-last:] = alone["parameter"], alone["gradient"]
    for side in (state, alone):
        adamw_8bit(**side, step=1, **SETTINGS, impl="triton")
    for name, value in alone.items():
        assert torch.equal(state[name][-value.numel() :], value), name


@pytest.mark.gpu
def test_five_steps_equal_bitsandbytes_on_cuda() -> None:
    """Where no code differs, parameters agree to a thousandth of a step; with -s, how many codes differ and how.

    bitsandbytes takes 1 - beta in fp32 and divides approximately, so codes near a tie differ; and its first moments
    that are just below zero keep their sign.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    n, rate = 1_000_000, 2e-4
    settings = {**SETTINGS, "learning_rate": rate, "weight_decay": 0.01}
    mine = fresh(n, DEVICE)
    theirs = torch.nn.Parameter(mine["parameter"].clone())
    optimizer = bitsandbytes.optim.AdamW8bit([theirs], rate, (0.9, 0.999), 1e-8, 0.01)
    draw = torch.Generator().manual_seed(1)
    differ = torch.zeros(n, dtype=torch.bool, device="cuda")
    for step in range(1, 6):
        gradient = torch.randn(n, generator=draw) * 1e-3
        mine["gradient"].copy_(gradient)
        theirs.grad = mine["gradient"].clone()
        adamw_8bit(**mine, step=step, **settings, impl="triton")
        optimizer.step()
        state = optimizer.state[theirs]
        signs = (mine["state1"] == 127) & (state["state1"] == 126)
        off = [(mine[name].int() - state[name].int()).abs() for name in NAMES[2:4]]
        print(
            f"\nstep {step}: codes that differ {[int((o > 0).sum()) for o in off]}, by sign alone {int(signs.sum())}, "
            f"by at most {[int(o.max()) for o in off]}",
            end="",
        )
        differ |= (off[0] > 0) | (off[1] > 0)
        for name in NAMES[4:]:
            torch.testing.assert_close(mine[name], state[name], rtol=1e-3, atol=0)
    assert differ.float().mean() < 0.05
    apart = (mine["parameter"] - theirs.detach())[~differ].abs()
    print(f"\nparameters apart by at most {float(apart.max()):.2e} at rate {rate}", end="")
    assert (apart <= 1e-3 * 5 * rate + 3e-7 * theirs.detach()[~differ].abs()).all()


@pytest.mark.gpu
def test_time_of_an_adapter() -> None:
    """One launch for 42 million elements; with -s, the time and the bandwidth of 16 bytes an element."""
    state = fresh(ADAPTER, DEVICE)
    state["gradient"].normal_(std=1e-3)
    step = 0

    def once() -> None:
        nonlocal step
        step += 1
        adamw_8bit(**state, step=step, **SETTINGS)

    for _ in range(3):
        once()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)
    begin.record()
    for _ in range(20):
        once()
    end.record()
    end.synchronize()
    milliseconds = begin.elapsed_time(end) / 20
    print(f"\n{ADAPTER:,} elements: {milliseconds:.3f} ms, {16 * ADAPTER / milliseconds / 1e9:.2f} TB/s", end="")
    assert torch.isfinite(state["parameter"]).all()
