"""Next-token loss straight from hidden states: the (T, V) logits are made in parts and never kept.

``loss_t = logsumexp(h_t W^T) - h_t . w_label``. The head W is frozen, so with p = softmax(h W^T) the only gradient is
``dh = (p - onehot(label)) W``, which is computed in the same pass while the logits are at hand.

Two ways to cut (T, V). By tokens: each chunk of rows sees the whole head, so one pass is enough. By vocabulary: each
part of the head is needed twice, once for the logsumexp over all parts, once for p and dh; for a head that is kept in
4 bits or in host memory, of which one part at a time is in the dtype of h.
Source of the idea: Wijmans et al. 2024 (arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.rows import FLOAT_DTYPES, is_row_view

__all__ = [
    "CHUNK_TOKENS",
    "IGNORE_INDEX",
    "cross_entropy_",
    "linear_cross_entropy",
    "linear_cross_entropy_backward_chunks",
    "linear_cross_entropy_by_vocabulary",
]

IGNORE_INDEX = -100
CHUNK_TOKENS = 256
"""256 rows of a 49,152-word vocabulary are 50 MB of fp32 logits, of 128,256 words 131 MB."""
PART_LOGITS = 1 << 26
"""Logits made at once when the head comes in parts: 134 MB in bf16."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, impl: Impl) -> Tensor:
        losses, dh = _chunks(h, weight, labels, 1.0, CHUNK_TOKENS, torch.empty_like(h), impl)
        ctx.save_for_backward(dh)
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (dh,) = ctx.saved_tensors
        return dh * d_losses[:, None].to(dh.dtype), None, None, None


def linear_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Cross-entropy of each token's label, without keeping logits.

    h        (T, D)  bf16 | fp16 | fp32; only the positions that carry a label
    weight   (V, D)  frozen head, dtype of h
    labels   (T,)    int64 in [0, V)
    returns  (T,)    fp32, one loss per token, in nats

    Saved for backward: one (T, D) gradient. T = 0 gives an empty tensor. Raises KernelInputError on any mismatch above.
    """
    _check("linear_cross_entropy", h, weight, labels)
    if torch.is_grad_enabled() and h.requires_grad:
        return _LinearCrossEntropy.apply(h, weight, labels, impl)
    return _chunks(h, weight, labels, None, CHUNK_TOKENS, None, impl)[0]


@torch.no_grad()
def linear_cross_entropy_backward_chunks(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | None,
    chunk_tokens: int = CHUNK_TOKENS,
    out_dh: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Loss of each token and the gradient of ``scale`` times their sum, in one pass over chunks of tokens.

    h, weight, labels  as in `linear_cross_entropy`
    scale              factor of the gradient, applied before it is rounded; None: losses only
    chunk_tokens       rows of logits made at once
    out_dh             (T, D) row view for the gradient, which may be h itself; allocated when None
    returns            losses (T,) fp32 and dh (T, D) in h's dtype, or None where scale is None

    Raises KernelInputError on any mismatch above.
    """
    _check("linear_cross_entropy_backward_chunks", h, weight, labels)
    if chunk_tokens < 1:
        raise KernelInputError(f"linear_cross_entropy_backward_chunks: chunk_tokens is {chunk_tokens}; expected >= 1")
    if scale is None:
        return _chunks(h, weight, labels, None, chunk_tokens, None, impl)
    if out_dh is None:
        out_dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    elif out_dh.shape != h.shape or out_dh.dtype != h.dtype or out_dh.device != h.device or not is_row_view(out_dh):
        raise KernelInputError(
            f"linear_cross_entropy_backward_chunks: out_dh is {tuple(out_dh.shape)} {out_dh.dtype} on {out_dh.device}, "
            f"strides {out_dh.stride()}; expected {tuple(h.shape)} {h.dtype} on {h.device} with contiguous rows"
        )
    return _chunks(h, weight, labels, scale, chunk_tokens, out_dh, impl)


