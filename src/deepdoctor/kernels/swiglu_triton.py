"""SwiGLU in Triton: programs over tiles of rows and columns, each element read and written once.

Forward reads 2F and writes F elements per token, backward reads 3F and writes 2F, or 3F with the activation. What is
computed stands in ``swiglu.py``. Arguments are checked there; here they are (rows, width) with contiguous rows. Row
offsets are int64: 75,000 rows of a 28,704 wide buffer pass 2**31 elements. The number of rows is not specialised, so a
batch of another size compiles nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

# Elements of one program, at eight per thread: one 16-byte load of each input in bf16.
TILE = 2048


@triton.jit
def _tile(rows, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column numbers of this program, (ROWS, 1) int64 and (1, BLOCK), and which of them exist."""
    blocks = tl.cdiv(F, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, col, (row < rows) & (col < F)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_forward(gate_up, out, stride, out_stride, rows, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, col, mask = _tile(rows, F, ROWS, BLOCK)
    at = gate_up + row * stride + col
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + col, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward(
    gate_up, d_act, grad, act, stride, d_act_stride, grad_stride, act_stride, rows, F,
    HAS_ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _tile(rows, F, ROWS, BLOCK)
    dtype = gate_up.dtype.element_ty
    at = gate_up + row * stride + col
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    da = tl.load(d_act + row * d_act_stride + col, mask=mask, other=0.0).to(tl.float32)
    slope = tl.sigmoid(gate)
    silu = gate * slope
    into = grad + row * grad_stride + col
    tl.store(into, (da * up * (slope * (1 + gate * (1 - slope)))).to(dtype), mask=mask)
    tl.store(into + F, (da * silu).to(dtype), mask=mask)
    if HAS_ACT:
        tl.store(act + row * act_stride + col, (silu * up).to(dtype), mask=mask)


def _shape(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile: one row of TILE columns, several rows where they are short."""
    block = min(triton.next_power_of_2(width), TILE)
    together = TILE // block
    grid = triton.cdiv(rows, together) * triton.cdiv(width, block)
    return (grid,), {"ROWS": together, "BLOCK": block, "num_warps": 8}


def forward(gate_up: Tensor, out: Tensor) -> None:
    """Write silu(gate) * up into out."""
    rows, width = out.shape
    if not out.numel():
        return
    grid, tile = _shape(rows, width)
    with torch.cuda.device_of(out):
        _swiglu_forward[grid](gate_up, out, gate_up.stride(0), out.stride(0), rows, width, **tile)


def backward(gate_up: Tensor, d_act: Tensor, grad: Tensor, act: Tensor | None) -> None:
    """Write [d_gate, d_up] into grad, which may be gate_up, and silu(gate) * up into act where it is given."""
    rows, width = d_act.shape
    if not d_act.numel():
        return
    given = d_act if act is None else act
    grid, tile = _shape(rows, width)
    with torch.cuda.device_of(d_act):
        _swiglu_backward[grid](
            gate_up, d_act, grad, given, gate_up.stride(0), d_act.stride(0), grad.stride(0), given.stride(0),
            rows, width, HAS_ACT=act is not None, **tile,
        )  # fmt: skip
