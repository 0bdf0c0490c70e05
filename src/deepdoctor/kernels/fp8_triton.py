"""Row-wise e4m3 in Triton: one program per row, several rows where they are short.

A row stays in registers between its largest value and the conversion, so the time is that of three bytes per 16-bit
value. Rows wider than WIDEST are read twice, the second time from the cache: in registers, one row would fill a
multiprocessor, and nothing would be in flight while it is converted. What is computed stands in ``fp8.py``, bit for bit
(on Ada but for ties: its conversion goes through fp16). Arguments are checked there; here they are (rows, width). Row
offsets are int64. The number of rows is not specialised, so a batch of another size compiles nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["convert", "quantize"]

# Elements of one program: at least, and in registers at most.
TILE, WIDEST = 2048, 16384
# As in fp8.py.
LARGEST = tl.constexpr(448.0)
INVERSE = tl.constexpr(1 / 448.0)
SMALLEST_ROW = tl.constexpr(1e-30)


@triton.jit
def _tile(rows, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column numbers of this program, (ROWS, 1) int64 and (1, BLOCK), and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    return row, col, (row < rows) & (col < K)


@triton.jit
def _e4m3(wide, scale, dtype: tl.constexpr):
    """Divide by scale and limit to the format's range; nan stays nan, and inf becomes nan under its own scale."""
    scaled = wide * tl.div_rn(1.0, scale)
    return tl.clamp(scaled, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _quantize(x, out, scale, x_stride, out_stride, rows, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, col, mask = _tile(rows, K, ROWS, BLOCK)
    wide = tl.load(x + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    found = tl.maximum(tl.max(tl.abs(wide), axis=1, keep_dims=True), SMALLEST_ROW) * INVERSE
    tl.store(scale + row, found, mask=row < rows)
    tl.store(out + row * out_stride + col, _e4m3(wide, found, out.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_wide(x, out, scale, x_stride, out_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    from_row, to_row = x + row * x_stride, out + row * out_stride
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        values = tl.load(from_row + start + col, mask=start + col < K, other=0.0)
        largest = tl.maximum(largest, tl.abs(values.to(tl.float32)))
    found = tl.maximum(tl.max(largest, axis=0), SMALLEST_ROW) * INVERSE
    tl.store(scale + row, found)
    for start in range(0, K, BLOCK):
        values = tl.load(from_row + start + col, mask=start + col < K, other=0.0)
        scaled = _e4m3(values.to(tl.float32), found, out.dtype.element_ty)
        tl.store(to_row + start + col, scaled, mask=start + col < K)


@triton.jit(do_not_specialize=["rows"])
def _convert(
    x, scale, out, x_stride, x_step, out_stride, rows, K, factor, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, col, mask = _tile(rows, K, ROWS, BLOCK)
    wide = tl.load(x + row * x_stride + col * x_step, mask=mask, other=0.0).to(tl.float32) * factor
    given = tl.load(scale + row, mask=row < rows, other=1.0)
    tl.store(out + row * out_stride + col, _e4m3(wide, given, out.dtype.element_ty), mask=mask)


def _shape(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid, and the tile with its warps: 16 elements per thread."""
    block = triton.next_power_of_2(width)
    together = max(1, TILE // block)
    warps = min(max(together * block // 512, 4), 32)
    return (triton.cdiv(rows, together),), {"ROWS": together, "BLOCK": block, "num_warps": warps}


def quantize(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """Write x / scale into out and max|row| / 448 into scale."""
    rows, width = x.shape
    if not x.numel():
        return
    with torch.cuda.device_of(x):
        if width > WIDEST:
            _quantize_wide[(rows,)](x, out, scale, x.stride(0), out.stride(0), width, BLOCK=WIDEST, num_warps=32)
            return
        grid, tile = _shape(rows, width)
        _quantize[grid](x, out, scale, x.stride(0), out.stride(0), rows, width, **tile)


def convert(x: Tensor, scale: Tensor, out: Tensor, factor: float) -> None:
    """Write factor * x / scale into out."""
    rows, width = x.shape
    if not x.numel():
        return
    grid, tile = _shape(rows, width)
    with torch.cuda.device_of(x):
        _convert[grid](x, scale, out, x.stride(0), x.stride(1), out.stride(0), rows, width, factor, **tile)
