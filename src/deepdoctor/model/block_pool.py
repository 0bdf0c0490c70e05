"""Keys and values in blocks of 64 positions: who holds which block, what is in them, and how many there can be.

A slot holds as many blocks as its positions fill, so a short answer takes no memory that a long one could use, and
equal prompts hold the same blocks. The blocks of a layer are what ``kernels/paged_attention.py`` reads: in the compute
dtype, or in 8 bits, which takes half the memory. A prompt attends to its own keys and values before they are rounded.

K key heads, H head dim, V vocabulary. Paging: Kwon et al. 2023 (arXiv 2309.06180).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from deepdoctor.errors import CacheFull, ModelError
from deepdoctor.kernels.attention import attend_packed
from deepdoctor.kernels.fp8 import E4M3
from deepdoctor.kernels.nf4_thin import THIN_ROWS
from deepdoctor.kernels.paged_attention import as_indexed, no_eight_bits_because, quantize_heads
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.decoder import Attend, Decoder, DecoderLayer
from deepdoctor.model.load import free_memory
from deepdoctor.model.runner import prefill_bytes

__all__ = ["BLOCK", "BlockPool", "KVFormat", "PagedCache", "block_bytes", "blocks_of", "check_format", "fitting_blocks"]

KVFormat = Literal["auto", "fp8", "int8"]
"""What keys and values are held in: the compute dtype, or 8 bits with one fp32 scale per head and position."""
DTYPES: dict[KVFormat, torch.dtype] = {"fp8": E4M3, "int8": torch.int8}

BLOCK = 64
"""Positions of a block."""
GRAPH_BYTES = 256 << 20
"""Left free for what CUDA graphs and cuBLAS take for themselves."""


def blocks_of(positions: int) -> int:
    """How many blocks hold so many positions."""
    return -(-positions // BLOCK)


def block_bytes(config: ModelConfig, dtype: torch.dtype, kv_format: KVFormat) -> int:
    """Bytes of one block in all layers, where the decoder computes in ``dtype``."""
    head = config.head_dim * DTYPES.get(kv_format, dtype).itemsize + (4 if kv_format in DTYPES else 0)
    return 2 * config.num_layers * config.num_kv_heads * BLOCK * head


def check_format(kv_format: KVFormat, device: torch.device, key: str = "kv_cache") -> None:
    """Raise ModelError where answers on this device cannot have such a cache. key: what the setting is called."""
    if kv_format == "auto":
        return
    if device.type != "cuda":
        raise ModelError(
            f"{key} is {kv_format}, which needs a GPU; this device is {device.type}", f"use `--{key} auto`"
        )
    reason = no_eight_bits_because(device, DTYPES[kv_format])
    if reason:
        raise ModelError(f"{key} is {kv_format}, but {reason}", f"use `--{key} int8`, or auto")


class BlockPool:
    """The numbers 0 to blocks - 1, each held by no slot, by one, or by several."""

    def __init__(self, blocks: int):
        self._free = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return ``count`` free blocks, now held once. Raises CacheFull where there are fewer."""
        if count > self.free:
            raise CacheFull(f"{count} more blocks of keys and values are needed, {self.free} are free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Have blocks that are held held once more."""
        for block in blocks:
            assert self._holders[block]
            self._holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Let go of blocks; those that nobody else holds are free again."""
        for block in blocks:
            assert self._holders[block]
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)


class PagedCache:
    """Keys and values of every layer, kv (layers, 2, blocks, K, 64, H) in the compute dtype or 8 bits.

    absmax (layers, 2, blocks, K, 64): what 8 bits are scaled by, fp32; None in the compute dtype.
    """

    def __init__(self, decoder: Decoder, blocks: int, kv_format: KVFormat = "auto"):
        config, device = decoder.config, decoder.device
        self.key_heads = config.num_kv_heads
        shape = (config.num_layers, 2, blocks, config.num_kv_heads, BLOCK)
        self.kv = torch.empty(
            *shape, config.head_dim, dtype=DTYPES.get(kv_format, decoder.compute_dtype), device=device
        )
        self.absmax = torch.empty(shape, dtype=torch.float32, device=device) if kv_format in DTYPES else None

    def prefill(self, blocks: Sequence[Sequence[int]], row_lengths: Sequence[int]) -> Attend:
        """Attention of whole prompts, which also fills the blocks of each."""
        rows = zip(blocks, row_lengths, strict=True)
        of_token = [torch.tensor(held).repeat_interleave(BLOCK)[:length] for held, length in rows]
        into = torch.cat(of_token).to(self.kv.device)
        places = torch.cat([torch.arange(length) % BLOCK for length in row_lengths]).to(self.kv.device)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            for which, new in enumerate(qkv[:, -2 * self.key_heads :].split(self.key_heads, dim=1)):
                if self.absmax is not None:
                    new, self.absmax[layer, which][into, :, places] = quantize_heads(new, self.kv.dtype)
                as_indexed(self.kv)[layer, which][into, :, places] = as_indexed(new)
            return attend_packed(qkv, self.key_heads, row_lengths)

        return attend

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks of every layer over others."""
        if not sources:
            return
        at, to = (torch.tensor(numbers, device=self.kv.device) for numbers in (sources, targets))
        for held in (as_indexed(self.kv), self.absmax):
            if held is not None:
                held.index_copy_(2, to, held.index_select(2, at))


def fitting_blocks(
    decoder: Decoder,
    slots: int,
    positions: int,
    keep_dense: bool = False,
    adapter_bytes: int = 0,
    kv_format: KVFormat = "auto",
) -> int:
    """As many blocks as the GPU has memory for beside a prefill and a step; on a CPU, as many as the slots can fill.

    At least those of one slot, at most those of all. positions: of a slot. keep_dense: dequantised weights are kept.
    adapter_bytes: of the adapters as a step holds them.
    """
    config, element = decoder.config, decoder.compute_dtype.itemsize
    one = blocks_of(min(positions, config.max_position_embeddings))
    if decoder.device.type != "cuda":
        return slots * one
    block = block_bytes(config, decoder.compute_dtype, kv_format)
    # Logits of a step and of the prompts, those once more while they are put together, and which tokens were seen.
    step = slots * config.vocab_size * (3 * element + 1)
    step += slots * (3 * config.intermediate_size + 8 * config.hidden_size) * element
    taken = prefill_bytes(decoder) + step + _dense_bytes(decoder, slots, keep_dense) + GRAPH_BYTES + adapter_bytes
    free = free_memory(decoder.device) - taken
    return min(slots * one, max(one, free // block))


def _dense_bytes(decoder: Decoder, slots: int, keep_dense: bool) -> int:
    """Bytes of the weights that are dequantised for many slots: all, or the largest."""
    sizes = [0]
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        sizes += [sum(linear.sizes) * linear.in_features for linear in layer.linears if linear.parts is not None]
    return (sum(sizes) if keep_dense else max(sizes)) * decoder.compute_dtype.itemsize if slots > THIN_ROWS else 0
