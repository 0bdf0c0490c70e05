"""The Triton conversions to e4m3 against the reference bit for bit, and on a GPU the products of a training step."""

import pytest
import torch
from test_fp8 import (
    DTYPES,
    E4M3,
    SHAPES,
    assert_rounded,
    check_convert,
    check_quantize,
    check_rows_of_note,
    empty,
    fp8_reference,
    quantized,
    rows_with_gap,
)
from torch import Tensor

from deepdoctor.kernels.fp8 import convert_rows, fp8_matmul, no_fp8_because, quantize_rows
from helpers_triton import DEVICE, INTERPRETED, needs_triton

TOKENS = 6144
PRODUCTS = {
    "qkv": (6144, 4096, 48),
    "o": (4096, 4096, 16),
    "gate_up": (28672, 4096, 32),
    "down": (4096, 14336, 16),
}
"""Output columns, input columns and adapter columns of an 8B Llama's products at rank 16."""

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
