"""Slots that hold answers being written: their cache, their side, and the passes that advance them.

n slots are in use, numbers 0 .. n - 1; V vocabulary. The scheduler in ``generate.py`` decides who gets a slot; nothing
here knows of requests, stop tokens or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepdoctor.model.adapter import Adapter, RowSwitch
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.fast_decode import PACKED_SLOTS, DecodeStep, can_pack
from deepdoctor.model.kv_cache import SlotCache
from deepdoctor.model.load import free_memory

__all__ = ["PREFILL_TOKENS", "Prompt", "SlotRunner", "fitting_slots"]

PREFILL_TOKENS = 2048
"""Prompt tokens run at once; bounds the memory of a prefill."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a slot starts from. tuned: whether the adapter acts. Equal prompts give equal keys and values."""

    ids: tuple[int, ...]
    tuned: bool


@dataclass(slots=True)
class _Slot:
    prompt: Prompt
    length: int
    """Positions filled in the cache."""
    logits: Tensor
    """After the prompt, (V,): another slot may start from the same one."""


def fitting_slots(decoder: Decoder, slots: int, positions: int) -> int:
    """As many slots, at least one, as the GPU has memory for beside a prefill; on a CPU, as many as asked for."""
    if decoder.device.type != "cuda":
        return slots
    config = decoder.config
    element = decoder.compute_dtype.itemsize
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * positions * element
    prefill = 4 * PREFILL_TOKENS * (3 * config.intermediate_size + 4 * config.hidden_size) * element
    return min(slots, max(1, int((free_memory(decoder.device) - prefill) // slot)))


class SlotRunner:
    """Base and adapter over a fixed number of slots of a fixed number of positions.

    reduced: allow few slots on a CPU to be decoded from bf16 or 4-bit copies of the weights (``fast_decode``).
    """

    def __init__(self, decoder: Decoder, adapter: Adapter | None, slots: int, positions: int, reduced: bool = False):
        self.decoder = decoder
        packed = slots <= PACKED_SLOTS and can_pack(decoder)
        packed = packed and (reduced or decoder.compute_dtype == torch.bfloat16)
        self.step = DecodeStep(decoder, adapter, packed)
        positions = min(positions, decoder.config.max_position_embeddings)
        self.cache = SlotCache(decoder, slots, positions, self.step.dtype)
        self.switch = RowSwitch()
        self.adapters = adapter.prepare(decoder, self.switch) if adapter is not None else None
        self.slots: list[_Slot] = []

    def length(self, slot: int) -> int:
        """Positions that a slot has filled."""
        return self.slots[slot].length

    def add(self, prompts: Sequence[Prompt]) -> Tensor:
        """Start the next slots from prompts; return the logits (n, V) after each. What is filled already is copied."""
        places = {slot.prompt: number for number, slot in enumerate(self.slots)}
        logits = {slot.prompt: slot.logits for slot in self.slots}
        numbered = list(enumerate(prompts, len(self.slots)))
        fresh = {p: number for number, p in reversed(numbered) if p not in places}
        if fresh:
            logits |= zip(fresh, self._prefill(list(fresh.values()), list(fresh)), strict=True)
        places |= fresh
        for number, prompt in numbered:
            if places[prompt] != number:
                self.cache.move(places[prompt], number, len(prompt.ids))
            self.slots.append(_Slot(prompt, len(prompt.ids), logits[prompt]))
        return torch.stack([logits[prompt] for prompt in prompts])

    def _prefill(self, slots: Sequence[int], prompts: Sequence[Prompt]) -> Tensor:
        """Run whole prompts into free slots; return logits (n, V)."""
        device = self.decoder.device
        lengths = [len(p.ids) for p in prompts]
        ids = torch.tensor([token for p in prompts for token in p.ids], device=device)
        places = torch.cat([torch.arange(n) for n in lengths]).to(device)
        on = self._switch([p.tuned for p in prompts], lengths)
        hidden = self.decoder(ids, places, self.cache.prefill(slots, lengths), self.adapters if on else None)
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        return self.decoder.logits(hidden[ends])

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to every slot in use; return the logits (n, V) after it."""
        device = self.decoder.device
        lengths = [slot.length for slot in self.slots]
        places = torch.tensor(lengths, device=device)
        tuned = self._switch([slot.prompt.tuned for slot in self.slots], None)
        attend = self.cache.decode(places, max(lengths) + 1, ragged=len(set(lengths)) > 1)
        for slot in self.slots:
            slot.length += 1
        return self.step(torch.tensor(tokens, device=device), places, attend, tuned, self.switch.mask)

    def remove(self, number: int) -> int:
        """Free a slot; the last one takes its number. Returns the number the last one had."""
        last = len(self.slots) - 1
        if number != last:
            self.cache.move(last, number, self.slots[last].length)
            self.slots[number] = self.slots[last]
        self.slots.pop()
        return last

    def _switch(self, tuned: list[bool], repeats: Sequence[int] | None) -> bool:
        """Set the per-token adapter mask; return whether the adapter is needed at all."""
        if all(tuned):
            self.switch.mask = None
        elif any(tuned):
            mask = torch.tensor(tuned, dtype=self.decoder.compute_dtype)[:, None]
            if repeats is not None:
                mask = mask.repeat_interleave(torch.tensor(repeats), 0)
            self.switch.mask = mask.to(self.decoder.device)
        return any(tuned)
