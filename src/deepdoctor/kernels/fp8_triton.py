"""Row-wise e4m3 in Triton: one program per row, several rows where they are short.

A row stays in registers between its largest value and the conversion, so the time is that of three bytes per 16-bit
value. Rows wider than WIDEST are read twice, the second time from the cache: in registers, one row would fill a
multiprocessor, and nothing would be in flight while it is converted. What is computed stands in ``fp8.py``, bit for bit
(on Ada but for ties: its conversion goes through fp16). Arguments are checked there; here they are (rows, width). Row
offsets are int64. The number of rows is not specialised, so a batch of another size compiles nothing.

``quantize_lora`` reads 16 rows twice: block by block for the thin product and the largest value, then backwards to
convert, which meets first what the cache has held the shortest time. A row's u hangs on block and rank alone, so every
batch gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepdoctor.kernels.bordered_nf4 import Border

__all__ = ["BLOCKS", "ThinTiling", "convert", "quantize", "quantize_lora", "write_borders"]

# Elements of one program: at least, and in registers at most.
TILE, WIDEST = 2048, 16384
# Most B that write_borders takes, and elements of one program.
BLOCKS, PATCH = 3, 4096
# As in fp8.py.
LARGEST = tl.constexpr(448.0)
INVERSE = tl.constexpr(1 / 448.0)
SMALLEST_ROW = tl.constexpr(1e-30)


@dataclass(frozen=True)
class ThinTiling:
    """rows: of a program; block, stages: columns of a step, steps in flight; wide: columns converted at once.

    The default is the fastest of nine on an H100 (``test_times_of_lora``).
    """

    rows: int = 16
    block: int = 128
    stages: int = 4
    wide: int = 1024
    warps: int = 4


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


@triton.jit
def _columns(start, BLOCK: tl.constexpr, K: tl.constexpr):
    """Column numbers of a block and which of them exist; where none is missing, the compiler knows."""
    col = start + tl.arange(0, BLOCK)
    if K % BLOCK == 0:
        return col, tl.full((BLOCK,), True, tl.int1)
    return col, col < K


@triton.jit(do_not_specialize=["rows"])
def _quantize_lora(
    x, a, out, scale, x_stride, a_stride, a_step, out_stride, rows, K: tl.constexpr, R: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    rank = tl.arange(0, RANKS)[None, :]
    there = row < rows
    from_row, to_row = x + row * x_stride, out + row * out_stride
    acc = tl.zeros((ROWS, RANKS), tl.float32)
    largest = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=STAGES):
        col, within = _columns(start, BLOCK, K)
        mask = there & within[None, :]
        values = tl.load(from_row + col[None, :], mask=mask, other=0.0)
        weight = tl.load(a + col[:, None] * a_stride + rank * a_step, mask=within[:, None] & (rank < R), other=0.0)
        largest = tl.maximum(largest, tl.abs(values.to(tl.float32)))
        # The mask changes nothing, but has the product read a copy of its own in shared memory: in the one that holds
        # the steps in flight, as it suits the maximum, eight rows of a column lie in one bank.
        acc = tl.dot(tl.where(mask, values, 0.0), weight, acc)
    u = acc.to(x.dtype.element_ty)
    thin = there & (rank < R)
    tl.store(from_row + K + rank, u, mask=thin)
    rounded = u.to(tl.float32)
    found = tl.maximum(tl.max(largest, axis=1, keep_dims=True), tl.max(tl.abs(rounded), axis=1, keep_dims=True))
    found = tl.maximum(found, SMALLEST_ROW) * INVERSE
    tl.store(scale + row, found, mask=there)
    tl.store(to_row + K + rank, _e4m3(rounded, found, out.dtype.element_ty), mask=thin)
    STEPS: tl.constexpr = (K + WIDE - 1) // WIDE
    for step in range(STEPS):
        col, within = _columns((STEPS - 1 - step) * WIDE, WIDE, K)
        part = there & within[None, :]
        wide = tl.load(from_row + col[None, :], mask=part, other=0.0).to(tl.float32)
        tl.store(to_row + col[None, :], _e4m3(wide, found, out.dtype.element_ty), mask=part)


@triton.jit
def _border_a(
    a, a16, by_in, scale, factor, OUT: tl.constexpr, INN: tl.constexpr, RANKS: tl.constexpr, USED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of s A, and the same rows of by_in."""
    row, rank, _ = _tile(INN, USED, ROWS, BLOCK)
    mask = (row < INN) & (rank < USED)
    value = tl.load(a + rank * INN + row, mask=mask, other=0.0) * factor
    tl.store(a16 + rank * INN + row, value.to(a16.dtype.element_ty), mask=mask)
    given = tl.load(scale + row, mask=row < INN, other=1.0)
    tl.store(by_in + row * (OUT + RANKS) + OUT + rank, _e4m3(value, given, by_in.dtype.element_ty), mask=mask)


