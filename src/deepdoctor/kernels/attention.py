"""Causal attention over packed rows: tokens of one row never see another row.

Rows lie one after another in (T, N, H); ``row_lengths`` says where they end. Each row is one call of PyTorch's fused
attention, so memory stays linear in T and no (T, T) mask exists. Several rows on a GPU that need no gradient go through
one call instead. Queries share keys and values in groups of N / K heads (GQA, arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.flash_attention import PackedRows, attend_row, attention_forward, flash_can

__all__ = ["attend_cached", "attend_packed"]


def attend_packed(qkv: Tensor, key_heads: int, row_lengths: Sequence[int]) -> Tensor:
    """Attend causally within each packed row.

    qkv          (T, N + 2K, H)  bf16 | fp16 | fp32; N query heads, then K key heads, then K value heads
    key_heads    K; N is a multiple of it
    row_lengths  tokens of each row in order; they add up to T
    returns      (T, N, H)

    Raises KernelInputError where the lengths or heads do not fit.
    """
    heads = qkv.shape[1] - 2 * key_heads if qkv.dim() == 3 else 0
    fits = heads >= 1 and key_heads >= 1 and heads % key_heads == 0
    if not fits or sum(row_lengths) != qkv.shape[0] or min(row_lengths, default=0) < 0:
        raise KernelInputError(
            f"attend_packed: qkv {tuple(qkv.shape)}, {key_heads} key heads, rows {list(row_lengths)[:8]} do not fit: "
            "rows must add up to T, query heads be a multiple of key heads"
        )
    if qkv.is_cuda and len(row_lengths) > 1 and _can_join(qkv):
        return attention_forward(qkv, key_heads, PackedRows.of(row_lengths, qkv.device), backend="flash")[0]
    rows = [attend_row(row, key_heads) for row in qkv.split(list(row_lengths))]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def attend_cached(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from one new token per slot to that slot's cache.

    q                 (B, N, H)
    k_cache, v_cache  (B, K, T, H)  the first ``lengths[b]`` positions of slot b are filled
    mask              (B, 1, 1, T)  0 where filled, -inf elsewhere, dtype of q; None where every slot is full to T
    returns           (B, N, H)

    The N / K queries of a group are laid out as a short sequence, so keys and values are read once and not repeated.
    """
    slots, heads, head_dim = q.shape
    groups = k_cache.shape[1]
    out = functional.scaled_dot_product_attention(
        q.reshape(slots, groups, heads // groups, head_dim), k_cache, v_cache, attn_mask=mask
    )
    return out.reshape(slots, heads, head_dim)


def _can_join(qkv: Tensor) -> bool:
    """Whether all rows can go through one call that keeps nothing for a gradient."""
    wants_gradient = torch.is_grad_enabled() and qkv.requires_grad
    return not wants_gradient and qkv.is_contiguous() and flash_can(qkv.device, qkv.dtype, qkv.shape[2])
