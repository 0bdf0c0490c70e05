"""Answers from base and tuned side by side: slots with a key/value cache, refilled as answers finish.

B slots, V vocabulary, K key heads, H head dim. Each request says whether the adapter acts on it, so both sides of a
comparison share one batch and one set of weights. Every request draws from its own seeded generator; the logits of a
request may differ in the last bits with the batch around it, because matrix products of other sizes round otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepdoctor.errors import UsageError
from deepdoctor.model.adapter import Adapter, RowSwitch
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.fast_decode import PACKED_SLOTS, DecodeStep, can_pack
from deepdoctor.model.kv_cache import SlotCache
from deepdoctor.model.load import free_memory

log = logging.getLogger(__name__)

__all__ = ["Completion", "Generator", "Request", "Sampling"]

PREFILL_TOKENS = 2048
"""Prompt tokens run at once; bounds the memory of a prefill."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 and repetition_penalty 1 are off."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. tuned: whether the adapter acts. key: the caller's own name for it."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    tuned: bool = False
    key: object = None


@dataclass(slots=True)
class Completion:
    """What was written. ids: without the stop token; cut_off: the token limit came before a stop token."""

    request: Request
    ids: list[int] = field(default_factory=list)
    cut_off: bool = False


class _Slot:
    """A request being answered."""

    def __init__(self, request: Request):
        self.completion = Completion(request)
        self.length = 0
        """Positions filled in the cache."""
        self.generator = torch.Generator().manual_seed(request.sampling.seed)


