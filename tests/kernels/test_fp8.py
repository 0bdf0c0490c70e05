"""Row-wise e4m3: the stored values against the format's definition, products against float64, and what is refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.bordered_nf4 import Border
from deepdoctor.kernels.fp8 import (
    E4M3,
    convert_rows,
    fp8_matmul,
    no_fp8_because,
    quantize_rows,
    quantize_rows_lora,
    write_fp8_borders,
)
from helpers_numeric import assert_no_less_accurate
from helpers_triton import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 16), (5, 48), (3, 608), (17, 33), (2, 4144), (0, 64), (1, 16400)]
LORA_SHAPES = [
    (1, 64, 16),
    (5, 608, 32),
    (33, 256, 48),
    (17, 1040, 48),
    (3, 2304, 16),
    (2, 512, 80),
    (0, 64, 16),
    (4, 64, 0),
]
"""Rows, columns and columns of the adapters."""
BORDERS = [((96,), 64, 16, 16), ((64, 32, 32), 48, 16, 5), ((80, 80), 32, 48, 16), ((32,) * 4, 16, 16, 4)]
"""Heights of the projections, columns, columns of the border and rank."""
HALF_STEP = 2**-4
"""Largest error of a value in e4m3's normal range, relative."""
HALF_SUBNORMAL = 2**-10
"""Largest error below the normal range, in units of the row's scale."""


def empty(rows: int, width: int, gap: int = 0) -> tuple[Tensor, Tensor]:
    """Room for quantised rows with ``gap`` columns between them that hold zeros, and for their scales."""
    values = torch.zeros(rows, width + gap, dtype=torch.uint8, device=DEVICE).view(E4M3)
    return values[:, :width], torch.full((rows, 1), torch.nan, device=DEVICE)


def rows_with_gap(rows: int, width: int, dtype: torch.dtype, gap: int) -> Tensor:
    """Random rows of sizes from 1e-3 to 1e3, as a column slice of a wider buffer."""
    draw = torch.Generator().manual_seed(rows + width)
    size = 10 ** torch.linspace(-3, 3, rows).unsqueeze(1)
    return (torch.randn(rows, width + gap, generator=draw) * size).to(DEVICE, dtype)[:, :width]


def assert_rounded(values: Tensor, scale: Tensor, x: Tensor) -> None:
    """values * scale is x to half a step of e4m3, in either range of the format."""
    error = (values.double() * scale.double() - x.double()).abs()
    allowed = x.double().abs() * HALF_STEP + scale.double() * HALF_SUBNORMAL
    assert (error <= allowed * (1 + 1e-6)).all()


def check_quantize(impl: str, shape: tuple[int, int], dtype: torch.dtype, gap: int) -> None:
    """Scales are max|row| / 448, values are rounded to nearest, and what lies between the rows stays."""
    x = rows_with_gap(*shape, dtype, gap)
    values, scale = empty(*shape, gap)
    quantize_rows(x, values, scale, impl=impl)
    if not shape[0]:
        return
    torch.testing.assert_close(scale.squeeze(1), x.float().abs().amax(1) / 448, rtol=1e-6, atol=0)
    assert_rounded(values, scale, x)
    assert (values.float().abs().amax(1) == 448).all()
    assert not values._base.view(torch.uint8)[:, shape[1] :].any()


