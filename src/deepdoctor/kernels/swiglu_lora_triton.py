"""SwiGLU and its thin product in Triton: what the product reads is in registers already.

A program takes some rows and a span of the columns, block by block: each block is computed, stored, and multiplied into
an accumulator of 16 columns or a few more. The values stored are those of ``swiglu_triton.py``, bit for bit. Where a row
has several spans, each leaves its sums in fp32 and ``_total`` adds them in order, so that the same row always gets the
same bits; their bits hang on the span alone, not on the other sizes of the tiling. Row offsets are int64. The number of
rows is not specialised, so a batch of another size compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tiling", "backward", "forward"]


@dataclass(frozen=True)
class Tiling:
    """rows and columns (a block, then a span of blocks; 0: all of them) of a program; stages of loads in flight."""

    rows: int
    block: int
    span: int
    stages: int
    warps: int


SPAN = 0
FORWARD = Tiling(16, 128, SPAN, 3, 4)
BACKWARD = Tiling(16, 128, SPAN, 3, 4)
# Elements of one program of _total.
SUMS = 256


@triton.jit
def _columns(span, start, rows, row, F: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Column numbers of a block, which of them exist, and which elements; where none is missing, the compiler knows."""
    col = span * SPAN + start + tl.arange(0, BLOCK)
    if F % SPAN == 0 and SPAN % BLOCK == 0:
        within = tl.full((BLOCK,), True, tl.int1)
    else:
        within = col < F
    return col, within, (row < rows) & within[None, :]


@triton.jit
def _thin(acc, values, matrix, col, within, mask, by_col, by_rank, R: tl.constexpr, RANKS: tl.constexpr):
    """acc (rows, RANKS) += values (rows, block) times (block, R) of matrix."""
    rank = tl.arange(0, RANKS)
    at = matrix + col[:, None] * by_col + rank[None, :] * by_rank
    weight = tl.load(at, mask=within[:, None] & (rank < R)[None, :], other=0.0)
    # The mask changes nothing here, but keeps the compiler from computing the values once more, by every warp, in the
    # layout of the product: it moves the change of layout up to the loads where nothing but arithmetic is between.
    return tl.dot(tl.where(mask, values, 0.0), weight, acc, input_precision="ieee")


@triton.jit
def _put(acc, out, row, rows, stride, R: tl.constexpr, RANKS: tl.constexpr):
    rank = tl.arange(0, RANKS)[None, :]
    tl.store(out + row * stride + rank, acc.to(out.dtype.element_ty), mask=(row < rows) & (rank < R))


@triton.jit(do_not_specialize=["rows", "part"])
def _forward(
    gate_up, a, act, u, stride, a_stride, act_stride, u_stride, part, rows, F: tl.constexpr, R: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    SPANS: tl.constexpr = (F + SPAN - 1) // SPAN
    program = tl.program_id(0)
    row = (program // SPANS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    span = program % SPANS
    acc = tl.zeros((ROWS, RANKS), tl.float32)
    for start in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
        col, within, mask = _columns(span, start, rows, row, F, BLOCK, SPAN)
        at = gate_up + row * stride + col[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        value = (gate * tl.sigmoid(gate) * up).to(act.dtype.element_ty)
        tl.store(act + row * act_stride + col[None, :], value, mask=mask)
        acc = _thin(acc, value, a, col, within, mask, 1, a_stride, R, RANKS)
    _put(acc, u + span.to(tl.int64) * part, row, rows, u_stride, R, RANKS)


@triton.jit(do_not_specialize=["rows", "part", "u_part"])
def _backward(
    gate_up, d_act, b_gate, b_up, v, act, a, u, stride, d_act_stride, gate_stride, up_stride, v_stride, act_stride,
    a_stride, u_stride, part, u_part, rows, F: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr,
    R: tl.constexpr, HAS_ACT: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    SPANS: tl.constexpr = (F + SPAN - 1) // SPAN
    program = tl.program_id(0)
    row = (program // SPANS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    span = program % SPANS
    dtype = gate_up.dtype.element_ty
    v_gate = tl.zeros((ROWS, RANKS), tl.float32)
    v_up = tl.zeros((ROWS, RANKS), tl.float32)
    acc = tl.zeros((ROWS, RANKS), tl.float32)
    for start in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
        col, within, mask = _columns(span, start, rows, row, F, BLOCK, SPAN)
        at = gate_up + row * stride + col[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(d_act + row * d_act_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        slope = tl.sigmoid(gate)
        silu = gate * slope
        d_gate = (da * up * (slope * (1 + gate * (1 - slope)))).to(dtype)
        d_up = (da * silu).to(dtype)
        tl.store(at, d_gate, mask=mask)
        tl.store(at + F, d_up, mask=mask)
        if R_GATE:
            v_gate = _thin(v_gate, d_gate, b_gate, col, within, mask, gate_stride, 1, R_GATE, RANKS)
        if R_UP:
            v_up = _thin(v_up, d_up, b_up, col, within, mask, up_stride, 1, R_UP, RANKS)
        if HAS_ACT:
            value = (silu * up).to(dtype)
            tl.store(act + row * act_stride + col[None, :], value, mask=mask)
            if R:
                acc = _thin(acc, value, a, col, within, mask, 1, a_stride, R, RANKS)
    into = v + span.to(tl.int64) * part
    if R_GATE:
        _put(v_gate, into, row, rows, v_stride, R_GATE, RANKS)
    if R_UP:
        _put(v_up, into + R_GATE, row, rows, v_stride, R_UP, RANKS)
    if R:
        _put(acc, u + span.to(tl.int64) * u_part, row, rows, u_stride, R, RANKS)
