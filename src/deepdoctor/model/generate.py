"""Answers from several sides at once: slots that are refilled as answers finish.

Each request names its side: "base", or an adapter's. All sides share one batch and one set of weights. A request's
draws depend on its seed alone (``sampling.py``); its logits may differ in the last bits with the batch around it,
because matrix products of other sizes round otherwise. So the same request gives the same answer unless two tokens are
equal to within that rounding.

Tokens are drawn, then booked: stop texts, thinking limits, ``on_token``, finished answers. On a GPU the next step is on
its way while they are booked. Answers that end by their number of tokens, a stop token or ``cancel`` are out of it; one
that turns out to have ended by a stop text has its part of that step thrown away.

V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deepdoctor.errors import CacheFull, UsageError
from deepdoctor.model.block_pool import KVFormat
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.drawer import Drawer
from deepdoctor.model.paged_runner import PagedRunner, paged_runner
from deepdoctor.model.runner import PREFILL_TOKENS, Prompt, SlotRunner, fitting_slots
from deepdoctor.model.sampling import Sampling, check_sampling
from deepdoctor.model.sides import BASE, Adapters, by_side, check_side

log = logging.getLogger(__name__)

__all__ = ["Completion", "Generator", "Request", "Words", "check_request"]

REFILL_SHARE = 16
"""New requests are begun where one slot in so many is free, or as many as there are requests left: prompts run together
take less time than one by one. On a GPU a prefill costs about 25 ms at least, as long as one or two steps; with answers
of 1,000 tokens the free slots and the prefills then cost least together."""
_Heard = Callable[["Request", int], None] | None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. side: "base", or the name of an adapter. key: the caller's own name for it."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    side: str = BASE
    key: object = None


@dataclass(slots=True)
class Completion:
    """What was written.

    ids: without the stop token, and without the tokens of a stop text. cut_off: the token limit came before an end.
    text: set where a stop text ended the answer inside a token: what stands before it. cancelled: ended from outside.
    thinking_closed: the thinking was closed for the model. logprobs: of each of ids, where asked for.
    """

    request: Request
    ids: list[int] = field(default_factory=list)
    cut_off: bool = False
    text: str | None = None
    cancelled: bool = False
    thinking_closed: bool = False
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Words:
    """What stop texts and a thinking limit need to know of the tokenizer.

    decode: ids -> text. close: the text that ends thinking. closing_ids: written where it is ended for the model.
    opened: whether the prompt has opened the thinking; else an answer thinks only where it begins with ``open``.
    """

    decode: Callable[[Sequence[int]], str]
    close: str = "</think>"
    closing_ids: tuple[int, ...] = ()
    opened: bool = True
    open: str = "<think>"

    def thinks(self, ids: Sequence[int]) -> bool:
        """Whether an answer of these ids is still thinking."""
        text = self.decode(ids)
        return self.close not in text and (self.opened or text.lstrip().startswith(self.open))

    def before_stop(self, ids: Sequence[int], stop: Sequence[str]) -> tuple[int, str | None]:
        """How many ids stand before the first stop text, and the text before it; (all, None) where there is none."""
        whole = self.decode(ids)
        at = min((place for text in stop if (place := whole.find(text)) >= 0), default=-1)
        if at < 0:
            return len(ids), None
        keep = len(ids)
        while keep and len(self.decode(ids[:keep])) > at:
            keep -= 1
        return keep, whole[:at]


def check_request(request: Request, name: str, words: Words | None) -> None:
    """Raise UsageError for a request that no generator takes. name: what it is called in the message."""
    if not request.prompt_ids:
        raise UsageError(f"{name} has an empty prompt")
    check_sampling(request.sampling, name)
    if words is None and (request.sampling.stop or request.sampling.max_thinking_tokens):
        raise UsageError(f"{name} has a stop text or a thinking limit", "give the generator `words`")


class _Answer:
    """A request being answered. token: drawn and not booked yet.

    thinks: the thinking may have to be closed. closing: tokens still to be written to close it. full: no token fits
    after this one. ended: it is to leave its slot.
    """

    def __init__(self, request: Request, thinks: bool):
        self.completion = Completion(request)
        self.prompt = Prompt(tuple(request.prompt_ids), request.side)
        self.thinks = thinks
        self.closing: list[int] = []
        self.token = -1
        self.full = self.ended = False

    @property
    def sampling(self) -> Sampling:
        """Its settings."""
        return self.completion.request.sampling


class _Batch:
    """The answers in slots, by the number of the slot, and the last token of each."""

    def __init__(self, runner: SlotRunner | PagedRunner, drawer: Drawer):
        self.runner, self.drawer = runner, drawer
        self.answers: list[_Answer] = []
        self.last: list[int] = []

    def add(self, fresh: Sequence[_Answer]) -> Tensor:
        """Begin as many of these as there is room for; logits (n, V) after the prompts of those."""
        logits = self.runner.add([answer.prompt for answer in fresh])
        for slot, answer in enumerate(fresh[: len(logits)], len(self.answers)):
            self.drawer.begin(slot, answer.prompt.ids, answer.sampling)
        self.answers += fresh[: len(logits)]
        return logits

    def decode(self) -> Tensor:
        """Add the last tokens; logits (n, V) after them. Raises CacheFull, and nothing has happened then."""
        return self.runner.decode(self.last)

    def draw(self, logits: Tensor) -> list[_Answer]:
        """Draw a token for the last n answers from logits (n, V); return those that it is for."""
        first = len(self.answers) - len(logits)
        answers = self.answers[first:]
        forced = {row: answer.closing.pop(0) for row, answer in enumerate(answers) if answer.closing}
        numbers = [len(answer.completion.ids) for answer in answers]
        tokens, logprobs = self.drawer.draw(logits, first, [a.sampling for a in answers], numbers, forced)
        self.last[first:] = tokens
        for row, answer in enumerate(answers):
            answer.token = tokens[row]
            if answer.sampling.logprobs and not answer.ended:
                answer.completion.logprobs.append(logprobs[row])
        return [answer for answer in answers if not answer.ended]

    def sweep(self) -> None:
        """Take those that have ended out of their slots."""
        for slot in reversed([slot for slot, answer in enumerate(self.answers) if answer.ended]):
            self.remove(slot)

    def remove(self, slot: int) -> _Answer:
        """Take an answer out of its slot; the last one takes its number."""
        answer, end = self.answers[slot], self.runner.remove(slot)
        if slot != end:
            self.drawer.move(end, slot)
            self.answers[slot], self.last[slot] = self.answers[end], self.last[end]
        self.answers.pop()
        self.last.pop()
        return answer


class Generator:
    """Answers requests, a fixed number at a time.

    decoder: as trained. adapters: by the name of their side, any number; one that comes alone is "tuned". stop_ids:
    tokens that end an answer. slots: answers written at once. reduced: allow a few slots on a CPU to be decoded from
    bf16 copies of fp32 weights (twice as fast, and rounded like any bf16 model).
    words: needed by requests with stop texts or a thinking limit. runner: "slots" gives every answer room for the
    longest one; "paged" gives room as answers grow, and puts the youngest back in the queue where there is none left;
    "auto" is "paged" on a GPU. kv_format: what "paged" holds keys and values in: "auto" (as computed), "fp8" or "int8".
    """

    def __init__(
        self,
        decoder: Decoder,
        adapters: Adapters,
        stop_ids: Sequence[int],
        slots: int = 16,
        reduced: bool = False,
        words: Words | None = None,
        runner: Literal["auto", "slots", "paged"] = "auto",
        kv_format: KVFormat = "auto",
    ):
        self.decoder = decoder
        self.adapters = by_side(adapters)
        self.stop_ids = frozenset(stop_ids)
        self.slots = slots
        self.reduced = reduced
        self.words = words
        self.runner = runner
        self.kv_format = kv_format
        self._cancelled: set[object] = set()
        self._ahead = decoder.device.type == "cuda"
        """Whether a step is on its way before the tokens before it are booked."""

    def cancel(self, key: object) -> None:
        """End the request of this key with what it has, at its next token; one that waits is not begun."""
        self._cancelled.add(key)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], on_token: _Heard = None) -> Iterator[Completion]:
        """Yield each completion as it finishes, in any order.

        on_token: called with the request and each new token, stop tokens left out. Raises UsageError for an empty
        prompt, one the model's positions cannot hold, settings out of their range, or a side that has no adapter;
        ModelError for logits that are nan or infinite.
        """
        self._check(requests)
        self._cancelled.clear()
        if not requests:
            return
        slots, runner = self._runner(requests)
        batch = _Batch(runner, Drawer(slots, self.decoder.config.vocab_size, self.decoder.device))
        try:
            yield from self._answer(batch, slots, requests, on_token)
        finally:
            if self.decoder.device.type == "cuda":
                # A consumer that stops early may leave a step running.
                torch.cuda.current_stream(self.decoder.device).synchronize()

    def _runner(self, requests: Sequence[Request]) -> tuple[int, SlotRunner | PagedRunner]:
        """How many slots, and what runs them."""
        positions = max(len(r.prompt_ids) + r.sampling.max_new_tokens for r in requests)
        slots = wanted = min(self.slots, len(requests))
        if self.runner == "paged" or (self.runner == "auto" and self.decoder.device.type == "cuda"):
            return slots, paged_runner(self.decoder, self.adapters, slots, positions, self.kv_format)
        if self.kv_format != "auto":
            raise UsageError(f"kv_format is {self.kv_format}, which only the paged runner has", "set runner to 'paged'")
        slots = fitting_slots(self.decoder, slots, positions)
        if slots < wanted:
            log.info("%d answers at once instead of %d: the GPU has memory for no more", slots, self.slots)
        return slots, SlotRunner(self.decoder, self.adapters, slots, positions, self.reduced)

    def _answer(self, batch: _Batch, slots: int, requests: Sequence[Request], on_token: _Heard) -> Iterator[Completion]:
        waiting = [_Answer(request, self.words is not None) for request in reversed(requests)]
        drawn: list[_Answer] = []
        while waiting or batch.answers or drawn:
            yield from self._dropped(waiting)
            if not self._ahead:
                yield from self._book(drawn, on_token)
            batch.sweep()
            # None where nothing is left, or nothing could be begun.
            logits = self._refill(batch, slots, waiting)
            if logits is None and batch.answers:
                try:
                    logits = batch.decode()
                except CacheFull:
                    # What goes back to the queue is booked first.
                    yield from self._book(drawn, on_token)
                    batch.sweep()
                    logits = self._make_room(batch, waiting)
            yield from self._book(drawn, on_token)
            if logits is None:
                continue
            # After a prefill only the fresh slots have a new token.
            drawn = batch.draw(logits)
            first = len(batch.answers) - len(logits)
            for slot, answer in enumerate(batch.answers[first:], first):
                self._look(answer, batch.runner.length(slot))

    def _check(self, requests: Sequence[Request]) -> None:
        limit = self.decoder.config.max_position_embeddings
        for request in requests:
            name = f"request {request.key!r}"
            check_request(request, name, self.words)
            if len(request.prompt_ids) >= limit:
                raise UsageError(
                    f"{name} has a prompt of {len(request.prompt_ids)} tokens; the model takes fewer than {limit}"
                )
            check_side(request.side, self.adapters, name)

    def _dropped(self, waiting: list[_Answer]) -> list[Completion]:
        """Take what was cancelled out of the queue."""
        if not self._cancelled:
            return []
        dropped = [answer.completion for answer in waiting if answer.completion.request.key in self._cancelled]
        waiting[:] = [answer for answer in waiting if answer.completion.request.key not in self._cancelled]
        for completion in dropped:
            completion.cancelled = True
        return dropped

    @staticmethod
    def _refill(batch: _Batch, slots: int, waiting: list[_Answer]) -> Tensor | None:
        """Begin requests where enough slots are free, at most one prefill of them; logits (n, V), or None for none."""
        free = slots - len(batch.answers)
        if not waiting or (batch.answers and free < min(-(-slots // REFILL_SHARE), len(waiting))):
            return None
        fresh: list[_Answer] = []
        tokens = 0
        while waiting and len(fresh) < free:
            tokens += len(waiting[-1].prompt.ids)
            if fresh and tokens > PREFILL_TOKENS:
                break
            fresh.append(waiting.pop())
        logits = batch.add(fresh)
        # Where the cache had no room for the last of them, they wait.
        waiting += reversed(fresh[len(logits) :])
        return logits if len(logits) else None

    @staticmethod
    def _make_room(batch: _Batch, waiting: list[_Answer]) -> Tensor | None:
        """Send answers back to the head of the queue until the cache holds the others' next tokens; logits (n, V).

        Those with the fewest tokens go. What such an answer has becomes part of its prompt, so it goes on as it was.
        """
        while batch.answers:
            try:
                return batch.decode()
            except CacheFull as full:
                log.info("%s: one goes back to the queue", full)
                written = [len(answer.completion.ids) for answer in batch.answers]
                answer = batch.remove(min(range(len(written)), key=lambda slot: (written[slot], -slot)))
                request = answer.completion.request
                answer.prompt = Prompt((*request.prompt_ids, *answer.completion.ids), request.side)
                waiting.append(answer)
        return None

    def _look(self, answer: _Answer, length: int) -> None:
        """Find out whether an answer ends with the token just drawn, as far as that takes no text.

        length: positions that its slot has filled.
        """
        request, sampling = answer.completion.request, answer.sampling
        answer.full = length + 1 >= self.decoder.config.max_position_embeddings
        answer.full |= len(answer.completion.ids) + 1 >= sampling.max_new_tokens
        answer.ended |= answer.full or answer.token in self.stop_ids or request.key in self._cancelled

    def _book(self, drawn: list[_Answer], on_token: _Heard) -> Iterator[Completion]:
        """Book the tokens of these answers; yield those that are finished. Empties the list."""
        while drawn:
            answer = drawn.pop(0)
            if self._take(answer, on_token):
                answer.ended = True
                yield answer.completion

    def _take(self, answer: _Answer, on_token: _Heard) -> bool:
        """Book one drawn token; return whether the answer is finished."""
        completion, s = answer.completion, answer.sampling
        if completion.request.key in self._cancelled:
            completion.cancelled = True
        if completion.cancelled or answer.token in self.stop_ids:
            del completion.logprobs[len(completion.ids) :]
            return True
        completion.ids.append(answer.token)
        if s.stop and self._stopped(completion):
            return True
        if on_token:
            on_token(completion.request, answer.token)
        if s.max_thinking_tokens is not None:
            self._limit_thinking(answer, s.max_thinking_tokens)
        completion.cut_off = answer.full
        return completion.cut_off

    def _stopped(self, completion: Completion) -> bool:
        """Whether a stop text has come; cuts ids and text before it."""
        assert self.words is not None
        stop = completion.request.sampling.stop
        # A token holds at least a byte, and a character at most four; the newest token must be part of the match.
        tail = completion.ids[-(4 * max(map(len, stop)) + 1) :]
        if not any(text in self.words.decode(tail) for text in stop):
            return False
        keep, completion.text = self.words.before_stop(completion.ids, stop)
        if completion.text is None:
            return False
        del completion.ids[keep:], completion.logprobs[keep:]
        return True

    def _limit_thinking(self, answer: _Answer, limit: int) -> None:
        """Once the limit is reached, have the closing tokens written, unless the thinking is closed already."""
        assert self.words is not None
        ids = answer.completion.ids
        if not answer.thinks or len(ids) < limit:
            return
        answer.thinks = False
        if self.words.thinks(ids):
            answer.completion.thinking_closed = True
            answer.closing = list(self.words.closing_ids)
