"""RMS norm: ``y = x / sqrt(mean(x^2) + eps) * w``, with w frozen.

With n = x / rms: ``dx = (w*dy - n * mean(n * w*dy)) / rms``. Source: Zhang & Sennrich 2019 (arXiv 1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError

__all__ = ["rms_norm"]


class _RMSNorm(torch.autograd.Function):
    """Saves x and one fp32 number per token; the normalised x is recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        n = x.float() * rstd
        g = dy.float() * weight.float()
        g.addcmul_(n, (n * g).mean(-1, keepdim=True), value=-1).mul_(rstd)
        return g.to(x.dtype), None, None


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    # vector_norm reads x once; pow(2).mean() would write and read a second copy.
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    # The product is rounded to x's dtype before the weight, as the Llama and Qwen reference models do.
    return (wide * rstd).to(x.dtype) * weight, rstd


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
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
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight, eps)
    return _forward(x, weight, eps)[0]
