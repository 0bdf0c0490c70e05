"""The Triton conversions to e4m3 against the reference bit for bit, and on a GPU the products of a training step."""

import itertools

import pytest
import torch
from test_fp8 import (
    BORDERS,
    DTYPES,
    E4M3,
    LORA_SHAPES,
    SHAPES,
    assert_rounded,
    check_border,
    check_convert,
    check_lora,
    check_quantize,
    check_rows_of_note,
    empty,
    fp8_reference,
    make_border,
    make_lora,
    quantized,
    rows_with_gap,
)
from torch import Tensor

from deepdoctor.kernels.fp8 import (
    convert_rows,
    fp8_matmul,
    no_fp8_because,
    quantize_rows,
    quantize_rows_lora,
    write_fp8_borders,
)
from helpers_numeric import assert_no_less_accurate
from helpers_triton import DEVICE, INTERPRETED, needs_triton

TOKENS = 6144
PRODUCTS = {
    "qkv": (6144, 4096, 48),
    "o": (4096, 4096, 16),
    "gate_up": (28672, 4096, 32),
    "down": (4096, 14336, 16),
}
"""Output columns, input columns and adapter columns of an 8B Llama's products at rank 16."""

# Columns, columns of the adapters, and whether A is given by rank: an 8B Llama's rows that are quantised with u or v.
THIN = {
    "qkv": (4096, 48, True),
    "o": (4096, 16, True),
    "gate_up": (4096, 32, True),
    "down and o backward": (4096, 16, False),
    "qkv backward": (6144, 48, False),
}
# rows, block, stages, wide, warps
TILINGS = [
    (16, 256, 3, 512, 4),
    (16, 128, 3, 512, 4),
    (16, 128, 4, 1024, 4),
    (16, 256, 3, 256, 2),
    (16, 128, 4, 256, 2),
    (16, 256, 3, 1024, 8),
    (16, 512, 2, 1024, 8),
    (32, 128, 3, 512, 8),
    (32, 128, 3, 256, 4),
]
# The interpreter multiplies the bit patterns of bf16.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
CARD_CAN = DEVICE.type != "cuda" or no_fp8_because(DEVICE) is None
pytestmark = [needs_triton, pytest.mark.skipif(not CARD_CAN, reason="no fp8 arithmetic here")]
rounds_right = pytest.mark.skipif(
    INTERPRETED and DEVICE.type == "cpu",
    reason="Triton's interpreter halves values that round up to a power of two",
)


@rounds_right
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2049), (2, 28704)])
def test_functional_forms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What the reference is held to, for rows with gaps, aligned to 16 bytes and not."""
    for gap in (0, 3, 16):
        check_quantize("triton", shape, dtype, gap)
    check_convert("triton", shape, dtype)


@rounds_right
def test_rows_of_note_triton() -> None:
    """Zeros, tiny rows, nan and inf."""
    check_rows_of_note("triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 28704)])
def test_bits_of_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Scales and values are the reference's bits, for contiguous rows and from a column slice."""
    x = rows_with_gap(*shape, dtype, 16)
    (mine, scale), (theirs, expected) = empty(*shape), empty(*shape)
    quantize_rows(x, mine, scale, impl="triton")
    quantize_rows(x, theirs, expected, impl="torch")
    assert torch.equal(scale, expected)
    assert_same_bits(mine, theirs, x / expected)
    convert_rows(x.T, scale.new_full((shape[1],), 0.25), empty(*shape[::-1])[0], impl="triton")
    convert_rows(x, expected, mine, factor=0.3, impl="triton")
    convert_rows(x, expected, theirs, factor=0.3, impl="torch")
    assert_same_bits(mine, theirs, x * 0.3 / expected)


def assert_same_bits(mine: Tensor, theirs: Tensor, scaled: Tensor) -> None:
    """Equal but for ties, which Ada rounds twice and Triton's interpreter up; scaled: the values before rounding.

    The interpreter also halves powers of two and cuts subnormal numbers off.
    """
    differ = mine.view(torch.uint8) != theirs.view(torch.uint8)
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE)[0] >= 9:
        assert not differ.any()
        return
    if DEVICE.type == "cpu":
        differ &= (torch.frexp(theirs.float().abs()).mantissa != 0.5) & (theirs.float().abs() >= 2**-6)
    error, other = ((values.float() - scaled.float()).abs() for values in (mine, theirs))
    assert not (differ & ((error - other).abs() > 1e-3 * scaled.float().abs())).any()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.bfloat16 or dtype == HALF])
