"""SwiGLU with its thin products in Triton: the checks of its reference, every tiling, and what it saves on a GPU."""

from collections.abc import Callable

import pytest
import torch
from test_rms_norm import draw
from test_swiglu import DTYPES
from test_swiglu_lora import RANKS, SHAPES, check, make

from deepdoctor.kernels.swiglu import swiglu_backward_, swiglu_forward
from deepdoctor.kernels.swiglu_lora import swiglu_lora_backward_, swiglu_lora_forward
from helpers_numeric import assert_no_less_accurate
from helpers_triton import DEVICE, needs_triton

pytestmark = needs_triton

# The interpreter multiplies the bit patterns of bf16.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
EVERY = [dtype for dtype in DTYPES if dtype != torch.bfloat16 or dtype == HALF]

# rows, block, stages, warps, spans
TILINGS = [
    (16, 128, 3, 4, 4),
    (16, 128, 3, 4, 1),
    (16, 128, 3, 8, 4),
    (16, 64, 4, 4, 4),
    (16, 256, 2, 8, 4),
    (32, 64, 3, 4, 4),
    (32, 64, 3, 8, 7),
    (64, 64, 3, 8, 7),
    (16, 64, 1, 4, 8),
    (32, 64, 1, 8, 8),
    (16, 128, 1, 8, 8),
]


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_against_swiglu_and_float64_triton(shape, ranks, dtype) -> None:
    """Adapters on all, some and one of the three projections, for rows with gaps, aligned to 16 bytes and not."""
    for gap in (0, 3, 16):
        check("triton", shape, ranks, dtype, gap)


@pytest.mark.parametrize("dtype", EVERY[1:])
@pytest.mark.parametrize("width", [512, 768, 1300])
def test_several_spans(width, dtype) -> None:
    """Columns in two and more spans, whole ones and a last one that is cut; a rank that is padded further."""
    check("triton", (17, width), (16, 16, 16), dtype)
    check("triton", (3, width), (30, 5, 2), dtype, gap=3)


def test_a_rank_too_wide() -> None:
    """More columns than the kernel takes run as two passes."""
    check("triton", (5, 48), (40, 40, 40), HALF)


@pytest.mark.parametrize("tiling", TILINGS)
def test_tilings(tiling) -> None:
    """Every tiling gives the stored values, and sums no less exact, as the default one."""
    from deepdoctor.kernels import swiglu_lora_triton as kernels

    chosen = kernels.Tiling(*tiling)
    case = make(DEVICE, (33, 1024), (16, 16, 16), HALF)
    act, u = case.given["act"], case.given["u"]
    kernels.forward(case.x, case.a, act, u, chosen)
    expected = swiglu_forward(case.x, impl="triton")
    assert torch.equal(act, expected)
    first = u.clone()
    assert_no_less_accurate(u, expected @ case.a.T, expected.double() @ case.a.T.double())
    gate_up, v = case.halves()
    case.act.fill_(torch.nan)
    kernels.backward(gate_up, case.d_act, case.b_gate, case.b_up, v, act, case.a, u, chosen)
    halves = swiglu_backward_(case.x.clone(), case.d_act, impl="triton").chunk(2, 1)
    assert torch.equal(gate_up, torch.cat(halves, 1)) and torch.equal(act, expected) and torch.equal(u, first)
    for half, b, got in zip(halves, (case.b_gate, case.b_up), v.chunk(2, 1), strict=True):
        assert_no_less_accurate(got, half @ b, half.double() @ b.double())


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    """Rows of a buffer of more than 2**31 elements are found."""
    rows, stride, width = 75_000, 28_704, 64
    buffer = torch.empty(rows, stride, dtype=torch.float16, device="cuda")
    small = make(DEVICE, (rows, width), (16, 16, 16), torch.float16)
    x, v, act, u = (buffer[:, at : at + size] for at, size in ((0, 128), (128, 32), (512, 64), (576, 16)))
    d_act = buffer[:, 1024 : 1024 + width]
    x.copy_(small.x)
    d_act.copy_(small.d_act)
    swiglu_lora_forward(small.x, **small.given, impl="triton")
    swiglu_lora_forward(x, small.a, act=act, u=u, impl="triton")
    assert torch.equal(act, small.given["act"]) and torch.equal(u, small.given["u"])
    gate_up, small_v = small.halves()
    swiglu_lora_backward_(gate_up, small.d_act, small.b_gate, small.b_up, v=small_v, impl="triton")
    swiglu_lora_backward_(x, d_act, small.b_gate, small.b_up, v=v, act=act, a=small.a, u=u, impl="triton")
    assert torch.equal(x, gate_up) and torch.equal(v, small_v)
    assert torch.equal(act, small.given["act"]) and torch.equal(u, small.given["u"])


