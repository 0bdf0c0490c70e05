"""RMS norm in Triton: one program per row, several rows where they are short.

A row is read once and stays in registers between the sum of squares and the product, so the time is that of the bytes:
add_forward reads two and writes two rows of D elements, backward reads three and writes one. What is computed and in
which order it is rounded stands in ``rms_norm.py``. Arguments are checked there; here they are (rows, D) with
contiguous rows. Row offsets are int64: 75,000 rows of a 28,704 wide buffer pass 2**31 elements. The number of rows is
not specialised, so a batch of another size compiles nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_forward", "backward", "normalise"]

# Elements of one program: 8 per thread of four warps are one 16-byte load each in bf16, twice.
TILE = 2048


@triton.jit
def _tile(D, ROWS: tl.constexpr, BLOCK: tl.constexpr, rows):
    """Row and column numbers of this program, (ROWS, 1) int64 and (1, BLOCK), and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    return row, col, (row < rows) & (col < D)


@triton.jit
def _weight(weight, D, BLOCK: tl.constexpr):
    """(1, BLOCK), loaded as a vector: as a tile it sets the layout of all (96 registers, not 60, backward at 128)."""
    col = tl.arange(0, BLOCK)
    return tl.load(weight + col, mask=col < D, other=0.0)[None, :]


@triton.jit
def _scale(wide, rstd, weight, dtype: tl.constexpr):
    """The normalised row, rounded to dtype before the weight and after it."""
    return ((wide * rstd).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x, delta, weight, y, rstd, x_stride, delta_stride, y_stride, rows, D, eps,
    HAS_DELTA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(D, ROWS, BLOCK, rows)
    dtype = x.dtype.element_ty
    total = tl.load(x + row * x_stride + col, mask=mask, other=0.0)
    if HAS_DELTA:
        sum_at = delta + row * delta_stride + col
        added = tl.load(sum_at, mask=mask, other=0.0)
    w = _weight(weight, D, BLOCK)
    if HAS_DELTA:
        total = (total.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(sum_at, total, mask=mask)
    wide = total.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1, keep_dims=True) / D
    r = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd + row, r, mask=row < rows)
    tl.store(y + row * y_stride + col, _scale(wide, r, w, dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_again(x, rstd, weight, y, x_stride, y_stride, rows, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, col, mask = _tile(D, ROWS, BLOCK, rows)
    wide = tl.load(x + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    w = _weight(weight, D, BLOCK)
    r = tl.load(rstd + row, mask=row < rows, other=0.0)
    tl.store(y + row * y_stride + col, _scale(wide, r, w, x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    dy, x, rstd, weight, add, out, dy_stride, x_stride, add_stride, out_stride, rows, D,
    HAS_ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(D, ROWS, BLOCK, rows)
    g = tl.load(dy + row * dy_stride + col, mask=mask, other=0.0)
    n = tl.load(x + row * x_stride + col, mask=mask, other=0.0)
    if HAS_ADD:
        # Before the sum over the row, so that all reads are in flight together.
        past = tl.load(add + row * add_stride + col, mask=mask, other=0.0)
    w = _weight(weight, D, BLOCK)
    r = tl.load(rstd + row, mask=row < rows, other=0.0)
    n = n.to(tl.float32) * r
    g = g.to(tl.float32) * w.to(tl.float32)
    dx = (g - n * (tl.sum(n * g, axis=1, keep_dims=True) / D)) * r
    if HAS_ADD:
        dx += past.to(tl.float32)
    tl.store(out + row * out_stride + col, dx.to(x.dtype.element_ty), mask=mask)


def _shape(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid, and the tile with its warps: 16 elements per thread, 32 for the widest rows."""
    block = triton.next_power_of_2(width)
    together = max(1, TILE // block)
    warps = min(max(together * block // 512, 4), 16)
    return (triton.cdiv(rows, together),), {"ROWS": together, "BLOCK": block, "num_warps": warps}


def add_forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, y: Tensor, rstd: Tensor) -> None:
    """Write x + delta into delta where it is given, the normalised sum into y and 1 / rms into rstd."""
    rows, width = x.shape
    if not x.numel():
        return
    given = x if delta is None else delta
    grid, tile = _shape(rows, width)
    with torch.cuda.device_of(x):
        _add_norm[grid](
            x, given, weight, y, rstd, x.stride(0), given.stride(0), y.stride(0), rows, width, eps,
            HAS_DELTA=delta is not None, **tile,
        )  # fmt: skip


def normalise(x: Tensor, rstd: Tensor, weight: Tensor, y: Tensor) -> None:
    """Write the normalised x into y, from the rstd that add_forward wrote."""
    rows, width = x.shape
    if not x.numel():
        return
    grid, tile = _shape(rows, width)
    with torch.cuda.device_of(x):
        _norm_again[grid](x, rstd, weight, y, x.stride(0), y.stride(0), rows, width, **tile)


def backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, add: Tensor | None, out: Tensor) -> None:
    """Write the gradient with respect to x, plus add where it is given, into out, which may be any of the inputs."""
    rows, width = x.shape
    if not x.numel():
        return
    given = x if add is None else add
    grid, tile = _shape(rows, width)
    with torch.cuda.device_of(x):
        _norm_backward[grid](
            dy, x, rstd, weight, given, out, dy.stride(0), x.stride(0), given.stride(0), out.stride(0), rows, width,
            HAS_ADD=add is not None, **tile,
        )  # fmt: skip
