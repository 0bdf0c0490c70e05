"""Row-wise e4m3: the stored values against the format's definition, products against float64, and what is refused."""

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.fp8 import E4M3, convert_rows, fp8_matmul, no_fp8_because, quantize_rows
from helpers_triton import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 16), (5, 48), (3, 608), (17, 33), (2, 4144), (0, 64), (1, 16400)]
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
