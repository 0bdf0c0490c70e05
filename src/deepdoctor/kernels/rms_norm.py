"""RMS norm: ``y = x / sqrt(mean(x^2) + eps) * w``, with w frozen.

With n = x / rms: ``dx = (w*dy - n * mean(n * w*dy)) / rms``. Source: Zhang & Sennrich 2019 (arXiv 1910.07467).

``rms_norm`` is for autograd. The others are for a backward written by hand and record nothing: ``add_rms_norm`` joins
the residual sum to the norm, ``rms_norm_backward`` joins the gradient to the residual's, ``normalise`` gives the same
y again from x and 1/rms. n is rounded to x's dtype before w multiplies it, as in the Llama and Qwen reference models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.rows import FLOAT_DTYPES, as_rows, check_rows

__all__ = ["add_rms_norm", "normalise", "rms_norm", "rms_norm_backward"]


class _RMSNorm(torch.autograd.Function):
    """Saves x and one fp32 number per token; the normalised x is recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, triton: bool) -> Tensor:
        y, rstd = _triton_forward(x, weight, eps) if triton else _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.triton = triton
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        if not ctx.triton:
            return _gradient(dy, x, rstd, weight).to(x.dtype), None, None, None
        from deepdoctor.kernels import rms_norm_triton

        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rms_norm_triton.backward(as_rows(dy), as_rows(x), rstd, weight, None, as_rows(dx))
        return dx, None, None, None


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    # vector_norm reads x once; pow(2).mean() would write and read a second copy.
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).to(x.dtype) * weight, rstd


def _gradient(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """dx in fp32; rstd has a last dimension of one."""
    n = x.float() * rstd
    g = dy.float() * weight.float()
    return g.addcmul_(n, (n * g).mean(-1, keepdim=True), value=-1).mul_(rstd)


def _triton_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from deepdoctor.kernels import rms_norm_triton

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rms_norm_triton.add_forward(as_rows(x), None, weight, eps, as_rows(y), rstd)
    return y, rstd


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: Impl = "auto") -> Tensor:
    """Normalise the last dimension of x by its root mean square, in fp32, and scale it.

    x       (..., D)  bf16 | fp16 | fp32
    weight  (D,)      same dtype and device; frozen, gets no gradient
    returns (..., D)  dtype of x

    Saved for backward: x and one fp32 number per row. Raises KernelInputError for a width or dtype that differs.
    """
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise KernelInputError(
            f"rms_norm: weight is {tuple(weight.shape)} {weight.dtype}, expected ({x.shape[-1]},) {x.dtype}"
        )
    triton = use_triton(impl, x) and x.dtype in FLOAT_DTYPES and weight.is_contiguous() and x.numel() > 0
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight, eps, triton)
    return (_triton_forward if triton else _forward)(x, weight, eps)[0]


@torch.no_grad()
def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, out: Tensor | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Add delta to x and normalise the sum; records no gradient.

    x       (T, D)  bf16 | fp16 | fp32, rows contiguous, any row stride; never written
    delta   (T, D)  as x, or None; overwritten by x + delta, rounded to its dtype
    weight  (D,)    dtype and device of x
    out     (T, D)  as x, for y; a new tensor where None; shares no memory with x and delta
    returns total (T, D): delta, or x where delta is None; y (T, D); rstd (T,) fp32, 1 / rms of total's rows

    The kernel holds a row in registers: made for D up to 16384. Raises KernelInputError on any mismatch above.
    """
    _check_norm("add_rms_norm", x, weight)
    if delta is not None:
        check_rows("add_rms_norm", "delta", delta, x.shape, x)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_rows("add_rms_norm", "out", out, x.shape, x)
    if use_triton(impl, x):
        from deepdoctor.kernels import rms_norm_triton

        rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        rms_norm_triton.add_forward(x, delta, weight, eps, out, rstd)
        return x if delta is None else delta, out, rstd
    total = x if delta is None else torch.add(x, delta, out=delta)
    y, rstd = _forward(total, weight, eps)
    return total, out.copy_(y), rstd.squeeze(-1)


@torch.no_grad()
def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    *,
    add: Tensor | None = None,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Gradient with respect to the normalised x, plus ``add``, summed in fp32 and rounded once.

    dy, x    (T, D)  bf16 | fp16 | fp32, rows contiguous, any row stride; x is add_rms_norm's total
    rstd     (T,)    fp32, from add_rms_norm
    weight   (D,)    dtype and device of x
    add      (T, D)  as x, or None: the gradient that came past the norm
    out      (T, D)  as x; may be add, dy or x; a new tensor where None
    returns  out

    Raises KernelInputError on any mismatch above.
    """
    _check_norm("rms_norm_backward", x, weight, rstd)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for name, rows in (("dy", dy), ("add", add), ("out", out)):
        if rows is not None:
            check_rows("rms_norm_backward", name, rows, x.shape, x)
    if use_triton(impl, x):
        from deepdoctor.kernels import rms_norm_triton

        rms_norm_triton.backward(dy, x, rstd, weight, add, out)
        return out
    dx = _gradient(dy, x, rstd.unsqueeze(-1), weight)
    return out.copy_(dx if add is None else dx.add_(add))


@torch.no_grad()
def normalise(x: Tensor, rstd: Tensor, weight: Tensor, *, out: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """y of ``add_rms_norm`` once more, bit for bit, from its total and rstd.

    x        (T, D)  bf16 | fp16 | fp32, rows contiguous, any row stride
    rstd     (T,)    fp32
    weight   (D,)    dtype and device of x
    out      (T, D)  as x; a new tensor where None
    returns  out

    Raises KernelInputError on any mismatch above.
    """
    _check_norm("normalise", x, weight, rstd)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_rows("normalise", "out", out, x.shape, x)
    if use_triton(impl, x):
        from deepdoctor.kernels import rms_norm_triton

        rms_norm_triton.normalise(x, rstd, weight, out)
        return out
    return out.copy_((x.float() * rstd.unsqueeze(-1)).to(x.dtype) * weight)


def _check_norm(op: str, x: Tensor, weight: Tensor, rstd: Tensor | None = None) -> None:
    if x.dim() != 2:
        raise KernelInputError(f"{op}: x is {tuple(x.shape)}, expected (T, D)")
    check_rows(op, "x", x, x.shape, x)
    for name, vector, size, dtype in (
        ("weight", weight, x.shape[1], x.dtype),
        ("rstd", rstd, x.shape[0], torch.float32),
    ):
        if vector is None:
            continue
        if vector.shape != (size,) or vector.dtype != dtype or vector.device != x.device:
            raise KernelInputError(
                f"{op}: {name} is {tuple(vector.shape)} {vector.dtype} on {vector.device}, "
                f"expected ({size},) {dtype} on {x.device}"
            )
        if not vector.is_contiguous():
            raise KernelInputError(f"{op}: {name} has stride {vector.stride(0)}, expected 1")
