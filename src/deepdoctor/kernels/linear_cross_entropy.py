"""Next-token loss straight from hidden states: the (T, V) logits are made in chunks and never kept.

``loss_t = logsumexp(h_t W^T) - h_t . w_label``. The head W is frozen, so with p = softmax(h W^T) the only gradient is
``dh = (p - onehot(label)) W``, which is computed in the same pass while the chunk's logits are at hand.
Source of the idea: Wijmans et al. 2024 (arXiv 2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError

__all__ = ["IGNORE_INDEX", "linear_cross_entropy"]

IGNORE_INDEX = -100
CHUNK_TOKENS = 256
"""256 rows of a 49,152-word vocabulary are 50 MB of fp32 logits, of 128,256 words 131 MB."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses, dh = _chunks(h, weight, labels, want_grad=True)
        ctx.save_for_backward(dh)
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (dh,) = ctx.saved_tensors
        return dh * d_losses[:, None].to(dh.dtype), None, None


def _chunks(h: Tensor, weight: Tensor, labels: Tensor, want_grad: bool) -> tuple[Tensor, Tensor | None]:
    losses = torch.empty(h.shape[0], dtype=torch.float32, device=h.device)
    dh = torch.empty_like(h) if want_grad else None
    for start in range(0, h.shape[0], CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        target = labels[part, None]
        logits = (h[part] @ weight.T).float()
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        losses[part] = (lse - logits.gather(1, target))[:, 0]
        if dh is not None:
            p = logits.sub_(lse).exp_()
            p.scatter_add_(1, target, torch.full_like(lse, -1.0))
            torch.mm(p.to(h.dtype), weight, out=dh[part])
    return losses, dh


def linear_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token's label, without keeping logits.

    h        (T, D)  bf16 | fp16 | fp32; only the positions that carry a label
    weight   (V, D)  frozen head, dtype of h
    labels   (T,)    int64 in [0, V)
    returns  (T,)    fp32, one loss per token, in nats

    Saved for backward: one (T, D) gradient. T = 0 gives an empty tensor. Raises KernelInputError on any mismatch above.
    """
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or labels.shape != h.shape[:1]:
        raise KernelInputError(
            f"linear_cross_entropy: h {tuple(h.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}; "
            "expected (T, D), (V, D), (T,)"
        )
    if h.dtype != weight.dtype or labels.dtype != torch.int64:
        raise KernelInputError(
            f"linear_cross_entropy: h {h.dtype}, weight {weight.dtype}, labels {labels.dtype}; "
            "expected one float dtype and int64"
        )
    # On a GPU the check would wait for the device; gather's own assertion speaks there.
    if labels.device.type == "cpu" and labels.numel():
        least, most = (int(bound) for bound in labels.aminmax())
        if least < 0 or most >= weight.shape[0]:
            wrong = least if least < 0 else most
            raise KernelInputError(f"linear_cross_entropy: a label is {wrong}; expected 0 to {weight.shape[0] - 1}")
    if torch.is_grad_enabled() and h.requires_grad:
        return _LinearCrossEntropy.apply(h, weight, labels)
    return _chunks(h, weight, labels, want_grad=False)[0]