@torch.no_grad()
def linear_cross_entropy_by_vocabulary(
    h: Tensor,
    head_parts: Sequence[Callable[[], Tensor]],
    labels: Tensor,
    *,
    scale: float | None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The same from a head that comes in parts of its rows, each asked for twice (once where scale is None).

    h, labels   as in `linear_cross_entropy`
    head_parts  each call returns (V_i, D) in h's dtype on h's device; it is done with before the next call
    scale       factor of the gradient; None: losses only
    returns     losses (T,) fp32 and dh (T, D) in h's dtype, summed over the parts in fp32, or None

    Raises KernelInputError on any mismatch above.
    """
    name = "linear_cross_entropy_by_vocabulary"
    _check_labels(name, labels, None)
    fits = h.dim() == 2 and h.dtype in FLOAT_DTYPES and labels.shape == h.shape[:1] and labels.device == h.device
    if not fits or not head_parts:
        raise KernelInputError(
            f"{name}: h {tuple(h.shape)} {h.dtype} on {h.device}, labels {tuple(labels.shape)} on {labels.device}, "
            f"{len(head_parts)} parts; expected (T, D) of a float dtype, (T,) on the same device, at least one part"
        )
    triton = use_triton(impl, h)
    labels = labels.contiguous()
    lse = torch.full(labels.shape, -torch.inf, dtype=torch.float32, device=h.device)
    target = torch.full_like(lse, torch.nan)  # stays nan where no part holds the label
    vocab = 0
    for part in head_parts:
        weight = _part(part, h)
        for rows, logits in _part_logits(h, weight):
            accumulate = _triton().accumulate_logsumexp if triton else _accumulate_logsumexp
            accumulate(logits, labels[rows], vocab, lse[rows], target[rows])
        vocab += weight.shape[0]
        del weight
    _check_labels(name, labels, vocab)
    losses = lse - target
    if scale is None:
        return losses, None
    wide = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    first = 0
    for part in head_parts:
        weight = _part(part, h)
        for rows, logits in _part_logits(h, weight):
            overwrite = _triton().overwrite_with_gradient if triton else _overwrite_with_gradient
            overwrite(logits, labels[rows], first, lse[rows])
            wide[rows].add_(_matmul_fp32(logits, weight), alpha=scale)
        first += weight.shape[0]
        del weight
    return losses, wide.to(h.dtype)


@torch.no_grad()
def cross_entropy_(
    logits: Tensor, labels: Tensor, losses: Tensor, *, want_grad: bool = True, impl: Impl = "auto"
) -> Tensor:
    """Loss of each row of logits, which then become the gradient of the losses' sum.

    logits   (C, V)  bf16 | fp16 | fp32, contiguous; with want_grad overwritten by softmax(logits) - onehot(labels)
    labels   (C,)    int64 in [0, V)
    losses   (C,)    fp32, contiguous; overwritten by logsumexp(logits) - logits[label], in nats
    returns  logits

    fp32 inside, one rounding. The label check waits for no GPU: there the Triton kernel gives a loss of nan.
    Raises KernelInputError on any mismatch above.
    """
    fits = logits.dim() == 2 and logits.is_contiguous() and logits.dtype in FLOAT_DTYPES
    if not fits or labels.shape != logits.shape[:1] or losses.shape != labels.shape or losses.dtype != torch.float32:
        raise KernelInputError(
            f"cross_entropy_: logits {tuple(logits.shape)} {logits.dtype}, strides {logits.stride()}, labels "
            f"{tuple(labels.shape)}, losses {tuple(losses.shape)} {losses.dtype}; expected contiguous (C, V), (C,), "
            "(C,) torch.float32"
        )
    if not losses.is_contiguous() or {labels.device, losses.device} != {logits.device}:
        raise KernelInputError(
            f"cross_entropy_: losses have strides {losses.stride()} on {losses.device}, labels are on {labels.device}; "
            f"expected contiguous losses, all on {logits.device}"
        )
    _check_labels("cross_entropy_", labels, logits.shape[1])
    _cross_entropy_(logits, labels.contiguous(), losses, want_grad, use_triton(impl, logits))
    return logits


def _chunks(
    h: Tensor, weight: Tensor, labels: Tensor, scale: float | None, chunk_tokens: int, dh: Tensor | None, impl: Impl
) -> tuple[Tensor, Tensor | None]:
    triton = use_triton(impl, h)
    labels = labels.contiguous()
    losses = torch.empty(h.shape[0], dtype=torch.float32, device=h.device)
    buffer = torch.empty((min(chunk_tokens, h.shape[0]), weight.shape[0]), dtype=h.dtype, device=h.device)
    for start in range(0, h.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        rows = h[part]
        logits = torch.mm(rows, weight.T, out=buffer[: len(rows)])
        if dh is None and not triton:
            _losses_(logits, labels[part], losses[part])
            continue
        _cross_entropy_(logits, labels[part], losses[part], dh is not None, triton)
        if dh is not None:
            # beta = 0: what dh holds is not read.
            dh[part].addmm_(logits, weight, beta=0, alpha=1.0 if scale is None else scale)
    return losses, dh


def _cross_entropy_(logits: Tensor, labels: Tensor, losses: Tensor, want_grad: bool, triton: bool) -> None:
    if triton:
        _triton().cross_entropy_(logits, labels, losses, want_grad)
        return
    target = labels[:, None]
    wide = logits.float()
    lse = torch.logsumexp(wide, dim=-1, keepdim=True)
    losses.copy_((lse - wide.gather(1, target))[:, 0])
    if want_grad:
        p = wide.sub_(lse).exp_()
        p.scatter_add_(1, target, torch.full_like(lse, -1.0))
        if p is not logits:
            logits.copy_(p)


def _losses_(logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    """Losses alone; logits are spent. torch.logsumexp makes a second (C, V), which takes four times as long."""
    wide = logits.float()
    most, own = wide.amax(-1, keepdim=True), wide.gather(1, labels[:, None])
    lse = wide.sub_(most).exp_().sum(-1, keepdim=True).log_().add_(most)
    losses.copy_((lse - own)[:, 0])


def _accumulate_logsumexp(logits: Tensor, labels: Tensor, first: int, lse: Tensor, target: Tensor) -> None:
    """Add the part of the vocabulary from ``first`` on to lse (C,); note the labels' logits in target (C,)."""
    wide = logits.float()
    torch.logaddexp(lse, torch.logsumexp(wide, dim=-1), out=lse)
    place = labels - first
    inside = (place >= 0) & (place < logits.shape[1])
    own = wide.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    target.copy_(torch.where(inside, own, target))


def _overwrite_with_gradient(logits: Tensor, labels: Tensor, first: int, lse: Tensor) -> None:
    """Replace the part's logits (C, V_i) by p - onehot(label), with the logsumexp of the whole vocabulary."""
    p = logits.float().sub_(lse[:, None]).exp_()
    place = labels - first
    inside = (place >= 0) & (place < logits.shape[1])
    p.scatter_add_(1, place.clamp(0, logits.shape[1] - 1)[:, None], -inside[:, None].to(p.dtype))
    logits.copy_(p)


def _part(part: Callable[[], Tensor], h: Tensor) -> Tensor:
    weight = part()
    if weight.dim() != 2 or weight.shape[1] != h.shape[1] or weight.dtype != h.dtype or weight.device != h.device:
        raise KernelInputError(
            f"linear_cross_entropy_by_vocabulary: a part is {tuple(weight.shape)} {weight.dtype} on {weight.device}; "
            f"expected (V_i, {h.shape[1]}) {h.dtype} on {h.device}"
        )
    return weight


def _part_logits(h: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of tokens, their logits over this part), at most PART_LOGITS numbers at once."""
    step = max(1, PART_LOGITS // max(1, weight.shape[0]))
    buffer = torch.empty((min(step, h.shape[0]), weight.shape[0]), dtype=h.dtype, device=h.device)
    for start in range(0, h.shape[0], step):
        rows = slice(start, start + step)
        part = h[rows]
        yield rows, torch.mm(part, weight.T, out=buffer[: len(part)])


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with the sum left in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _triton() -> Any:
    from deepdoctor.kernels import cross_entropy_triton

    return cross_entropy_triton


def _check(name: str, h: Tensor, weight: Tensor, labels: Tensor) -> None:
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or labels.shape != h.shape[:1]:
        raise KernelInputError(
            f"{name}: h {tuple(h.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}; "
            "expected (T, D), (V, D), (T,)"
        )
    if h.dtype != weight.dtype or labels.dtype != torch.int64:
        raise KernelInputError(
            f"{name}: h {h.dtype}, weight {weight.dtype}, labels {labels.dtype}; expected one float dtype and int64"
        )
    if {weight.device, labels.device} != {h.device}:
        raise KernelInputError(f"{name}: h is on {h.device}, weight on {weight.device}, labels on {labels.device}")
    _check_labels(name, labels, weight.shape[0])


def _check_labels(name: str, labels: Tensor, vocab: int | None) -> None:
    if labels.dtype != torch.int64:
        raise KernelInputError(f"{name}: labels are {labels.dtype}; expected torch.int64")
    # On a GPU the check would wait for the device; gather's own assertion, or a loss of nan, speaks there.
    if vocab is not None and labels.device.type == "cpu" and labels.numel():
        least, most = (int(bound) for bound in labels.aminmax())
        if least < 0 or most >= vocab:
            wrong = least if least < 0 else most
            raise KernelInputError(f"{name}: a label is {wrong}; expected 0 to {vocab - 1}")
