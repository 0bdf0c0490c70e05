"""SwiGLU and the thin products of LoRA that read its output, in one pass over memory.

Forward, with A of the down projection, ``act`` as in ``swiglu.py`` and rounded before the product::

    act = silu(g) * up        u = act A^T

Backward, with B of the gate and up projections::

    [dg, dup] = d act         v = [dg B_gate, dup B_up]

u and v have a few columns, act and [dg, dup] thousands: a product of its own reads all of that again. Sums are fp32 and
rounded once; act, dg and dup are those of ``swiglu.py``, bit for bit. What the kernel does not take runs as two passes:
fp32, more than 32 columns from one adapter, cards before compute capability 8.0.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.rows import check_rows
from deepdoctor.kernels.swiglu import swiglu_backward_, swiglu_forward

__all__ = ["swiglu_lora_backward_", "swiglu_lora_forward"]

WIDEST = 32


@functools.cache
def _card_can(device: int) -> bool:
    # Triton multiplies 16-bit matrices on tensor cores from 8.0.
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _fused(impl: Impl, gate_up: Tensor, *ranks: int) -> bool:
    """Whether the kernel takes dtype, card and ranks."""
    if not use_triton(impl, gate_up) or gate_up.dtype == torch.float32 or not 0 < max(ranks) <= WIDEST:
        return False
    return not gate_up.is_cuda or _card_can(gate_up.get_device())


def _check_gate_up(op: str, gate_up: Tensor) -> tuple[int, int]:
    """Refuse what is no (T, 2F) row view; return (T, F)."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise KernelInputError(f"{op}: gate_up is {tuple(gate_up.shape)}, expected (T, 2F)")
    check_rows(op, "gate_up", gate_up, gate_up.shape, gate_up)
    return gate_up.shape[0], gate_up.shape[1] // 2


def _check_a(op: str, a: Tensor, u: Tensor, gate_up: Tensor) -> int:
    """Refuse what is not a (R, F) with u (T, R); return R."""
    rank = a.shape[0] if a.dim() else 0
    check_rows(op, "a", a, (rank, gate_up.shape[1] // 2), gate_up)
    check_rows(op, "u", u, (gate_up.shape[0], rank), gate_up)
    return rank


@torch.no_grad()
def swiglu_lora_forward(gate_up: Tensor, a: Tensor, *, act: Tensor, u: Tensor, impl: Impl = "auto") -> None:
    """act = silu(gate) * up and u = act a^T; records no gradient.

    gate_up  (T, 2F)  bf16 | fp16 | fp32, rows contiguous, any row stride
    a        (R, F)   as gate_up
    act      (T, F)   as gate_up; written
    u        (T, R)   as gate_up; written

    act and u share no memory with each other and the inputs, but may be columns of one buffer. Raises KernelInputError
    on any mismatch above.
    """
    op = "swiglu_lora_forward"
    shape = _check_gate_up(op, gate_up)
    check_rows(op, "act", act, shape, gate_up)
    rank = _check_a(op, a, u, gate_up)
    if _fused(impl, gate_up, rank):
        from deepdoctor.kernels import swiglu_lora_triton

        swiglu_lora_triton.forward(gate_up, a, act, u)
        return
    swiglu_forward(gate_up, out=act, impl=impl)
    torch.mm(act, a.T, out=u)


@torch.no_grad()
def swiglu_lora_backward_(
    gate_up: Tensor,
    d_act: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    *,
    v: Tensor,
    act: Tensor | None = None,
    a: Tensor | None = None,
    u: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Overwrite gate_up by its gradient [dg, dup], and v by [dg b_gate, dup b_up, 0].

    gate_up  (T, 2F)   bf16 | fp16 | fp32, rows contiguous, any row stride
    d_act    (T, F)    as gate_up: the gradient of act
    b_gate   (F, Rg)   as gate_up, or None: no columns in v
    b_up     (F, Ru)   likewise
    v        (T, R)    as gate_up, R at least Rg + Ru; written, zeros behind those columns
    act      (T, F)    as gate_up, or None: gets swiglu_lora_forward's act, bit for bit
    a, u     (R', F), (T, R')  as in swiglu_lora_forward, or None; u gets its u, bit for bit. Only with act

    What is written shares no memory with anything else. Raises KernelInputError on any mismatch above.
    """
    op = "swiglu_lora_backward_"
    rows, width = shape = _check_gate_up(op, gate_up)
    check_rows(op, "d_act", d_act, shape, gate_up)
    ranks = []
    for name, b in (("b_gate", b_gate), ("b_up", b_up)):
        if b is not None:
            check_rows(op, name, b, (width, b.shape[1] if b.dim() == 2 else 0), gate_up)
        ranks.append(0 if b is None else b.shape[1])
    check_rows(op, "v", v, (rows, v.shape[1] if v.dim() == 2 else 0), gate_up)
    used = sum(ranks)
    if v.shape[1] < used:
        raise KernelInputError(f"{op}: v has {v.shape[1]} columns, expected at least {used}: b_gate's and b_up's")
    if act is not None:
        check_rows(op, "act", act, shape, gate_up)
    if (a is None) != (u is None) or (a is not None and act is None):
        raise KernelInputError(f"{op}: a, u and act go together, but not all are given", "give act, or act, a and u")
    if a is not None and u is not None:
        ranks.append(_check_a(op, a, u, gate_up))
    if v.shape[1] > used:
        v[:, used:].zero_()
    if _fused(impl, gate_up, *ranks):
        from deepdoctor.kernels import swiglu_lora_triton

        swiglu_lora_triton.backward(gate_up, d_act, b_gate, b_up, v, act, a, u)
        return
    swiglu_backward_(gate_up, d_act, act=act, impl=impl)
    if b_gate is not None:
        torch.mm(gate_up[:, :width], b_gate, out=v[:, : ranks[0]])
    if b_up is not None:
        torch.mm(gate_up[:, width:], b_up, out=v[:, ranks[0] : used])
    if act is not None and a is not None and u is not None:
        torch.mm(act, a.T, out=u)