class Generator:
    """Answers requests, a fixed number at a time.

    decoder, adapter: as trained. stop_ids: tokens that end an answer. slots: answers written at once. reduced: allow a
    few slots on a CPU to be decoded from bf16 copies of fp32 weights (twice as fast, and rounded like any bf16 model).
    """

    def __init__(
        self,
        decoder: Decoder,
        adapter: Adapter | None,
        stop_ids: Sequence[int],
        slots: int = 16,
        reduced: bool = False,
    ):
        self.decoder = decoder
        self.adapter = adapter
        self.stop_ids = frozenset(stop_ids)
        self.slots = slots
        self.reduced = reduced

    @torch.inference_mode()
    def run(
        self, requests: Sequence[Request], on_token: Callable[[Request, int], None] | None = None
    ) -> Iterator[Completion]:
        """Yield each completion as it finishes, in any order.

        on_token: called with the request and each new token, stop tokens left out. Raises UsageError for an empty
        prompt, one the model's positions cannot hold, or a tuned request without an adapter.
        """
        self._check(requests)
        waiting = list(reversed(requests))
        slots = min(self.slots, len(requests))
        if not slots:
            return
        positions = max(len(r.prompt_ids) + r.sampling.max_new_tokens for r in requests)
        slots = self._fitting(slots, positions)
        packed = slots <= PACKED_SLOTS and can_pack(self.decoder)
        packed = packed and (self.reduced or self.decoder.compute_dtype == torch.bfloat16)
        step = DecodeStep(self.decoder, self.adapter, packed)
        cache = SlotCache(self.decoder, slots, min(positions, self.decoder.config.max_position_embeddings), step.dtype)
        seen = torch.zeros(slots, self.decoder.config.vocab_size, dtype=torch.bool, device=self.decoder.device)
        switch = RowSwitch()
        adapters = self.adapter.prepare(self.decoder, switch) if self.adapter is not None else None
        active: list[_Slot] = []
        last: list[int] = []
        while active or waiting:
            drawn_from = 0
            if waiting and len(active) < slots:
                drawn_from = len(active)
                fresh, rows = self._prefill(waiting, active, slots, cache, seen, switch, adapters)
                last += self._draw(rows, fresh, seen, len(active))
                active += fresh
            else:
                logits = self._decode(step, active, last, cache, switch)
                last = self._draw(logits, active, seen, 0)
            # After a prefill only the fresh slots have a new token.
            finished = [i for i in range(drawn_from, len(active)) if self._take(active[i], last[i], on_token)]
            for index in reversed(finished):
                yield active[index].completion
                end = len(active) - 1
                if index != end:
                    cache.move(end, index, active[end].length)
                    seen[index] = seen[end]
                    active[index], last[index] = active[end], last[end]
                active.pop()
                last.pop()

    def _fitting(self, slots: int, positions: int) -> int:
        """As many slots as the GPU has memory for, beside a prefill."""
        if self.decoder.device.type != "cuda":
            return slots
        config = self.decoder.config
        element = self.decoder.compute_dtype.itemsize
        slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * positions * element
        prefill = 4 * PREFILL_TOKENS * (3 * config.intermediate_size + 4 * config.hidden_size) * element
        fits = max(1, int((free_memory(self.decoder.device) - prefill) // slot))
        if fits < slots:
            log.info("%d answers at once instead of %d: the GPU has memory for no more", fits, slots)
        return min(slots, fits)

    def _check(self, requests: Sequence[Request]) -> None:
        limit = self.decoder.config.max_position_embeddings
        for request in requests:
            if not request.prompt_ids:
                raise UsageError(f"request {request.key!r} has an empty prompt")
            if len(request.prompt_ids) >= limit:
                raise UsageError(
                    f"request {request.key!r} has a prompt of {len(request.prompt_ids)} tokens; "
                    f"the model takes fewer than {limit}"
                )
            if request.tuned and self.adapter is None:
                raise UsageError(f"request {request.key!r} asks the tuned side, but no adapter was given")

    def _switch(self, switch: RowSwitch, tuned: list[bool], repeats: Sequence[int] | None) -> bool:
        """Set the per-token adapter mask; return whether the adapter is needed at all."""
        if all(tuned):
            switch.mask = None
        elif any(tuned):
            mask = torch.tensor(tuned, dtype=self.decoder.compute_dtype)[:, None]
            if repeats is not None:
                mask = mask.repeat_interleave(torch.tensor(repeats), 0)
            switch.mask = mask.to(self.decoder.device)
        return any(tuned)

    def _prefill(self, waiting, active, slots, cache, seen, switch, adapters):  # type: ignore[no-untyped-def]
        """Fill free slots from the queue, up to PREFILL_TOKENS; return the new slots and their logits (n, V)."""
        fresh: list[_Slot] = []
        while waiting and len(active) + len(fresh) < slots:
            tokens = sum(s.length for s in fresh) + len(waiting[-1].prompt_ids)
            if fresh and tokens > PREFILL_TOKENS:
                break
            slot = _Slot(waiting.pop())
            slot.length = len(slot.completion.request.prompt_ids)
            fresh.append(slot)
        numbers = range(len(active), len(active) + len(fresh))
        lengths = [slot.length for slot in fresh]
        device = self.decoder.device
        ids = torch.tensor([t for s in fresh for t in s.completion.request.prompt_ids], device=device)
        places = torch.cat([torch.arange(n) for n in lengths]).to(device)
        on = self._switch(switch, [s.completion.request.tuned for s in fresh], lengths)
        hidden = self.decoder(ids, places, cache.prefill(numbers, lengths), adapters if on else None)
        for number, part in zip(numbers, ids.split(lengths), strict=True):
            seen[number] = False
            seen[number, part] = True
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        return fresh, self.decoder.logits(hidden[ends])

    def _decode(
        self, step: DecodeStep, active: list[_Slot], last: list[int], cache: SlotCache, switch: RowSwitch
    ) -> Tensor:
        """Run one token of every active slot; return logits (n, V)."""
        device = self.decoder.device
        lengths = [slot.length for slot in active]
        places = torch.tensor(lengths, device=device)
        tuned = self._switch(switch, [s.completion.request.tuned for s in active], None)
        attend = cache.decode(places, max(lengths) + 1, ragged=len(set(lengths)) > 1)
        for slot in active:
            slot.length += 1
        return step(torch.tensor(last, device=device), places, attend, tuned, switch.mask)

    def _draw(self, logits: Tensor, slots: Sequence[_Slot], seen: Tensor, first: int) -> list[int]:
        """Choose the next token of each row of logits (n, V)."""
        logits = logits.float()
        settings = [slot.completion.request.sampling for slot in slots]
        rows_seen = seen[first : first + len(slots)]
        if any(s.repetition_penalty != 1 for s in settings):
            penalty = torch.tensor([s.repetition_penalty for s in settings], device=logits.device)[:, None]
            weaker = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(rows_seen, weaker, logits)
        tokens = logits.argmax(-1).tolist()
        for row, (slot, s) in enumerate(zip(slots, settings, strict=True)):
            if s.temperature > 0:
                tokens[row] = _sample(logits[row], s, slot.generator)
        rows_seen[torch.arange(len(tokens)), torch.tensor(tokens)] = True
        return tokens

    def _take(self, slot: _Slot, token: int, on_token: Callable[[Request, int], None] | None) -> bool:
        """Book one drawn token; return whether the slot is finished."""
        completion = slot.completion
        if token in self.stop_ids:
            return True
        completion.ids.append(token)
        if on_token:
            on_token(completion.request, token)
        full = slot.length + 1 >= self.decoder.config.max_position_embeddings
        completion.cut_off = full or len(completion.ids) >= completion.request.sampling.max_new_tokens
        return completion.cut_off


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw from one row of logits (V,) fp32: temperature, then nucleus."""
    probabilities = torch.softmax(logits / sampling.temperature, -1).cpu()
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # A token stays while the mass before it is below top_p, so the first always stays.
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