def check_convert(impl: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Under a given scale, from a transposed view; what is out of range is limited, and nan stays nan."""
    rows, width = shape
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(width, rows, generator=draw).to(DEVICE, dtype).T
    scale = torch.full((rows,), 1 / 64, device=DEVICE)
    values, _ = empty(rows, width, 16)
    convert_rows(x, scale, values, factor=0.5, impl=impl)
    assert_rounded(values, scale.unsqueeze(1), x.float() * 0.5)
    convert_rows(x, scale * 1e-4, values, impl=impl)
    assert (values.float().abs() <= 448).all()
    assert ((values.float().abs() == 448) | (x.float().abs() < 448 * 1e-4 / 64)).all()
    if width:
        x[:, 0] = torch.nan
        convert_rows(x, scale, values, impl=impl)
        assert values[:, 0].float().isnan().all()


def check_rows_of_note(impl: str) -> None:
    """Zeros give zeros; the smallest gradients keep their precision; a nan or inf is not hidden by its row's scale."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x[0], x[1] = 0, x[1] * 1e-24
    x[2, 7], x[3, 7] = torch.nan, -torch.inf
    values, scale = empty(5, 64)
    quantize_rows(x, values, scale, impl=impl)
    assert not values[0].float().any() and scale[0] > 0
    assert_rounded(values[[1, 4]], scale[[1, 4]], x[[1, 4]])
    product = fp8_reference(values, scale, *quantized(torch.ones(16, 64, device=DEVICE)))
    assert product.isfinite().all(1).tolist() == [True, True, False, False, True]


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in e4m3 by the reference, with its scales (T, 1)."""
    values, scale = empty(*x.shape)
    quantize_rows(x, values, scale, impl="torch")
    return values, scale


def fp8_reference(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The product of the stored numbers in float64."""
    return (values.double() * scale.double()) @ (weight.double() * weight_scale.double()).T


def make_lora(shape: tuple[int, int, int], dtype: torch.dtype, gap: int, by_rank: bool) -> tuple[Tensor, Tensor]:
    """Rows whose last columns hold nan still, and A (K, R), by rank or by column; u is the largest of some rows."""
    rows, width, rank = shape
    x = rows_with_gap(rows, width + rank, dtype, gap)
    x[:, width:] = torch.nan
    draw = torch.Generator().manual_seed(rank)
    a = (torch.randn(rank, width, generator=draw) * width**-0.5 * 4).to(DEVICE, dtype)
    return x, (a.T if by_rank else a.T.contiguous())


def check_lora(
    impl: str, shape: tuple[int, int, int], dtype: torch.dtype, gap: int, by_rank: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """u is as exact as a product's, scales are those of [x, u], nothing else is written; (x, values, scale)."""
    rows, width, rank = shape
    x, a = make_lora(shape, dtype, gap, by_rank)
    before = x._base.clone()
    values, scale = empty(rows, width + rank, gap)
    quantize_rows_lora(x, a, values, scale, impl=impl)
    w, u = x[:, :width], x[:, width:]
    assert_no_less_accurate(u, w @ a, w.double() @ a.double())
    assert torch.equal(x._base[:, :width], before[:, :width])
    assert torch.equal(x._base[:, width + rank :], before[:, width + rank :])
    assert not values._base.view(torch.uint8)[:, width + rank :].any()
    expected = empty(rows, width + rank)
    quantize_rows(x, *expected, impl="torch")
    assert torch.equal(scale, expected[1])
    return x, values, scale


@dataclass
class Block:
    """One B."""

    start: int
    rank_at: int
    weight: Tensor


def make_border(heights: tuple[int, ...], inn: int, columns: int, rank: int) -> tuple[Border, dict[str, Tensor]]:
    """Adapters on projections of these heights, some entries too large for their row, and an empty fp8 matrix."""
    draw = torch.Generator().manual_seed(inn)
    out, blocks = sum(heights), []
    for number, height in enumerate(heights):
        weight = torch.randn(height, rank, generator=draw).to(DEVICE)
        weight[0, 0] = 1e4
        blocks.append(Block(sum(heights[:number]), number * rank, weight))
    a = torch.randn(len(heights) * rank, inn, generator=draw).to(DEVICE)
    into = {
        "a16": torch.zeros(columns, inn, dtype=torch.float16, device=DEVICE),
        "b16": torch.zeros(out, columns, dtype=torch.float16, device=DEVICE),
        "by_out": empty(out, inn + columns)[0],
        "out_scales": (torch.rand(1, out, generator=draw) / 64 + 1e-3).to(DEVICE),
        "by_in": empty(inn, out + columns)[0],
        "in_scales": (torch.rand(1, inn, generator=draw) / 64 + 1e-3).to(DEVICE),
    }
    return Border(out, inn, columns, 1.7, a, blocks), into


def check_border(impl: str, case: tuple[tuple[int, ...], int, int, int]) -> tuple[Border, dict[str, Tensor]]:
    """The 16-bit copies are the rounded masters, and nothing is written beside the border."""
    border, into = make_border(*case)
    write_fp8_borders(border, **into, impl=impl)
    b = torch.zeros(border.out, border.rank, device=DEVICE)
    for block in border.blocks:
        height, rank = block.weight.shape
        b[block.start : block.start + height, block.rank_at : block.rank_at + rank] = block.weight
    used = border.a.shape[0]
    assert torch.equal(into["b16"], b.half())
    assert torch.equal(into["a16"][:used], (border.a * border.scale).half()) and not into["a16"][used:].any()
    for name, start, end in (
        ("by_out", border.inn, border.inn + border.rank),
        ("by_in", border.out, border.out + used),
    ):
        bits = into[name].view(torch.uint8)
        assert not bits[:, :start].any() and not bits[:, end:].any()
    return border, into


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LORA_SHAPES)
def test_quantize_rows_lora(shape, dtype) -> None:
    """The reference is the product and then the quantisation, bit for bit."""
    for gap, by_rank in ((0, True), (0, False), (3, True), (16, False)):
        x, values, _ = check_lora("torch", shape, dtype, gap, by_rank)
        again, a = make_lora(shape, dtype, gap, by_rank)
        torch.mm(again[:, : shape[1]], a, out=again[:, shape[1] :])
        expected, scale = empty(*x.shape)
        quantize_rows(again, expected, scale)
        assert torch.equal(x, again) and torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("case", BORDERS)
def test_write_fp8_borders(case) -> None:
    """The reference: what the borders hold is the masters within a rounding, limited to the range of their rows."""
    border, into = check_border("torch", case)
    columns = slice(border.inn, None)
    limit = 448 * into["out_scales"].T
    assert_rounded(into["by_out"][:, columns], into["out_scales"].T, into["b16"].float().clamp(-limit, limit))
    used, limit = border.a.shape[0], 448 * into["in_scales"].T
    columns, a = slice(border.out, border.out + used), (border.a * border.scale).T
    assert_rounded(into["by_in"][:, columns], into["in_scales"].T, torch.clamp(a, -limit, limit))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_rows(shape, dtype) -> None:
    """The reference, for rows with and without gaps."""
    for gap in (0, 3, 16):
        check_quantize("torch", shape, dtype, gap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_convert_rows(shape, dtype) -> None:
    """The reference."""
    check_convert("torch", shape, dtype)


def test_rows_of_note() -> None:
    """The reference."""
    check_rows_of_note("torch")


def test_matmul() -> None:
    """The product is that of the stored numbers, into rows with and without gaps, for one row, many and none."""
    draw = torch.Generator().manual_seed(5)
    weight, weight_scale = quantized(torch.randn(96, 64, generator=draw).to(DEVICE))
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    if no_fp8_because(DEVICE) and DEVICE.type == "cuda":
        pytest.skip(str(no_fp8_because(DEVICE)))
    for rows in (0, 1, 7, 130, 700):
        values, scale = quantized(torch.randn(rows, 64, generator=draw).to(DEVICE))
        truth = fp8_reference(values, scale, weight, weight_scale)
        for gap in (0, 16):
            buffer = torch.zeros(rows, 96 + gap, dtype=dtype, device=DEVICE)
            out = fp8_matmul(values, scale, weight, weight_scale.view(1, 96), buffer[:, :96])
            assert out.data_ptr() == buffer.data_ptr()
            limit = 4 * torch.finfo(dtype).eps * truth.abs().max() if rows else 0.0
            assert not rows or (buffer[:, :96].double() - truth).abs().max() <= limit
            assert not buffer[:, 96:].any()


def test_what_is_refused() -> None:
    """Each message names the argument and what was expected."""
    x, (values, scale) = torch.randn(4, 32, device=DEVICE), empty(4, 32)
    with pytest.raises(KernelInputError, match="out is"):
        quantize_rows(x, torch.empty(4, 32, device=DEVICE), scale)
    with pytest.raises(KernelInputError, match="x has strides"):
        quantize_rows(x.T, values.view(32, 4), torch.empty(32, device=DEVICE))
    with pytest.raises(KernelInputError, match="scale is"):
        quantize_rows(x, values, torch.empty(5, device=DEVICE))
    with pytest.raises(KernelInputError, match="scale is"):
        convert_rows(x, torch.empty(4, dtype=torch.float64, device=DEVICE), values)
    with pytest.raises(KernelInputError, match="x is"):
        convert_rows(x.double(), scale, values)
    for a in (torch.randn(8, 16, device=DEVICE), torch.randn(16, 16, device=DEVICE).half()):
        with pytest.raises(KernelInputError, match=r"expected \(T, K \+ R\) and \(K, R\)"):
            quantize_rows_lora(x, a, values, scale)
    border, into = make_border((32,), 16, 16, 4)
    with pytest.raises(KernelInputError, match="for 32 x 16 and 16 columns"):
        write_fp8_borders(border, **(into | {"b16": into["b16"].T}))
    weight, weight_scale = empty(16, 32)
    out, row = torch.empty(4, 16, device=DEVICE), weight_scale.view(1, 16)
    for arguments, word in (
        ((values[:, :24], scale, weight[:, :24], row, out), "multiples of 16"),
        ((x, scale, weight, row, out), "e4m3|float8"),
        ((values, scale, weight, weight_scale, out), "weight_scale"),
        ((values, scale, weight, row, out.T), "out is"),
        ((empty(4, 32, 16)[0], scale, weight, row, out), "contiguous"),
    ):
        with pytest.raises(KernelInputError, match=word):
            fp8_matmul(*arguments)


def test_a_cpu_has_no_fp8() -> None:
    """The reason is a sentence's second half."""
    assert no_fp8_because(torch.device("cpu")) == "fp8 products need a GPU"
