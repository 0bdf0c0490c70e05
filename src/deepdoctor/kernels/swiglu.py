"""SwiGLU on gate and up side by side: ``a = silu(g) * u``.

With s = sigmoid(g): ``du = da * g*s`` and ``dg = da * u * s * (1 + g*(1 - s))``. Only ``[g, u]`` is kept; silu is
computed again in backward, which costs less than storing a second (T, F) tensor. Source: Shazeer 2020 (arXiv
2002.05202).

``swiglu`` is for autograd. ``swiglu_forward`` and ``swiglu_backward_`` are for a backward written by hand: they record
nothing, compute in fp32 and round once, and the gradient takes the place of ``[g, u]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.rows import FLOAT_DTYPES, as_rows, check_rows

__all__ = ["swiglu", "swiglu_backward_", "swiglu_forward"]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, triton: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.triton = triton
        return _triton_forward(gate_up) if triton else _forward(gate_up)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        if ctx.triton:
            from deepdoctor.kernels import swiglu_triton

            grad = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
            swiglu_triton.backward(as_rows(gate_up), as_rows(da), as_rows(grad), None)
            return grad, None
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        d_gate, d_up = grad.chunk(2, dim=-1)
        torch.mul(functional.silu(gate), da, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(da * up, gate))
        return grad, None


def _forward(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _triton_forward(gate_up: Tensor) -> Tensor:
    from deepdoctor.kernels import swiglu_triton

    *rows, width = gate_up.shape
    out = torch.empty((*rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    swiglu_triton.forward(as_rows(gate_up), as_rows(out))
    return out


def swiglu(gate_up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Gate the second half of the last dimension by silu of the first.

    gate_up  (..., 2F)  bf16 | fp16 | fp32
    returns  (..., F)   same dtype

    Saved for backward: gate_up alone. Raises KernelInputError for an odd width.
    """
    if gate_up.shape[-1] % 2:
        raise KernelInputError(f"swiglu: gate_up is {tuple(gate_up.shape)}, expected an even last dimension")
    triton = use_triton(impl, gate_up) and gate_up.dtype in FLOAT_DTYPES and gate_up.numel() > 0
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwiGLU.apply(gate_up, triton)
    return _triton_forward(gate_up) if triton else _forward(gate_up)


@torch.no_grad()
def swiglu_forward(gate_up: Tensor, *, out: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """silu(gate) * up in fp32, rounded once; records no gradient.

    gate_up  (T, 2F)  bf16 | fp16 | fp32, rows contiguous, any row stride
    out      (T, F)   as gate_up; a new tensor where None; shares no memory with gate_up
    returns  out

    Raises KernelInputError on any mismatch above.
    """
    rows, width = _check_gate_up("swiglu_forward", gate_up)
    if out is None:
        out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    check_rows("swiglu_forward", "out", out, (rows, width), gate_up)
    if use_triton(impl, gate_up):
        from deepdoctor.kernels import swiglu_triton

        swiglu_triton.forward(gate_up, out)
        return out
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    return out.copy_(gate * torch.sigmoid(gate) * up)


@torch.no_grad()
def swiglu_backward_(gate_up: Tensor, d_act: Tensor, *, act: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """Overwrite gate_up by its gradient; in fp32, rounded once.

    gate_up  (T, 2F)  bf16 | fp16 | fp32, rows contiguous, any row stride; becomes [d_gate, d_up]
    d_act    (T, F)   as gate_up: the gradient of swiglu_forward's output
    act      (T, F)   as gate_up, or None: gets swiglu_forward's output, bit for bit; shares no memory with the others
    returns  gate_up

    Raises KernelInputError on any mismatch above.
    """
    shape = _check_gate_up("swiglu_backward_", gate_up)
    check_rows("swiglu_backward_", "d_act", d_act, shape, gate_up)
    if act is not None:
        check_rows("swiglu_backward_", "act", act, shape, gate_up)
    if use_triton(impl, gate_up):
        from deepdoctor.kernels import swiglu_triton

        swiglu_triton.backward(gate_up, d_act, gate_up, act)
        return gate_up
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    slope = torch.sigmoid(gate)
    silu = gate * slope
    if act is not None:
        act.copy_(silu * up)
    wide = d_act.float()
    d_gate = wide * up * (slope * (1 + gate * (1 - slope)))
    gate_up[:, shape[1] :] = wide * silu
    gate_up[:, : shape[1]] = d_gate
    return gate_up


def _check_gate_up(op: str, gate_up: Tensor) -> tuple[int, int]:
    """Refuse what is no (T, 2F) row view; return (T, F)."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise KernelInputError(f"{op}: gate_up is {tuple(gate_up.shape)}, expected (T, 2F)")
    check_rows(op, "gate_up", gate_up, gate_up.shape, gate_up)
    return gate_up.shape[0], gate_up.shape[1] // 2