@pytest.mark.parametrize("shape", LORA_SHAPES)
def test_lora_bits(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Values are the reference's for the row with this u, for rows with gaps, aligned to 16 bytes and not."""
    for gap, by_rank in ((0, True), (0, False), (3, True), (16, False)):
        x, values, scale = check_lora("triton", shape, dtype, gap, by_rank)
        expected = empty(*x.shape)
        quantize_rows(x, *expected, impl="torch")
        assert_same_bits(values, expected[0], x / scale)


@pytest.mark.parametrize("tiling", TILINGS)
def test_lora_tilings(tiling: tuple[int, ...]) -> None:
    """Every tiling gives scales and values of its u, and a u no less exact."""
    from deepdoctor.kernels import fp8_triton as kernels

    for shape in ((35, 1024, 16), (3, 1104, 48)):
        x, a = make_lora(shape, HALF, 16, False)
        (values, scale), expected = empty(*x.shape), empty(*x.shape)
        kernels.quantize_lora(x, a, values, scale, kernels.ThinTiling(*tiling))
        w = x[:, : shape[1]]
        assert_no_less_accurate(x[:, shape[1] :], w @ a, w.double() @ a.double())
        quantize_rows(x, *expected, impl="torch")
        assert torch.equal(scale, expected[1])
        assert_same_bits(values, expected[0], x / scale)


def test_lora_rows_are_their_own() -> None:
    """A row has the same bits whatever the rows beside it, so that every chunk gives the same gradient."""
    shape = (37, 608, 32)
    whole, a = make_lora(shape, HALF, 0, True)
    values, scale = empty(*whole.shape)
    alone = whole[20:23].clone()
    quantize_rows_lora(whole, a, values, scale, impl="triton")
    other, other_scale = empty(*alone.shape)
    quantize_rows_lora(alone, a, other, other_scale, impl="triton")
    assert torch.equal(alone, whole[20:23]) and torch.equal(other_scale, scale[20:23])
    assert torch.equal(other.view(torch.uint8), values[20:23].view(torch.uint8))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_lora_hides_no_nan() -> None:
    """A nan or inf in a row makes its product not finite, and no other."""
    x, a = make_lora((5, 64, 16), HALF, 0, True)
    x[1, 7], x[3, 9] = torch.nan, torch.inf
    values, scale = empty(*x.shape)
    quantize_rows_lora(x, a, values, scale, impl="triton")
    product = fp8_reference(values, scale, *quantized(torch.ones(16, 80, device=DEVICE)))
    assert product.isfinite().all(1).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("case", BORDERS)
def test_border_bits(case: tuple[tuple[int, ...], int, int, int]) -> None:
    """One launch writes the reference's bits; four projections are more than it takes."""
    border, into = check_border("triton", case)
    _, expected = make_border(*case)
    write_fp8_borders(border, **expected, impl="torch")
    b, a = into["b16"].float() / into["out_scales"].T, (border.a * border.scale).T / into["in_scales"].T
    used = border.a.shape[0]
    assert_same_bits(into["by_out"][:, border.inn :], expected["by_out"][:, border.inn :], b)
    columns = slice(border.out, border.out + used)
    assert_same_bits(into["by_in"][:, columns], expected["by_in"][:, columns], a)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    """Rows of a buffer of more than 2**31 elements are found."""
    rows, width = 75_000, 28_704
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    x[:, :64] = torch.randn(rows, 64, device="cuda")
    out = torch.empty(rows, width, dtype=E4M3, device="cuda")
    scale = torch.empty(rows, 1, device="cuda")
    quantize_rows(x[:, :64], out[:, :64], scale, impl="triton")
    assert_rounded(out[-9:, :64], scale[-9:], x[-9:, :64])
    convert_rows(x[:, :64], scale, out[:, 64:128], impl="triton")
    assert torch.equal(out[-9:, 64:128].view(torch.uint8), out[-9:, :64].view(torch.uint8))
    few, a = x[-9:, :80].clone(), torch.randn(64, 16, device="cuda", dtype=torch.bfloat16)
    values, few_scale = empty(9, 80)
    quantize_rows_lora(few, a, values, few_scale, impl="triton")
    quantize_rows_lora(x[:, :80], a, out[:, :80], scale, impl="triton")
    assert torch.equal(x[-9:, :80], few) and torch.equal(scale[-9:], few_scale)
    assert torch.equal(out[-9:, :80].view(torch.uint8), values.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_a_step(name: str) -> None:
    """Forward and backward at the 8B shapes; with -s, times, rates and what the short accumulators lose.

    Sums of 28,672 products in 14 bits may be off by a few hundredths; rounding x and w costs 0.037.
    """
    out_columns, in_columns, rank = PRODUCTS[name]
    draw = torch.Generator("cuda").manual_seed(0)
    for direction, columns, width in (
        ("forward", out_columns, in_columns + rank),
        ("dx", in_columns, out_columns + rank),
    ):
        x = torch.randn(TOKENS, width, generator=draw, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(columns, width, generator=draw, device="cuda", dtype=torch.bfloat16)
        values, scale = empty(TOKENS, width)
        weight, weight_scale = quantized(w)
        weight_scale = weight_scale.view(1, columns)
        # As in the engine: gate and up are written into rows that leave room for v.
        buffer = torch.empty(TOKENS, columns + rank, dtype=torch.bfloat16, device="cuda")
        out = (
            buffer[:, :columns]
            if (name, direction) == ("gate_up", "forward")
            else buffer.view(-1)[: TOKENS * columns].view(TOKENS, columns)
        )
        quantize_rows(x, values, scale)
        fp8_matmul(values, scale, weight, weight_scale, out)
        some = slice(0, TOKENS, 512)
        truth = fp8_reference(values[some], scale[some], weight, weight_scale.view(-1, 1))
        error = float((out[some].double() - truth).norm() / truth.norm())
        assert error < 0.05
        assert (truth - x[some].double() @ w.double().T).norm() < 0.05 * truth.norm()
        quantise = _microseconds(lambda x=x, v=values, s=scale: quantize_rows(x, v, s))
        fp8 = _microseconds(lambda v=values, s=scale, w=weight, t=weight_scale, o=out: fp8_matmul(v, s, w, t, o))
        bf16 = _microseconds(lambda x=x, w=w, o=out: torch.mm(x, w.T, out=o))
        operations = 2 * TOKENS * columns * width
        print(
            f"\n{name} {direction} ({TOKENS}, {width}) x ({columns}, {width}): bf16 {bf16:.0f} us "
            f"{operations / bf16 / 1e6:.0f} TFLOP/s, fp8 {fp8:.0f} us {operations / fp8 / 1e6:.0f} TFLOP/s, quantise "
            f"{quantise:.0f} us {3 * TOKENS * width / quantise / 1e6:.2f} TB/s; sums off by {error:.2%}",
            end="",
        )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5248, 2048])
def test_times_of_lora(tokens: int) -> None:
    """With -s: microseconds of quantising with u or v, in two passes and in one, by tiling; asserts the bits."""
    from deepdoctor.kernels import fp8_triton as kernels

    draw = torch.Generator("cuda").manual_seed(0)
    table: dict[str, list[float]] = {}
    for width, rank, by_rank in THIN.values():
        shape = (tokens, width + rank)
        # In turns, so that the cache does not hold what comes next.
        xs = [torch.randn(shape, generator=draw, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        a = torch.randn(rank, width, generator=draw, device="cuda", dtype=torch.bfloat16) * width**-0.5
        a = a.T if by_rank else a.T.contiguous()
        (values, scale), expected = empty(*shape), empty(*shape)
        turns = itertools.cycle(xs)

        def thin(a: Tensor = a, turns=turns, width: int = width) -> Tensor:
            x = next(turns)
            torch.mm(x[:, :width], a, out=x[:, width:])
            return x

        def run(tiling: kernels.ThinTiling | None, a: Tensor = a, turns=turns, into=(values, scale)) -> None:
            kernels.quantize_lora(next(turns), a, *into, tiling)

        times = {
            "product alone": _microseconds(thin),
            "quantise alone": _microseconds(lambda v=values, s=scale, turns=turns: quantize_rows(next(turns), v, s)),
            "two passes": _microseconds(lambda v=values, s=scale, thin=thin: quantize_rows(thin(), v, s)),
            "default": _microseconds(lambda run=run: run(None)),
        }
        for tiling in TILINGS:
            chosen = kernels.ThinTiling(*tiling)
            times["rows {} block {} stages {} wide {} warps {}".format(*tiling)] = _microseconds(
                lambda run=run, chosen=chosen: run(chosen)
            )
            kernels.quantize_lora(xs[0], a, values, scale, chosen)
            quantize_rows(xs[0], *expected)
            assert torch.equal(scale, expected[1])
            assert torch.equal(values.view(torch.uint8), expected[0].view(torch.uint8))
        for name, taken in times.items():
            table.setdefault(name, []).append(taken)
    print(f"\n{tokens} rows, us: {', '.join(THIN)}")
    for name, row in table.items():
        print(f"{name:46}", *(f"{taken:7.1f}" for taken in row))


def _microseconds(call, repeats: int = 20) -> float:
    """Mean time of a call while the queue is full."""
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / repeats
