"""A frozen linear layer with low-rank adapters on its output blocks.

Several projections share one input (q, k, v; gate, up), so their frozen weights are one matrix W (O, I), their A
matrices one (R*, I), and B is kept per block::

    u  = s x A^T                      (T, R*)
    y  = x W^T + [u_1 B_1^T, ...]     (T, O)
    v  = [s dy_1 B_1, ...]            (T, R*)
    dx = dy W + v A      dA = v^T x      dB_i = dy_i^T u_i

In 16 bits base and adapter are one product over [x, u] and [W, B], so that their sum is rounded once. Adding to a
base that is rounded already would lose whatever is below half a unit in its last place: most of a young adapter
(docs/decisions/0009-adapters-round-once.md). W may be quantised: it is a callable that returns the dense matrix, asked
again in backward rather than kept.
Source: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.errors import KernelInputError

__all__ = ["block_diagonal", "lora_linear"]

Dense = Callable[[], Tensor]


def block_diagonal(like: Tensor, blocks: Sequence[Tensor], starts: Sequence[int], height: int) -> Tensor:
    """The blocks (O_i, R_i) side by side in zeros (height, R*) like ``like``, each with its first row at its start."""
    found = like.new_zeros(height, sum(block.shape[1] for block in blocks))
    at = 0
    for start, block in zip(starts, blocks, strict=True):
        found[start : start + block.shape[0], at : at + block.shape[1]] = block
        at += block.shape[1]
    return found


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, bs: Sequence[Tensor], blocks: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    u = functional.linear(x, a).mul_(scale)
    if x.dtype != torch.float32:
        border = block_diagonal(weight, bs, blocks, weight.shape[0])
        return functional.linear(torch.cat([x, u], -1), torch.cat([weight, border], 1), bias), u
    y = functional.linear(x, weight, bias)
    rank_at = 0
    for start, b in zip(blocks, bs, strict=True):
        rank = b.shape[1]
        y[:, start : start + b.shape[0]].addmm_(u[:, rank_at : rank_at + rank], b.T)
        rank_at += rank
    return y, u


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dense: Dense,
        bias: Tensor | None,
        a: Tensor,
        blocks: tuple[int, ...],
        scale: float,
        *bs: Tensor,
    ) -> Tensor:
        y, u = _forward(x, dense(), bias, a, bs, blocks, scale)
        ctx.save_for_backward(x, u, a, *bs)
        ctx.dense, ctx.blocks, ctx.scale = dense, blocks, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, u, a, *bs = ctx.saved_tensors
        v = torch.empty_like(u)
        d_bs = []
        rank_at = 0
        for start, b in zip(ctx.blocks, bs, strict=True):
            block = dy[:, start : start + b.shape[0]]
            ranks = slice(rank_at, rank_at + b.shape[1])
            v[:, ranks] = block @ b
            d_bs.append(block.T @ u[:, ranks])
            rank_at += b.shape[1]
        v.mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            if dy.dtype == torch.float32:
                dx = (dy @ ctx.dense()).addmm_(v, a)
            else:
                dx = torch.cat([dy, v], -1) @ torch.cat([ctx.dense(), a])
        return dx, None, None, v.T @ x, None, None, *d_bs


def lora_linear(
    x: Tensor, dense: Dense, bias: Tensor | None, a: Tensor, bs: Sequence[Tensor], blocks: Sequence[int], scale: float
) -> Tensor:
    """Apply a frozen linear layer plus its adapters.

    x        (T, I)   bf16 | fp16 | fp32
    dense    () -> (O, I) in x's dtype; called once in forward and once in backward
    bias     (O,) or None, frozen
    a        (R*, I)  the A matrices of the adapted blocks, one below the other
    bs       each (O_i, R_i), in the order of a's rows
    blocks   first output column of each adapted block
    scale    alpha / R (or alpha / sqrt(R))
    returns  (T, O)

    Gradients: x, a, bs. Saved for backward: x, u (T, R*), a, bs. Raises KernelInputError where ranks do not add up.
    """
    if sum(b.shape[1] for b in bs) != a.shape[0] or a.shape[1] != x.shape[-1] or len(bs) != len(blocks):
        raise KernelInputError(
            f"lora_linear: x {tuple(x.shape)}, a {tuple(a.shape)}, bs {[tuple(b.shape) for b in bs]}, "
            f"blocks {list(blocks)} do not fit"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, a, *bs)):
        return _LoraLinear.apply(x, dense, bias, a, tuple(blocks), scale, *bs)
    return _forward(x, dense(), bias, a, bs, blocks, scale)[0]
