"""SwiGLU on gate and up side by side: ``a = silu(g) * u``.

Only ``[g, u]`` is kept; silu is computed again in backward, which costs less than storing a second (T, F) tensor.
Source: Shazeer 2020 (arXiv 2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.errors import KernelInputError

__all__ = ["swiglu"]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        d_gate, d_up = grad.chunk(2, dim=-1)
        torch.mul(functional.silu(gate), da, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(da * up, gate))
        return grad


def _forward(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate the second half of the last dimension by silu of the first.

    gate_up  (..., 2F)  bf16 | fp16 | fp32
    returns  (..., F)   same dtype

    Saved for backward: gate_up alone. Raises KernelInputError for an odd width.
    """
    if gate_up.shape[-1] % 2:
        raise KernelInputError(f"swiglu: gate_up is {tuple(gate_up.shape)}, expected an even last dimension")
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwiGLU.apply(gate_up)
    return _forward(gate_up)