def milliseconds(run: Callable[[], object], restore: Callable[[], object], repeats: int = 20) -> float:
    """Median time on the GPU; ``restore`` runs before each, so that the host is ahead and no cache helps."""
    taken = []
    for _ in range(repeats + 3):
        restore()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        taken.append((begin, end))
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in taken[3:])
    return times[len(times) // 2]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5632, 2048])
def test_times(rows) -> None:
    """What one pass takes against two, at the 8B shape in the engine's strides; prints a table (-s), asserts bits."""
    from deepdoctor.kernels import swiglu_lora_triton as kernels

    hidden, wide, rank = 4096, 14336, 16

    def normal(*shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    down, matrix = normal(hidden + rank, wide + rank, seed=0), normal(2 * wide + 32, hidden + 32, seed=1)
    a, b_gate, b_up = down[hidden:, :wide], matrix[:wide, hidden:-16], matrix[wide:-32, -16:]
    matrix[:wide, -16:] = matrix[wide:-32, hidden:-16] = 0
    border = matrix[: 2 * wide, hidden:]
    kept, d_act = normal(rows, 2 * wide + 32, seed=2), normal(rows, wide, seed=3)
    gu, activated = kept.clone(), torch.empty(rows, wide + rank, device="cuda", dtype=torch.bfloat16)
    x, v, act, u = gu[:, : 2 * wide], gu[:, 2 * wide :], activated[:, :wide], activated[:, wide:]

    def restore() -> None:
        gu.copy_(kept)

    def two_passes(keep: bool) -> None:
        swiglu_backward_(x, d_act, act=None if keep else act)
        if not keep:
            torch.mm(act, a.T, out=u)
        torch.mm(x, border, out=v)

    def two_passes_forward() -> None:
        swiglu_forward(x, out=act)
        torch.mm(act, a.T, out=u)

    def line(name: str, *times: float) -> None:
        moved = [rows * wide * 2 * count / 1e9 for count in (3, 5, 6)]
        print(f"{name:34}", *(f"{t:7.3f} ms {m / t:5.2f} TB/s" for t, m in zip(times, moved, strict=True)))

    print(f"\n{rows} rows, 14336 wide            forward            backward (keep)    backward (act, u)")
    alone = (lambda: swiglu_forward(x, out=act), lambda: swiglu_backward_(x, d_act), lambda: swiglu_backward_(
        x, d_act, act=act))  # fmt: skip
    line("SwiGLU alone", *(milliseconds(run, restore) for run in alone))
    both = (two_passes_forward, lambda: two_passes(True), lambda: two_passes(False))
    line("SwiGLU and torch.mm", *(milliseconds(run, restore) for run in both))
    restore()
    two_passes_forward()
    expected_act, expected_u = act.clone(), u.clone()
    two_passes(True)
    expected, forward_u = gu.clone(), expected_u
    for tiling in TILINGS:
        chosen = kernels.Tiling(*tiling)
        runs = (
            lambda chosen=chosen: kernels.forward(x, a, act, u, chosen),
            lambda chosen=chosen: kernels.backward(x, d_act, b_gate, b_up, v, None, None, None, chosen),
            lambda chosen=chosen: kernels.backward(x, d_act, b_gate, b_up, v, act, a, u, chosen),
        )
        times = []
        for number, run in enumerate(runs):
            restore()
            activated.fill_(torch.nan)
            run()
            if number != 1:
                assert torch.equal(act, expected_act)
                if number == 2:
                    assert torch.equal(u, forward_u)
                forward_u = u.clone()
                assert_no_less_accurate(u, expected_u, expected_act.double() @ a.T.double())
            if number:
                assert torch.equal(x, expected[:, : 2 * wide])
                truth = expected[:, : 2 * wide].double() @ border.double()
                assert_no_less_accurate(v, expected[:, 2 * wide :], truth)
            times.append(milliseconds(run, restore))
        line("rows {} block {} stages {} warps {} spans {}".format(*tiling), *times)


def test_the_default_tilings_agree() -> None:
    """u of backward is u of forward bit for bit only where both have the same spans."""
    from deepdoctor.kernels import swiglu_lora_triton as kernels

    assert kernels.FORWARD.spans == kernels.BACKWARD.spans == kernels.SPANS
    x, a = draw(5, 2048, dtype=HALF).to(DEVICE), draw(16, 1024, dtype=HALF, seed=1).to(DEVICE)
    given = {name: torch.empty(5, size, device=DEVICE, dtype=HALF) for name, size in (("act", 1024), ("u", 16))}
    swiglu_lora_forward(x, a, **given, impl="triton")
    u = given["u"].clone()
    v = given["act"][:, :0]
    swiglu_lora_backward_(x, given["act"].clone(), None, None, v=v, a=a, **given, impl="triton")
    assert torch.equal(given["u"], u)
