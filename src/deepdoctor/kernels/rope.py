"""Rotary position embedding on half-split heads: ``(a, b) -> (a cos - b sin, b cos + a sin)``.

The rotation is orthogonal, so the gradient is the rotation by the opposite angle and nothing but cos and sin is kept.
Source: RoFormer (arXiv 2104.09864), in the half-split layout of Llama checkpoints.

``apply_rope`` is for autograd. ``rope_qkv_`` and ``rope_backward`` are for a backward written by hand: they record
nothing, work in place or into a given buffer, sum the products in fp32 and round once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.rows import FLOAT_DTYPES, check_rows

__all__ = ["apply_rope", "rope_backward", "rope_qkv_", "rope_tables"]


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


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write x (T, N, H), every head rotated, into out, which may be x: fp32 sums, one rounding."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = (table.to(x.dtype).float().unsqueeze(1) for table in (cos, sin))
    first, second = a * cos - b * sin, b * cos + a * sin
    half = x.shape[-1] // 2
    out[..., :half] = first
    out[..., half:] = second


def _triton_rotate(x: Tensor, cos: Tensor, sin: Tensor, rotated: int, inverse: bool = False) -> Tensor:
    from deepdoctor.kernels import rope_triton

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = x if x.stride(-1) == 1 else x.contiguous()
    rope_triton.rotate(x, out, cos, sin, x.shape[1], rotated, inverse=inverse)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotated: int, triton: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotated, ctx.triton = rotated, triton
        return (_triton_rotate if triton else _rotate)(x, cos, sin, rotated)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        if ctx.triton:
            return _triton_rotate(dy, cos, sin, ctx.rotated, inverse=True), None, None, None, None
        return _rotate(dy, cos, -sin, ctx.rotated), None, None, None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, rotated: int | None = None, *, impl: Impl = "auto") -> Tensor:
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
    triton = use_triton(impl, x) and x.dtype in FLOAT_DTYPES and _tables_fit(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, cos, sin, rotated, triton)
    return (_triton_rotate if triton else _rotate)(x, cos, sin, rotated)


@torch.no_grad()
def rope_qkv_(qkv: Tensor, cos: Tensor, sin: Tensor, rotated: int, *, impl: Impl = "auto") -> Tensor:
    """Rotate the first ``rotated`` heads of every token in place; the others are not touched.

    qkv       (T, M, H)  bf16 | fp16 | fp32, contiguous, H even; M = N + 2K heads of q, k and v side by side
    cos, sin  (T, H/2)   fp32, from ``rope_tables``; rounded to qkv's dtype
    rotated   heads to rotate, N + K
    returns   qkv

    Raises KernelInputError on any mismatch above.
    """
    _check_heads("rope_qkv_", "qkv", qkv, None, qkv)
    if not qkv.is_contiguous():
        raise KernelInputError(f"rope_qkv_: qkv has strides {qkv.stride()}, expected a contiguous tensor")
    _check_tables("rope_qkv_", qkv, cos, sin)
    if not 0 <= rotated <= qkv.shape[1]:
        raise KernelInputError(f"rope_qkv_: rotated is {rotated}, expected 0 to {qkv.shape[1]} heads")
    if use_triton(impl, qkv):
        from deepdoctor.kernels import rope_triton

        rope_triton.rotate(qkv, qkv, cos, sin, rotated, rotated)
        return qkv
    heads = qkv[:, :rotated]
    _rotate_into(heads, heads, cos, sin)
    return qkv


@torch.no_grad()
def rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor, impl: Impl = "auto"
) -> Tensor:
    """Gradient of q, k and v side by side before the rotation: dq and dk rotated back, dv copied.

    dq        (T, N, H)  bf16 | fp16 | fp32, last dimension contiguous, other strides free; H even
    dk, dv    (T, K, H)  as dq
    cos, sin  (T, H/2)   fp32, as given to the forward; rounded to dq's dtype
    out       (T, at least (N+2K)H)  dtype of dq, rows contiguous, any row stride; its first (N+2K)H columns are written
    returns   out

    Raises KernelInputError on any mismatch above.
    """
    _check_heads("rope_backward", "dq", dq, None, dq)
    tokens, _, head_dim = dq.shape
    for name, grad in (("dk", dk), ("dv", dv)):
        heads = dk.shape[1] if dk.dim() == 3 else 0
        _check_heads("rope_backward", name, grad, (tokens, heads, head_dim), dq)
    _check_tables("rope_backward", dq, cos, sin)
    heads = dq.shape[1] + 2 * dk.shape[1]
    if out.dim() != 2 or out.shape[1] < heads * head_dim:
        raise KernelInputError(
            f"rope_backward: out is {tuple(out.shape)}, expected ({tokens}, {heads * head_dim} or more)"
        )
    check_rows("rope_backward", "out", out, (tokens, out.shape[1]), dq)
    if use_triton(impl, dq):
        from deepdoctor.kernels import rope_triton

        rope_triton.backward(dq, dk, dv, cos, sin, out)
        return out
    q_out, k_out, v_out = (
        out[:, : heads * head_dim].unflatten(1, (heads, head_dim)).split([dq.shape[1], dk.shape[1], dv.shape[1]], dim=1)
    )
    _rotate_into(q_out, dq, cos, -sin)
    _rotate_into(k_out, dk, cos, -sin)
    v_out.copy_(dv)
    return out


def _check_heads(op: str, name: str, x: Tensor, shape: tuple[int, ...] | None, like: Tensor) -> None:
    """Refuse a tensor that is not (T, heads, H) with an even H, or not like ``like``."""
    if x.dtype not in FLOAT_DTYPES:
        raise KernelInputError(f"{op}: {name} is {x.dtype}, expected bf16, fp16 or fp32")
    if x.dim() != 3 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise KernelInputError(f"{op}: {name} is {tuple(x.shape)}, expected (T, heads, H) with an even H")
    if (shape is not None and x.shape != shape) or x.dtype != like.dtype or x.device != like.device:
        raise KernelInputError(
            f"{op}: {name} is {tuple(x.shape)} {x.dtype} on {x.device}, expected {shape} {like.dtype} on {like.device}"
        )
    if x.stride(-1) != 1:
        raise KernelInputError(f"{op}: {name} has strides {x.stride()}, expected a contiguous last dimension")


def _tables_fit(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return all(
        table.dtype == torch.float32 and table.device == x.device and table.is_contiguous() for table in (cos, sin)
    )


def _check_tables(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    shape = (x.shape[0], x.shape[-1] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != shape or table.dtype != torch.float32 or table.device != x.device:
            raise KernelInputError(
                f"{op}: {name} is {tuple(table.shape)} {table.dtype} on {table.device}, "
                f"expected {shape} torch.float32 on {x.device}"
            )
        if not table.is_contiguous():
            raise KernelInputError(f"{op}: {name} has strides {table.stride()}, expected a contiguous tensor")
