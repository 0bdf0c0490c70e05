"""Rotary position embedding on half-split heads: ``(a, b) -> (a cos - b sin, b cos + a sin)``.

The rotation is orthogonal, so the gradient is the rotation by the opposite angle and nothing but cos and sin is kept.
Source: RoFormer (arXiv 2104.09864), in the half-split layout of Llama checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError

__all__ = ["apply_rope", "rope_tables"]


def rope_tables(positions: Tensor, inverse_frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (T, H/2) fp32, for positions (T,) int and frequencies (H/2,) fp32."""
    angles = positions.to(torch.float32)[:, None] * inverse_frequencies
    return angles.cos() * factor, angles.sin() * factor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    a, b = x[:, :rotated, :half], x[:, :rotated, half:]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    torch.mul(a, cos, out=out[:, :rotated, :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[:, :rotated, half:]).addcmul_(a, sin)
    out[:, rotated:] = x[:, rotated:]
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotated = rotated
        return _rotate(x, cos, sin, rotated)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin, ctx.rotated), None, None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, rotated: int | None = None) -> Tensor:
    """Rotate the first ``rotated`` heads of every token by its position and copy the others.

    x         (T, N, H)  bf16 | fp16 | fp32, H even; q, k and v side by side are rotated in one pass with v left alone
    cos, sin  (T, H/2)   fp32, from ``rope_tables``; rounded to x's dtype, as the reference models do
    rotated   heads to rotate (all, where None)
    returns   (T, N, H)  dtype of x, contiguous

    Raises KernelInputError for shapes that do not fit.
    """
    if x.dim() != 3 or x.shape[-1] % 2 or cos.shape != (x.shape[0], x.shape[-1] // 2) or sin.shape != cos.shape:
        raise KernelInputError(
            f"apply_rope: x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            "expected (T, N, H) and twice (T, H/2)"
        )
    rotated = x.shape[1] if rotated is None else rotated
    if not 0 <= rotated <= x.shape[1]:
        raise KernelInputError(f"apply_rope: rotated is {rotated}, expected 0 to {x.shape[1]} heads")
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, cos, sin, rotated)
    return _rotate(x, cos, sin, rotated)
