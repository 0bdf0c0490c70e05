"""Keys and values of the answers being written: one stretch of memory per slot.

K key heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from deepdoctor.kernels.attention import attend_cached, attend_packed
from deepdoctor.model.decoder import Attend, Decoder

__all__ = ["SlotCache"]


class SlotCache:
    """Keys and values of every layer, (slots, K, positions, H) each."""

    def __init__(self, decoder: Decoder, slots: int, positions: int, dtype: torch.dtype):
        config = decoder.config
        self.key_heads = config.num_kv_heads
        shape = (config.num_layers, 2, slots, config.num_kv_heads, positions, config.head_dim)
        # Zeros, because a masked position still enters the sum with weight 0, and 0 times leftover nan is nan.
        self.kv = torch.zeros(shape, dtype=dtype, device=decoder.device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one slot's first ``length`` positions over another slot."""
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]

    def prefill(self, slots: Sequence[int], row_lengths: Sequence[int]) -> Attend:
        """Attention of whole prompts, which also fills the slots."""
        bounds = list(pairwise([0, *torch.tensor(row_lengths).cumsum(0).tolist()]))

        def attend(layer: int, qkv: Tensor) -> Tensor:
            kv = qkv[:, -2 * self.key_heads :].unflatten(1, (2, self.key_heads))
            for slot, (start, end) in zip(slots, bounds, strict=True):
                self.kv[layer, :, slot, :, : end - start] = kv[start:end].movedim(0, 2)
            return attend_packed(qkv, self.key_heads, row_lengths)

        return attend

    def decode(self, lengths: Tensor, longest: int, ragged: bool) -> Attend:
        """Attention of one new token per slot 0..n-1; lengths (n,) before the token is added."""
        count = lengths.shape[0]
        key_heads = self.key_heads
        rows = torch.arange(count, device=lengths.device)
        mask = None
        if ragged:
            beyond = torch.arange(longest, device=lengths.device) > lengths[:, None]
            mask = torch.zeros(count, longest, dtype=self.kv.dtype, device=lengths.device)
            mask = mask.masked_fill_(beyond, float("-inf"))[:, None, None]
        filled = self.kv[:, :, :count, :, :longest].unbind(0)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            kv = filled[layer]
            heads = qkv.shape[1] - 2 * key_heads
            fresh = qkv[:, heads:].unflatten(1, (2, key_heads))
            if ragged:
                kv[:, rows, :, lengths] = fresh
            else:
                kv[:, :, :, longest - 1] = fresh.transpose(0, 1)
            keys, values = kv.unbind(0)
            return attend_cached(qkv[:, :heads], keys, values, mask)

        return attend