@triton.jit
def _border_b(
    b, b16, by_out, scale, start, height, at, INN: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows of one B, which begins at row ``start`` and column ``at`` of the border."""
    row, rank, mask = _tile(height, RANK, ROWS, BLOCK)
    value = tl.load(b + row * RANK + rank, mask=mask, other=0.0).to(b16.dtype.element_ty)
    to = start + row
    tl.store(b16 + to * RANKS + at + rank, value, mask=mask)
    given = tl.load(scale + to, mask=row < height, other=1.0)
    wide = _e4m3(value.to(tl.float32), given, by_out.dtype.element_ty)
    tl.store(by_out + to * (INN + RANKS) + INN + at + rank, wide, mask=mask)


@triton.jit
def _write_borders(
    a, b0, b1, b2, a16, b16, by_out, out_scale, by_in, in_scale, factor, start0, start1, start2, height0, height1,
    height2, OUT: tl.constexpr, INN: tl.constexpr, RANKS: tl.constexpr, USED: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr,
):  # fmt: skip
    """First axis: rows; second axis: A, then the B."""
    part = tl.program_id(1)
    if part == 0:
        _border_a(a, a16, by_in, in_scale, factor, OUT, INN, RANKS, USED, ROWS, A_BLOCK)
    elif part == 1:
        _border_b(b0, b16, by_out, out_scale, start0, height0, 0, INN, RANKS, RANK, ROWS, B_BLOCK)
    elif part == 2:
        _border_b(b1, b16, by_out, out_scale, start1, height1, RANK, INN, RANKS, RANK, ROWS, B_BLOCK)
    else:
        _border_b(b2, b16, by_out, out_scale, start2, height2, 2 * RANK, INN, RANKS, RANK, ROWS, B_BLOCK)


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


def quantize_lora(x: Tensor, a: Tensor, out: Tensor, scale: Tensor, tiling: ThinTiling | None = None) -> None:
    """Write x a into the last columns of x, all of x / scale into out, and max|row| / 448 into scale."""
    rows = x.shape[0]
    width, rank = a.shape
    if not rows:
        return
    tiling = tiling or ThinTiling()
    with torch.cuda.device_of(x):
        _quantize_lora[(triton.cdiv(rows, tiling.rows),)](
            x, a, out, scale, x.stride(0), a.stride(0), a.stride(1), out.stride(0), rows, K=width, R=rank,
            RANKS=max(16, triton.next_power_of_2(rank)), ROWS=tiling.rows, BLOCK=tiling.block, WIDE=tiling.wide,
            STAGES=tiling.stages, num_warps=tiling.warps,
        )  # fmt: skip


def write_borders(
    border: Border, a16: Tensor, b16: Tensor, by_out: Tensor, out_scale: Tensor, by_in: Tensor, in_scale: Tensor
) -> None:
    """Write A and B into both borders in one launch; at most BLOCKS of B, of one rank and in order."""
    a, blocks = border.a, border.blocks
    assert a is not None
    spare = BLOCKS - len(blocks)
    weights = [block.weight for block in blocks] + [a] * spare
    starts = [block.start for block in blocks] + [0] * spare
    heights = [block.weight.shape[0] for block in blocks] + [0] * spare
    rank = blocks[0].weight.shape[1]
    a_block = triton.next_power_of_2(a.shape[0])
    together = max(PATCH // a_block, 8)
    grid = (triton.cdiv(max(border.inn, *heights), together), 1 + len(blocks))
    with torch.cuda.device_of(a):
        _write_borders[grid](
            a, *weights, a16, b16, by_out, out_scale, by_in, in_scale, float(border.scale), *starts, *heights,
            OUT=border.out, INN=border.inn, RANKS=border.rank, USED=a.shape[0], RANK=rank, ROWS=together,
            A_BLOCK=a_block, B_BLOCK=triton.next_power_of_2(rank),
        )  # fmt: skip
