"""Rotary embedding in Triton: one program per token, which reads its cos and sin once and walks over the heads.

Every head is read and written once; in place, heads that are not rotated are not touched at all. What is computed
stands in ``rope.py``. Arguments are checked there; here heads are contiguous and cos, sin are contiguous (T, H/2) fp32.
Offsets are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "rotate"]

# Elements of a half-head tile: eight per thread of four warps, one 16-byte load in bf16.
TILE = 1024


@triton.jit
def _angles(cos, sin, dtype: tl.constexpr, INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin of this program's token, (1, BLOCK) fp32, rounded to dtype; sin negated to turn back."""
    col = tl.arange(0, BLOCK)[None, :]
    at = tl.program_id(0).to(tl.int64) * HALF + col
    c = tl.load(cos + at, mask=col < HALF, other=0.0).to(dtype).to(tl.float32)
    s = tl.load(sin + at, mask=col < HALF, other=0.0).to(dtype).to(tl.float32)
    if INVERSE:
        s = -s
    return c, s


@triton.jit
def _walk(
    x, out, stride, c, s,
    HEADS: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the first ROTATED heads of one token from x to out and copy the others, STEP heads at a time."""
    dtype = out.dtype.element_ty
    col = tl.arange(0, BLOCK)[None, :]
    for first in range(0, HEADS, STEP):
        head = first + tl.arange(0, STEP)[:, None]
        mask = (head < HEADS) & (col < HALF)
        at = x + head.to(tl.int64) * stride + col
        a = tl.load(at, mask=mask, other=0.0)
        b = tl.load(at + HALF, mask=mask, other=0.0)
        left, right = a.to(tl.float32), b.to(tl.float32)
        turns = head < ROTATED
        into = out + head * (2 * HALF) + col
        tl.store(into, tl.where(turns, (left * c - right * s).to(dtype), a), mask=mask)
        tl.store(into + HALF, tl.where(turns, (right * c + left * s).to(dtype), b), mask=mask)


@triton.jit
def _rope(
    x, out, cos, sin, token_stride, head_stride, out_stride, INVERSE: tl.constexpr,
    HEADS: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c, s = _angles(cos, sin, out.dtype.element_ty, INVERSE, HALF, BLOCK)
    _walk(x + token * token_stride, out + token * out_stride, head_stride, c, s, HEADS, ROTATED, STEP, HALF, BLOCK)


@triton.jit
def _rope_backward(
    dq, dk, dv, out, cos, sin, q_token, q_head, k_token, k_head, v_token, v_head, out_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, STEP: tl.constexpr, KEY_STEP: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c, s = _angles(cos, sin, out.dtype.element_ty, True, HALF, BLOCK)
    into = out + token * out_stride
    _walk(dq + token * q_token, into, q_head, c, s, HEADS, HEADS, STEP, HALF, BLOCK)
    into += HEADS * 2 * HALF
    _walk(dk + token * k_token, into, k_head, c, s, KEY_HEADS, KEY_HEADS, KEY_STEP, HALF, BLOCK)
    into += KEY_HEADS * 2 * HALF
    _walk(dv + token * v_token, into, v_head, c, s, KEY_HEADS, 0, KEY_STEP, HALF, BLOCK)


def _step(heads: int, block: int) -> int:
    """Heads per turn of the loop, a power of two."""
    return min(triton.next_power_of_2(max(heads, 1)), max(1, TILE // block))


def _warps(tile: int) -> int:
    return min(max(tile // 256, 1), 4)


def rotate(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, heads: int, rotated: int, *, inverse: bool = False
) -> None:
    """Write the first ``heads`` heads of x (T, M, H) into out, contiguous or x itself; ``rotated`` of them turned."""
    if not heads or not x.numel():
        return
    half = x.shape[2] // 2
    block = triton.next_power_of_2(half)
    step = _step(heads, block)
    with torch.cuda.device_of(x):
        _rope[(x.shape[0],)](
            x, out, cos, sin, x.stride(0), x.stride(1), out.stride(0), INVERSE=inverse,
            HEADS=heads, ROTATED=rotated, STEP=step, HALF=half, BLOCK=block, num_warps=_warps(step * block),
        )  # fmt: skip


def backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write dq and dk rotated back and dv as it is side by side into the rows of out (T, at least (N+2K)H)."""
    tokens, heads, head_dim = dq.shape
    key_heads = dk.shape[1]
    if not tokens or not heads + key_heads:
        return
    block = triton.next_power_of_2(head_dim // 2)
    step = _step(heads, block)
    with torch.cuda.device_of(dq):
        _rope_backward[(tokens,)](
            dq, dk, dv, out, cos, sin, *dq.stride()[:2], *dk.stride()[:2], *dv.stride()[:2], out.stride(0),
            HEADS=heads, KEY_HEADS=key_heads, STEP=step, KEY_STEP=_step(key_heads, block),
            HALF=head_dim // 2, BLOCK=block, num_warps=_warps(step * block),
        )  # fmt: skip
