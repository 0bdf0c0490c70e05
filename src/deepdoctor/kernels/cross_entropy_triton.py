"""Triton twin of `cross_entropy_` and of the two steps over parts of a vocabulary; see linear_cross_entropy.py.

One program per row. The first pass reads the row in blocks and keeps a running maximum and, per lane, a running sum of
exponentials, so that only the maximum is reduced across lanes in each block. The second pass goes backwards over the
row: its end is what the cache still holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["accumulate_logsumexp", "cross_entropy_", "overwrite_with_gradient"]

LOWEST = tl.constexpr(-3.0e38)  # a finite start, so that a block of -inf gives no inf - inf


@triton.jit
def _logsumexp(row, vocab, blocks: tl.constexpr, block: tl.constexpr):
    lanes = tl.arange(0, block)
    largest = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((block,), tl.float32)
    for number in range(0, blocks):
        place = number * block + lanes
        x = tl.load(row + place, mask=place < vocab, other=float("-inf")).to(tl.float32)
        raised = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - raised) + tl.exp(x - raised)
        largest = raised
    return largest + tl.log(tl.sum(total, axis=0))


@triton.jit
def _overwrite(row, vocab, lse, label, blocks: tl.constexpr, block: tl.constexpr):
    lanes = tl.arange(0, block)
    for number in range(0, blocks):
        place = (blocks - 1 - number) * block + lanes
        x = tl.load(row + place, mask=place < vocab, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - lse)
        p = tl.where(place == label, p - 1.0, p)
        tl.store(row + place, p.to(row.dtype.element_ty), mask=place < vocab)


@triton.jit
def _cross_entropy_kernel(
    logits, labels, losses, vocab, want_grad: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocab
    label = tl.load(labels + token)
    # Before anything is overwritten: the reductions of the first pass wait for every lane.
    own = tl.load(row + label, mask=(label >= 0) & (label < vocab), other=float("nan")).to(tl.float32)
    lse = _logsumexp(row, vocab, blocks, block)
    tl.store(losses + token, lse - own)
    if want_grad:
        _overwrite(row, vocab, lse, label, blocks, block)


@triton.jit(do_not_specialize=["first"])
def _accumulate_kernel(logits, labels, lse, target, first, vocab, blocks: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocab
    label = tl.load(labels + token) - first
    inside = (label >= 0) & (label < vocab)
    own = tl.load(row + label, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + token, own, mask=inside)
    here = _logsumexp(row, vocab, blocks, block)
    before = tl.load(lse + token)
    larger = tl.maximum(here, before)
    tl.store(lse + token, larger + tl.log(tl.exp(here - larger) + tl.exp(before - larger)))


@triton.jit(do_not_specialize=["first"])
def _gradient_kernel(logits, labels, lse, first, vocab, blocks: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token) - first
    _overwrite(logits + token * vocab, vocab, tl.load(lse + token), label, blocks, block)


def cross_entropy_(logits: Tensor, labels: Tensor, losses: Tensor, want_grad: bool) -> None:
    """`linear_cross_entropy.cross_entropy_` on arguments already checked; all contiguous.

    A label outside the vocabulary gives a loss of nan.
    """
    rows, vocab = logits.shape
    if rows:
        blocks, block, warps = _blocks(vocab, logits.dtype)
        _cross_entropy_kernel[(rows,)](logits, labels, losses, vocab, want_grad, blocks, block, num_warps=warps)


def accumulate_logsumexp(logits: Tensor, labels: Tensor, first: int, lse: Tensor, target: Tensor) -> None:
    """Add the part of the vocabulary from ``first`` on to lse (C,); note the labels' logits in target (C,)."""
    rows, vocab = logits.shape
    if rows and vocab:
        blocks, block, warps = _blocks(vocab, logits.dtype)
        _accumulate_kernel[(rows,)](logits, labels, lse, target, first, vocab, blocks, block, num_warps=warps)


def overwrite_with_gradient(logits: Tensor, labels: Tensor, first: int, lse: Tensor) -> None:
    """Replace the part's logits (C, V_i) by p - onehot(label), with the logsumexp (C,) of the whole vocabulary."""
    rows, vocab = logits.shape
    if rows and vocab:
        blocks, block, warps = _blocks(vocab, logits.dtype)
        _gradient_kernel[(rows,)](logits, labels, lse, first, vocab, blocks, block, num_warps=warps)


def _blocks(vocab: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Blocks, elements of each (16 kB of logits) and warps: 16 elements a thread, two or four loads of 16 bytes."""
    block = min(triton.next_power_of_2(vocab), 16384 // dtype.itemsize)
    return triton.cdiv(vocab, block), block, min(max(block // 512, 1), 16)
