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
    """Keys and values of every layer, (slots, positions, 2K, H): those of one token lie together."""

    def __init__(self, decoder: Decoder, slots: int, positions: int, dtype: torch.dtype):
        config = decoder.config
        self.key_heads = config.num_kv_heads
        self.positions = positions
        shape = (config.num_layers, slots, positions, 2 * config.num_kv_heads, config.head_dim)
        # Zeros, because a masked position still enters the sum with weight 0, and 0 times leftover nan is nan.
        self.kv = torch.zeros(shape, dtype=dtype, device=decoder.device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one slot's first ``length`` positions over another slot."""
        self.kv[:, target, :length] = self.kv[:, source, :length]

    def prefill(self, slots: Sequence[int], row_lengths: Sequence[int]) -> Attend:
        """Attention of whole prompts, which also fills the slots."""
        bounds = list(pairwise([0, *torch.tensor(row_lengths).cumsum(0).tolist()]))

        def attend(layer: int, qkv: Tensor) -> Tensor:
            fresh = qkv[:, -2 * self.key_heads :]
            for slot, (start, end) in zip(slots, bounds, strict=True):
                self.kv[layer, slot, : end - start] = fresh[start:end]
            return attend_packed(qkv, self.key_heads, row_lengths)

        return attend

    def decode(self, lengths: Tensor, longest: int, ragged: bool) -> Attend:
        """Attention of one new token per slot 0..n-1; lengths (n,) before the token is added.

        Queries, keys and values are rounded to the cache's dtype, which is that of the result.
        """
        count, dtype = lengths.shape[0], self.kv.dtype
        key_heads = self.key_heads
        mask = None
        if ragged:
            beyond = torch.arange(longest, device=lengths.device) > lengths[:, None]
            mask = torch.zeros(count, longest, dtype=dtype, device=lengths.device)
            mask = mask.masked_fill_(beyond, float("-inf"))[:, None, None]
        # One index over all slots: index_copy_ writes whole tokens, in a third of the time of an assignment by two.
        tokens = self.kv.flatten(1, 2).unbind(0)
        places = torch.arange(count, device=lengths.device).mul_(self.positions).add_(lengths)
        filled = self.kv[:, :count, :longest].transpose(2, 3)
        keys, values = filled[:, :, :key_heads].unbind(0), filled[:, :, key_heads:].unbind(0)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            qkv = qkv.to(dtype)
            heads = qkv.shape[1] - 2 * key_heads
            tokens[layer].index_copy_(0, places, qkv[:, heads:])
            return attend_cached(qkv[:, :heads], keys[layer], values[layer], mask)

        return attend
