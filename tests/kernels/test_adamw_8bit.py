"""8-bit AdamW against PyTorch's AdamW in float64 and against bitsandbytes, and its corners."""

import logging

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.adamw_8bit import (
    BLOCK,
    CHUNK_ELEMENTS,
    adamw_8bit,
    adamw_fp32,
    code_values,
    dynamic_map_unsigned,
    search_tables,
)
from deepdoctor.kernels.nf4 import dynamic_map
from helpers_numeric import assert_no_less_accurate
from helpers_triton import DEVICE, INTERPRETED

CPU = torch.device("cpu")
SIZES = [1, 255, 256, 4096, 5 * BLOCK + 37]
SETTINGS = {"learning_rate": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
NAMES = ("parameter", "gradient", "state1", "state2", "absmax1", "absmax2")


def device_of(impl: str) -> torch.device:
    """Where tensors of a test lie: the reference is tested on a CPU."""
    return DEVICE if impl == "triton" else CPU


def fresh(n: int, device: torch.device = CPU, seed: int = 0) -> dict[str, Tensor]:
    """Arguments before the first step; the parameter is normal."""
    parameter = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(device)
    codes = [torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2)]
    largest = [torch.zeros(-(-n // BLOCK), device=device) for _ in range(2)]
    return dict(zip(NAMES, (parameter, torch.zeros_like(parameter), *codes, *largest), strict=True))


def some_gradient(n: int, seed: int) -> Tensor:
    """Normal numbers of sizes that differ by six decades."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=draw) * 10.0 ** torch.randint(-6, 1, (n,), generator=draw)


def advance(state: dict[str, Tensor], steps: range, impl: str = "torch") -> dict[str, Tensor]:
    """Take the steps, each with a gradient that follows from its number; return the state."""
    for step in steps:
        state["gradient"].copy_(some_gradient(state["parameter"].numel(), step))
        adamw_8bit(**state, step=step, **SETTINGS, impl=impl)
    return state


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors again."""
    return {name: value.clone() for name, value in state.items()}


def moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the codes stand for, fp32 on CPU."""
    n = state["state1"].numel()
    return tuple(
        code[state[f"state{i}"].cpu().long()] * state[f"absmax{i}"].cpu().repeat_interleave(BLOCK)[:n]
        for i, code in zip((1, 2), code_values(CPU), strict=True)
    )


def adamw(state: dict[str, Tensor], step: int, dtype: torch.dtype) -> list[Tensor]:
    """PyTorch's AdamW from the same state: parameter and both moments after the step."""
    parameter = torch.nn.Parameter(state["parameter"].to("cpu", dtype, copy=True))
    parameter.grad = state["gradient"].to("cpu", dtype, copy=True)
    names = {"lr": "learning_rate"}
    options = {name: SETTINGS[names.get(name, name)] for name in ("lr", "betas", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW([parameter], **options, foreach=False, fused=False)
    exp_avg, exp_avg_sq = (value.to(dtype) for value in moments(state))
    optimizer.state[parameter] = {"step": torch.tensor(step - 1.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optimizer.step()
    return [parameter.detach(), exp_avg, exp_avg_sq]


def check_truth(impl: str, n: int) -> None:
    """A step from a used state: parameter and absmax as exact as PyTorch's in fp32, and no code lies nearer."""
    state = advance(fresh(n), range(1, 5))
    state["gradient"].copy_(some_gradient(n, 5))
    truth, reference = adamw(state, 5, torch.float64), adamw(state, 5, torch.float32)
    state = {name: value.to(device_of(impl)) for name, value in state.items()}
    adamw_8bit(**state, step=5, **SETTINGS, impl=impl)
    state = {name: value.cpu() for name, value in state.items()}
    assert_no_less_accurate(state["parameter"], reference[0], truth[0])
    for i, code in zip((1, 2), code_values(CPU), strict=True):
        padding = (0, -n % BLOCK)
        exact, plain = (
            torch.nn.functional.pad(values[i].abs(), padding).view(-1, BLOCK).amax(1) for values in (truth, reference)
        )
        assert_no_less_accurate(state[f"absmax{i}"], plain, exact)
        scaled = truth[i] / exact.repeat_interleave(BLOCK)[:n]
        error = (code.double()[state[f"state{i}"].long()] - scaled).abs()
        assert (error <= (code.double() - scaled.unsqueeze(1)).abs().amin(1) + 1e-6).all()


def check_zeros(impl: str) -> None:
    """A block without gradients keeps absmax 0 and only decays; later it starts as a fresh one."""
    state = fresh(3 * BLOCK - 5, device_of(impl))
    state["gradient"].copy_(some_gradient(3 * BLOCK - 5, 0))
    still = slice(BLOCK, 2 * BLOCK)
    state["gradient"][still] = 0
    before = state["parameter"].clone()
    adamw_8bit(**state, step=1, **SETTINGS, impl=impl)
    assert torch.equal(state["parameter"][still], before[still] * (1 - 1e-2 * 0.1))
    for i in (1, 2):
        assert float(state[f"absmax{i}"][1]) == 0
        assert torch.isfinite(state[f"absmax{i}"]).all()
    assert all((values[still] == 0).all() for values in moments(state))
    state["gradient"].fill_(0.5)
    adamw_8bit(**state, step=2, **SETTINGS, impl=impl)
    torch.testing.assert_close(state["absmax1"][1].item(), 0.05, rtol=1e-6, atol=0)
    torch.testing.assert_close(state["absmax2"][1].item(), 0.00025, rtol=1e-6, atol=0)


def check_not_finite(impl: str) -> None:
    """Elements whose square is not finite stay, their moments are zero, and nothing else changes."""
    n = 2 * BLOCK + 9
    state = advance(fresh(n, device_of(impl)), range(1, 4), impl)
    expected = copied(state)
    at = torch.tensor([3, 40, 300, n - 1], device=device_of(impl))
    gradient = some_gradient(n, 4).to(at.device)
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30], device=at.device)
    zero = [int(torch.bucketize(0.0, (code[:-1] + code[1:]) / 2)) for code in code_values(CPU)]
    for side, fill in ((state, values), (expected, torch.zeros_like(values))):
        side["gradient"].copy_(gradient.index_put((at,), fill))
        # Moments that are zero before, so that the other side's stay zero.
        for i in (1, 2):
            side[f"state{i}"][at] = zero[i - 1]
        adamw_8bit(**side, step=4, **SETTINGS, impl=impl)
    moved = expected["parameter"].index_copy(0, at, state["parameter"][at])
    assert torch.equal(state["parameter"], moved)
    torch.testing.assert_close(expected["parameter"][at], state["parameter"][at] * (1 - 1e-2 * 0.1))
    for name in NAMES[2:]:
        assert torch.equal(state[name], expected[name]), name


def check_parts(impl: str) -> None:
    """Whole blocks may be updated apart: views that start in the middle of a tensor give the same bits."""
    n, cut = 6 * BLOCK + 11, 3 * BLOCK
    whole = advance(fresh(n, device_of(impl)), range(1, 3), impl)
    parts = copied(whole)
    whole["gradient"].copy_(some_gradient(n, 3))
    parts["gradient"].copy_(whole["gradient"])
    adamw_8bit(**whole, step=3, **SETTINGS, impl=impl)
    for part in (slice(cut), slice(cut, None)):
        blocks = slice(part.start and part.start // BLOCK, part.stop and part.stop // BLOCK)
        views = {name: value[blocks if "absmax" in name else part] for name, value in parts.items()}
        adamw_8bit(**views, step=3, **SETTINGS, impl=impl)
    # The root of a CPU depends on where vectors begin, in its last bit.
    torch.testing.assert_close(whole["parameter"], parts["parameter"], rtol=3e-7, atol=1e-9)
    for name in NAMES[2:]:
        assert torch.equal(whole[name], parts[name]), name


@pytest.mark.parametrize("n", SIZES)
def test_one_step_is_no_less_accurate_than_fp32(n: int) -> None:
    """Parameter, absmax and codes against float64."""
    check_truth("torch", n)


def test_a_block_of_zeros() -> None:
    """No nan, no division by zero."""
    check_zeros("torch")


def test_a_gradient_that_is_not_finite() -> None:
    """Skipped element by element."""
    check_not_finite("torch")


def test_blocks_are_independent() -> None:
    """In one call or in two, and in chunks."""
    check_parts("torch")


def test_chunks_give_the_bits_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of several chunks and a tail is updated as in one chunk."""
    whole = advance(fresh(5 * BLOCK + 37), range(1, 3))
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 2 * BLOCK)
    chunked = advance(fresh(5 * BLOCK + 37), range(1, 3))
    for name in NAMES:
        assert torch.equal(whole[name], chunked[name]), name


@pytest.mark.parametrize("which", [0, 1])
def test_the_nearest_code_is_found(which: int) -> None:
    """Look-up and comparison count the middles below x, as a search does, on and beside each middle."""
    code = code_values(CPU)[which]
    table, middles = search_tables(CPU)[which]
    assert torch.equal(middles, (code[:-1] + code[1:]) / 2)
    draw = torch.Generator().manual_seed(0)
    beside = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-9.0, 9.0)]
    corners = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 1.0000001, -1.0000001])
    spread = torch.randn(100_000, generator=draw) * 10.0 ** -torch.randint(0, 10, (100_000,), generator=draw)
    x = torch.cat([middles, *beside, code, corners, spread])
    below = table[(x.view(torch.int32) >> 16).long() + 32768].long()
    assert torch.equal(below + (x > middles[below]).long(), torch.bucketize(x, middles))


def test_the_values_of_codes_equal_bitsandbytes() -> None:
    """Both maps, bit for bit."""
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(dynamic_map(), functional.create_dynamic_map(signed=True))
    assert torch.equal(dynamic_map_unsigned(), functional.create_dynamic_map(signed=False))


@pytest.mark.parametrize("n", [4096, 6400, 5 * 4096 + 37])
def test_five_steps_equal_bitsandbytes(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters to 1e-6 and codes but for near-ties, of bitsandbytes' CPU code with codes that are the nearest.

    Its own come from a grid of 65,536 points, which makes zeros of values below 1.5e-5 absmax.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ops = pytest.importorskip("bitsandbytes.backends.cpu.ops")
    if not hasattr(ops, "_quant_blockwise_fp32_direct"):
        pytest.skip("this release of bitsandbytes has no 8-bit AdamW on a CPU like that of 0.50")

    def nearest(values: Tensor, code: Tensor, absmax: Tensor, codes: Tensor, size: int) -> None:
        blocks = torch.nn.functional.pad(values, (0, -values.numel() % size)).view(-1, size)
        absmax.copy_(blocks.abs().amax(1))
        scaled = blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(1)
        codes.copy_(torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).view(-1)[: values.numel()])

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", nearest)
    mine = fresh(n)
    theirs = torch.nn.Parameter(mine["parameter"].clone())
    optimizer = bitsandbytes.optim.AdamW8bit([theirs], 1e-2, (0.9, 0.999), 1e-8, 0.1)
    differ = torch.zeros(n, dtype=torch.bool)
    for step in range(1, 6):
        mine = advance(mine, range(step, step + 1))
        theirs.grad = mine["gradient"].clone()
        optimizer.step()
        state = optimizer.state[theirs]
        for name in NAMES[4:]:
            torch.testing.assert_close(mine[name], state[name], rtol=1e-6, atol=1e-37)
        for name in NAMES[2:4]:
            steps_off = (mine[name].int() - state[name].int()).abs()
            assert steps_off.max() <= 1
            differ |= steps_off > 0
    assert differ.sum() <= 1e-3 * n, f"{int(differ.sum())} of {n} codes differ"
    # Single steps reach 0.3, parameters of size 1 pass zero.
    torch.testing.assert_close(mine["parameter"][~differ], theirs.detach()[~differ], rtol=1e-6, atol=5e-7)


def test_a_first_step_equals_bitsandbytes_as_it_is() -> None:
    """Before any code is read, parameter and absmax are its own, and our codes read back no worse."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    mine = fresh(6400)
    theirs = torch.nn.Parameter(mine["parameter"].clone())
    mine = advance(mine, range(1, 2))
    theirs.grad = mine["gradient"].clone()
    optimizer = bitsandbytes.optim.AdamW8bit([theirs], 1e-2, (0.9, 0.999), 1e-8, 0.1)
    optimizer.step()
    torch.testing.assert_close(mine["parameter"], theirs.detach(), rtol=1e-6, atol=1e-8)
    exact = 0.1 * mine["gradient"], 0.001 * mine["gradient"].square()
    for ours, other, truth in zip(moments(mine), moments(optimizer.state[theirs]), exact, strict=True):
        assert (ours - truth).abs().sum() <= (other - truth).abs().sum() * (1 + 1e-5)


def test_fp32_moments_are_pytorchs_adamw() -> None:
    """Ten steps of the update for small tensors end where PyTorch's plain AdamW ends."""
    mine = torch.randn(33, 7, generator=torch.Generator().manual_seed(1))
    theirs = torch.nn.Parameter(mine.clone())
    optimizer = torch.optim.AdamW([theirs], 1e-2, (0.9, 0.999), 1e-8, 0.1, foreach=False, fused=False)
    m, v = torch.zeros_like(mine), torch.zeros_like(mine)
    for step in range(1, 11):
        theirs.grad = torch.randn(33, 7, generator=torch.Generator().manual_seed(step))
        adamw_fp32(mine, theirs.grad, m, v, step=step, **SETTINGS)
        optimizer.step()
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-7)


WRONG = {
    "dtype": lambda state: state.update(gradient=state["gradient"].half()),
    "size": lambda state: state.update(state1=state["state1"][1:]),
    "blocks": lambda state: state.update(absmax2=torch.zeros(3)),
    "codes": lambda state: state.update(state2=state["state2"].int()),
    "strides": lambda state: state.update(gradient=torch.zeros(1024)[::2]),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named(what: str) -> None:
    """dtype, size and layout are checked before anything is written."""
    state = fresh(512)
    WRONG[what](state)
    with pytest.raises(KernelInputError, match=r"adamw_8bit: .* expected"):
        adamw_8bit(**state, step=1, **SETTINGS)


def test_steps_are_counted_from_one() -> None:
    """Step 0 has no bias correction."""
    with pytest.raises(KernelInputError, match="step is 0, expected 1"):
        adamw_8bit(**fresh(512), step=0, **SETTINGS)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes CPU tensors")
def test_triton_refuses_a_cpu_tensor() -> None:
    """impl="triton" says why it cannot run."""
    with pytest.raises(KernelInputError, match="impl is 'triton'"):
        adamw_8bit(**fresh(512), step=1, **SETTINGS, impl="triton")
