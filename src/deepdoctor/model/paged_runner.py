"""Slots over a paged cache, for answering on a GPU: what ``runner.SlotRunner`` does, with its members.

A slot takes blocks as it grows and gives them back when it is removed, so as many slots are in use as their answers
leave room for, rather than as their limits would. Prompts run through the decoder, tokens through ``PagedStep``. Equal
prompts of one side share the blocks that they fill, and are computed once; a block that is filled in part is copied.

On a CPU everything runs in PyTorch, which serves the tests. V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepdoctor.errors import CacheFull
from deepdoctor.kernels.nf4_thin import THIN_ROWS
from deepdoctor.model.block_pool import BLOCK, BlockPool, KVFormat, PagedCache, blocks_of, fitting_blocks
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.paged_step import PagedStep
from deepdoctor.model.runner import PREFILL_TOKENS, PackedPass, Prompt, in_turns
from deepdoctor.model.sides import Adapters, LoraStack, by_side

log = logging.getLogger(__name__)

__all__ = ["PagedRunner", "paged_runner"]


@dataclass(slots=True)
class _Slot:
    prompt: Prompt
    length: int
    """Positions filled in the cache."""
    logits: Tensor
    """After the prompt, (V,): another slot may start from the same one."""
    blocks: list[int]


class PagedRunner:
    """Base and adapters over a fixed number of slots and of blocks.

    slots: most in use. positions: most of a slot. blocks: of the cache, at least one slot's; None: all that the slots
    can fill. keep_dense: keep dequantised weights for more than 32 slots, rather than make them anew at each step.
    graphs: replay CUDA graphs where there is a GPU. kv_format: what keys and values are held in.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        adapters: Adapters,
        slots: int,
        positions: int,
        blocks: int | None = None,
        *,
        keep_dense: bool = False,
        graphs: bool = True,
        kv_format: KVFormat = "auto",
    ):
        self.decoder = decoder
        positions = min(positions, decoder.config.max_position_embeddings)
        self.width = blocks_of(positions)
        """Blocks of a slot that is full."""
        blocks = slots * self.width if blocks is None else blocks
        assert blocks >= self.width, f"{blocks} blocks do not hold one slot of {positions} positions"
        self.pool = BlockPool(blocks)
        self.cache = PagedCache(decoder, blocks, kv_format)
        self.step = PagedStep(decoder, adapters, self.cache, slots, positions, keep_dense, graphs)
        self.prompts = PackedPass(decoder, adapters)
        self.slots: list[_Slot] = []
        self._table = torch.zeros(self.step.block_table.shape, dtype=torch.int32)
        """Block table as it is to be; it and the sides are brought to the device before a step, where they changed."""
        self._changed = True
        self._staged = _Staged(self.step)

    def length(self, slot: int) -> int:
        """Positions that a slot has filled."""
        return self.slots[slot].length

    @torch.inference_mode()
    def add(self, prompts: Sequence[Prompt]) -> Tensor:
        """Start the next slots from prompts, in order, as many as there is room for; return the logits (n, V) of those.

        There is room where every slot that can still grow could take one more block. The first slot always has it.
        """
        held = {slot.prompt: slot.blocks for slot in self.slots}
        logits = {slot.prompt: slot.logits for slot in self.slots}
        started: list[tuple[Prompt, list[int]]] = []
        fresh: list[Prompt] = []
        copied: list[tuple[int, int]] = []
        growing = sum(len(slot.blocks) < self.width for slot in self.slots)
        for prompt in prompts:
            whole, part = divmod(len(prompt.ids), BLOCK)
            source = held.get(prompt)
            shared = source[:whole] if source else []
            needed = blocks_of(len(prompt.ids)) - len(shared)
            growing += whole + bool(part) < self.width
            if needed + growing > self.pool.free and (self.slots or started):
                break
            taken = self.pool.take(needed)
            self.pool.share(shared)
            if source is None:
                fresh.append(prompt)
                held[prompt] = taken
            elif part:
                copied.append((source[whole], taken[0]))
            started.append((prompt, [*shared, *taken]))
        for run in in_turns([len(prompt.ids) for prompt in fresh], PREFILL_TOKENS):
            group = [fresh[number] for number in run]
            attend = self.cache.prefill([held[prompt] for prompt in group], [len(prompt.ids) for prompt in group])
            logits |= zip(group, self.prompts.logits(group, attend), strict=True)
        self.cache.copy([source for source, _ in copied], [target for _, target in copied])
        for number, (prompt, blocks) in enumerate(started, len(self.slots)):
            self.slots.append(_Slot(prompt, len(prompt.ids), logits[prompt], blocks))
            self._table[number, : len(blocks)] = torch.tensor(blocks)
            self._changed = True
        if not started:
            shape = (0, self.decoder.config.vocab_size)
            return torch.empty(shape, dtype=self.decoder.compute_dtype, device=self.decoder.device)
        return torch.stack([logits[prompt] for prompt, _ in started])

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to every slot in use; return the logits (n, V) after it, valid until the next call.

        Raises CacheFull where more slots need a new block than blocks are free; nothing has happened then.
        """
        count = len(self.slots)
        growing = [n for n, slot in enumerate(self.slots) if slot.length == len(slot.blocks) * BLOCK]
        if len(growing) > self.pool.free:
            raise CacheFull(
                f"{len(growing)} of {count} slots need another block of keys and values, {self.pool.free} are free"
            )
        for number, block in zip(growing, self.pool.take(len(growing)), strict=True):
            blocks = self.slots[number].blocks
            self._table[number, len(blocks)] = block
            blocks.append(block)
            self._changed = True
        self._staged.bring(tokens, [slot.length for slot in self.slots])
        if self._changed:
            self._staged.bring_slots(self._table, [slot.prompt.side for slot in self.slots])
            self._changed = False
        self._staged.sent()
        for slot in self.slots:
            slot.length += 1
        return self.step(count)

    @torch.inference_mode()
    def remove(self, number: int) -> int:
        """Free a slot and its blocks; the last one takes its number. Returns the number the last one had."""
        last = len(self.slots) - 1
        self.pool.give_back(self.slots[number].blocks)
        self.slots[number] = self.slots[last]
        self._table[number] = self._table[last]
        self.slots.pop()
        self._changed = True
        return last


class _Staged:
    """What a step reads, on its way to the device: in memory that a GPU copies from while the host goes on."""

    def __init__(self, step: PagedStep):
        cuda = step.device.type == "cuda"

        def like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=cuda)

        self.step = step
        self.inputs = like(step.inputs.shape, torch.int32)
        self.table = like(step.block_table.shape, torch.int32)
        self.sides = like((step.rows,), torch.int64)
        self._free = torch.cuda.Event() if cuda else None

    def bring(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Tokens and lengths before them of the slots in use; the rows beyond are idle."""
        if self._free is not None:
            self._free.synchronize()
        count, inputs = len(tokens), self.inputs.numpy()
        inputs[0, :count], inputs[0, count:] = tokens, 0
        inputs[1, :count], inputs[1, count:] = lengths, -1
        inputs[2] = inputs[1] + 1
        self.step.inputs.copy_(self.inputs, non_blocking=True)

    def bring_slots(self, table: Tensor, sides: Sequence[str]) -> None:
        """Block table and sides; after ``bring``."""
        numbers = self.sides.numpy()
        numbers[: len(sides)], numbers[len(sides) :] = [self.step.adapters.get(side, -1) for side in sides], -1
        self.step.block_table.copy_(self.table.copy_(table), non_blocking=True)
        self.step.switch(self.sides)

    def sent(self) -> None:
        """All is on its way; the next ``bring`` waits until it has arrived."""
        if self._free is not None:
            self._free.record()


def paged_runner(
    decoder: Decoder, adapters: Adapters, slots: int, positions: int, kv_format: KVFormat = "auto"
) -> PagedRunner:
    """A runner with as many blocks as there is memory for, and dequantised weights where that leaves enough blocks."""
    held = LoraStack.nbytes(decoder, [*by_side(adapters).values()])
    blocks = fitting_blocks(decoder, slots, positions, keep_dense=True, adapter_bytes=held, kv_format=kv_format)
    most = slots * blocks_of(min(positions, decoder.config.max_position_embeddings))
    keep_dense = blocks == most and slots > THIN_ROWS
    if not keep_dense:
        blocks = fitting_blocks(decoder, slots, positions, adapter_bytes=held, kv_format=kv_format)
    if blocks < most:
        log.info("%d blocks of keys and values instead of %d: answers may have to wait for others", blocks, most)
    return PagedRunner(decoder, adapters, slots, positions, blocks, keep_dense=keep_dense, kv_format=kv_format)
