"""SwiGLU and its thin products in Triton: what a product reads is in registers already.

A program takes some rows and a span of the columns, block by block: a block is loaded while another is computed, stored
and multiplied into an accumulator of 16 or 32 columns. The values stored are those of ``swiglu_triton.py``, bit for
bit. Where a row has several spans, each leaves its sums in fp32 and ``_swiglu_lora_total`` adds them in order: the same
row always gets the same bits, in forward and in backward, since these hang on the number of spans alone and not on the
rest of the tiling. Row offsets are int64. The width is a constant of the kernels; the number of rows is not
specialised, so a batch of another size compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tiling", "backward", "forward"]

# Columns of a span: a multiple of this. Elements of one program of _swiglu_lora_total.
SPAN_STEP, SUMS = 256, 256
SPANS = 4


@dataclass(frozen=True)
class Tiling:
    """rows, block: of one step, block up to SPAN_STEP columns; spans: programs for a row; stages: blocks in flight."""

    rows: int = 16
    block: int = 128
    stages: int = 3
    warps: int = 4
    spans: int = SPANS

    def span(self, width: int) -> int:
        """Columns of a program."""
        return triton.cdiv(width, self.spans * SPAN_STEP) * SPAN_STEP


FORWARD = Tiling(rows=16, block=256, stages=2, warps=8)
BACKWARD = Tiling(rows=16, block=64, stages=4, warps=4)


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
def _swiglu_lora_forward(
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
def _swiglu_lora_backward(
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


@triton.jit(do_not_specialize=["count"])
def _swiglu_lora_total(parts, out, stride, count, W: tl.constexpr, SPANS: tl.constexpr, BLOCK: tl.constexpr):
    """out (T, W) = the sum of parts (SPANS, T, W), in order; count = T W."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = count.to(tl.int64)
    mask = at < count
    total = tl.load(parts + at, mask=mask, other=0.0)
    for span in tl.static_range(1, SPANS):
        total += tl.load(parts + at + count * span, mask=mask, other=0.0)
    tl.store(out + (at // W) * stride + at % W, total.to(out.dtype.element_ty), mask=mask)


def _parts(out: Tensor, columns: int, spans: int) -> tuple[Tensor, int, int]:
    """Where the spans' sums go, its row stride, and elements from one span to the next: out itself for one span."""
    if spans == 1:
        return out, out.stride(0), 0
    rows = out.shape[0]
    return torch.empty((spans, rows, columns), dtype=torch.float32, device=out.device), columns, rows * columns


def _add(parts: Tensor, out: Tensor, columns: int, spans: int) -> None:
    if spans > 1 and columns:
        count = out.shape[0] * columns
        grid = (triton.cdiv(count, SUMS),)
        _swiglu_lora_total[grid](parts, out, out.stride(0), count, W=columns, SPANS=spans, BLOCK=SUMS)


def _constants(rows: int, width: int, tiling: Tiling, *ranks: int) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, number of spans and constants of a kernel."""
    span = tiling.span(width)
    spans = triton.cdiv(width, span)
    constants = {
        "F": width,
        "RANKS": max(16, triton.next_power_of_2(max(ranks))),
        "ROWS": tiling.rows,
        "BLOCK": tiling.block,
        "SPAN": span,
        "STAGES": tiling.stages,
        "num_stages": tiling.stages,
        "num_warps": tiling.warps,
    }
    return (triton.cdiv(rows, tiling.rows) * spans,), spans, constants


def forward(gate_up: Tensor, a: Tensor, act: Tensor, u: Tensor, tiling: Tiling = FORWARD) -> None:
    """Write silu(gate) * up into act and act a^T into u."""
    rows, width = act.shape
    if not act.numel():
        u.zero_()
        return
    rank = a.shape[0]
    grid, spans, constants = _constants(rows, width, tiling, rank)
    with torch.cuda.device_of(act):
        into, u_stride, part = _parts(u, rank, spans)
        _swiglu_lora_forward[grid](
            gate_up, a, act, into, gate_up.stride(0), a.stride(0), act.stride(0), u_stride, part, rows,
            R=rank, **constants,
        )  # fmt: skip
        _add(into, u, rank, spans)


def backward(
    gate_up: Tensor,
    d_act: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    v: Tensor,
    act: Tensor | None,
    a: Tensor | None,
    u: Tensor | None,
    tiling: Tiling = BACKWARD,
) -> None:
    """Write [dg, dup] into gate_up and [dg b_gate, dup b_up] into v; act, and u = act a^T, where they are given."""
    rows, width = d_act.shape
    if not d_act.numel():
        for empty in (v, u):
            if empty is not None:
                empty.zero_()
        return
    # What is not given is not read: any tensor stands for it.
    gate, up, values, inner, thin = (d_act if given is None else given for given in (b_gate, b_up, act, a, u))
    r_gate, r_up = (0 if b is None else b.shape[1] for b in (b_gate, b_up))
    rank = 0 if a is None else a.shape[0]
    grid, spans, constants = _constants(rows, width, tiling, r_gate, r_up, rank)
    with torch.cuda.device_of(d_act):
        v_into, v_stride, v_part = _parts(v, r_gate + r_up, spans)
        u_into, u_stride, u_part = _parts(thin, rank, spans if rank else 1)
        _swiglu_lora_backward[grid](
            gate_up, d_act, gate, up, v_into, values, inner, u_into, gate_up.stride(0), d_act.stride(0),
            gate.stride(0), up.stride(0), v_stride, values.stride(0), inner.stride(0), u_stride, v_part, u_part, rows,
            R_GATE=r_gate, R_UP=r_up, R=rank, HAS_ACT=act is not None, **constants,
        )  # fmt: skip
        _add(v_into, v, r_gate + r_up, spans)
        if rank:
            _add(u_into, thin, rank, spans)
