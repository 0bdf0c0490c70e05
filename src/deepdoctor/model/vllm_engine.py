"""Answers from a vLLM server: the interface, prompts and records of ``Generator``, with the work done elsewhere.

Prompts go to ``/v1/completions`` as token ids, and answers come back as token ids. So nothing depends on the server's
chat template, on its reasoning parser, or on the name it gives to the thinking (``reasoning`` or
``reasoning_content``): what is read is what the model wrote, as with our own engine. The model's own end tokens are
switched off at the server, and ours sent in their place.

Greedy answers are those of ``Generator`` up to the first near tie, where both hold the weights in one format. Drawn
ones come from the same distributions by other random numbers (min-p acts before top-k and top-p there, after them
here). A seed gives the same answer again only as far as the server's batches round alike.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepdoctor.errors import EngineError, UsageError
from deepdoctor.model.generate import Completion, Request, Words, check_request
from deepdoctor.model.sides import BASE
from deepdoctor.model.vllm_http import Broken, Call, Link, as_json

__all__ = ["VllmGenerator"]

_Tell = Callable[[list[int], list[float]], None]
"""Hands over new ids and their log probabilities."""


@dataclass(slots=True)
class _Asked:
    """A request on its way. name: of the served model. limit: tokens it may write."""

    request: Request
    call: Call
    name: str
    limit: int


@dataclass(slots=True)
class _Part:
    """What one call gave. ids: without stop token."""

    ids: list[int] = field(default_factory=list)
    cut_off: bool = False


@dataclass(slots=True)
class _End:
    """How an answer ended. keep: how many of its ids count. text: set where a stop text ended it."""

    cut_off: bool = False
    keep: int | None = None
    text: str | None = None
    thinking_closed: bool = False


class VllmGenerator:
    """Answers requests by a vLLM server, a fixed number at a time.

    url: of the server. stop_ids: tokens that end an answer. names: side -> the name under which the server has it;
    others go by their own name, and the base by that of the first model that is no adapter. slots: requests sent at
    once; the server batches them.
    words: as in ``Generator``. positions: what the model can hold; where the server holds as many, an answer is cut off
    there, as by ``Generator``. api_key: what the server was started with. silence_s: longest wait for the server's next
    byte, which without ``on_token`` is the whole answer. Raises UsageError for something that is no URL.
    """

    def __init__(
        self,
        url: str,
        stop_ids: Sequence[int],
        *,
        names: Mapping[str, str] | None = None,
        slots: int = 64,
        words: Words | None = None,
        positions: int | None = None,
        api_key: str | None = None,
        silence_s: float = 3600.0,
    ):
        self.link = Link(url, api_key, silence_s)
        self.stop_ids = frozenset(stop_ids)
        self.names = dict(names or {})
        self.slots = slots
        self.words = words
        self.positions = positions
        self._running: list[_Asked] = []

    def version(self) -> str | None:
        """Return the server's version, or None where it does not say. Raises EngineError where it cannot be reached."""
        found = self.link.get("/version", missing={})
        return str(found["version"]) if isinstance(found, dict) and "version" in found else None

    def cancel(self, key: object) -> None:
        """End the request of this key with what has come of it (nothing, without ``on_token``); from any thread."""
        for asked in self._running:
            if asked.request.key == key:
                asked.call.end()

    def run(
        self, requests: Sequence[Request], on_token: Callable[[Request, int], None] | None = None
    ) -> Iterator[Completion]:
        """Yield each completion as it finishes, in any order.

        on_token: called with the request and each new token, stop tokens left out; only with it are answers streamed.
        Raises UsageError for requests that ``Generator`` refuses too, EngineError for a server that cannot be reached,
        lacks a model, holds too few tokens, or hands out no token ids.
        """
        self._check(requests)
        if not requests:
            return
        asked = self._asked(requests)
        completions = [Completion(request) for request in requests]
        news: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(asked)):
            waiting.put(index)
        self._running = asked
        threads = [
            threading.Thread(
                target=self._work, args=(asked, waiting, news, bool(on_token)), name=f"vllm-{n}", daemon=True
            )
            for n in range(min(self.slots, len(asked)))
        ]
        left = len(asked)
        try:
            for thread in threads:
                thread.start()
            while left:
                index, what = news.get()
                completion, call = completions[index], asked[index].call
                if isinstance(what, BaseException) and not call.ended.is_set():
                    raise what
                if isinstance(what, tuple):
                    ids, logprobs = what
                    self._book(completion, call, ids, logprobs, on_token)
                    continue
                left -= 1
                if call.ended.is_set():
                    completion.cancelled = True
                else:
                    self._finish(completion, what)
                yield completion
        finally:
            for one in asked:
                one.call.end()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self._running = []

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            name, s = f"request {request.key!r}", request.sampling
            check_request(request, name, self.words)
            if s.logprobs and s.max_thinking_tokens:
                raise UsageError(
                    f"{name} wants log probabilities and a thinking limit; a vLLM server gives none for tokens that "
                    "are written for the model",
                    "leave out one of the two, or use our own engine",
                )

    def _asked(self, requests: Sequence[Request]) -> list[_Asked]:
        """Find the models on the server, and the room of every request."""
        listed = self.link.get("/v1/models")
        cards = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise EngineError(f"{self.link.url} has no list of models", "give the URL of a vLLM server")
        served = {card["id"]: card for card in cards}
        roots = [name for name, card in served.items() if not card.get("parent")]
        names = {side: self.names.get(side, side) for side in dict.fromkeys(request.side for request in requests)}
        if BASE in names and BASE not in self.names and roots:
            names[BASE] = roots[0]
        for side, name in names.items():
            if name not in served:
                raise EngineError(
                    f"{self.link.url} serves no model named {name}; it has {', '.join(served) or 'none'}",
                    "name one that it has" + f", or start it with `--lora-modules {name}=FOLDER`" * (side != BASE),
                )
        held = [card["max_model_len"] for card in cards if card.get("max_model_len")]
        room = min(held) if held else None
        return [self._place(request, names[request.side], room) for request in requests]

    def _place(self, request: Request, name: str, room: int | None) -> _Asked:
        """room: tokens of prompt and answer that the server holds; None where it does not say."""
        prompt, limit = len(request.prompt_ids), request.sampling.max_new_tokens
        bounds = [n for n in (room, self.positions) if n is not None]
        if room is not None and prompt + limit > room and (self.positions is None or room < self.positions):
            raise EngineError(
                f"request {request.key!r} needs {prompt + limit} tokens ({prompt} of the prompt, {limit} new ones); "
                f"{self.link.url} holds {room}",
                f"start it with `--max-model-len {prompt + limit}` or more, or ask for fewer new tokens",
            )
        if bounds and prompt >= min(bounds):
            raise UsageError(
                f"request {request.key!r} has a prompt of {prompt} tokens; the server takes fewer than {min(bounds)}"
            )
        return _Asked(request, Call(), name, min([limit, *(n - prompt for n in bounds)]))

    def _work(
        self,
        asked: Sequence[_Asked],
        waiting: queue.SimpleQueue[int],
        news: queue.SimpleQueue[tuple[int, Any]],
        stream: bool,
    ) -> None:
        """One of the threads: take requests until none is left; tell what comes, and how each ended."""
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                end: Any = self._answer(asked[index], stream, lambda *what, index=index: news.put((index, what)))
            except BaseException as error:
                end = error
            news.put((index, end))

    def _answer(self, asked: _Asked, stream: bool, tell: _Tell) -> _End:
        """Have one answer written, in two calls where its thinking must be closed."""
        s, limit = asked.request.sampling, asked.limit
        first = min(limit, s.max_thinking_tokens or limit)
        part = self._part(asked, [], first, stream, tell)
        end, ids = _End(part.cut_off), part.ids
        if s.max_thinking_tokens and part.cut_off and len(ids) == s.max_thinking_tokens:
            assert self.words is not None
            if self.words.thinks(ids):
                end.thinking_closed = True
                closing = list(self.words.closing_ids[: limit - len(ids)])
                tell(closing, [])
                ids = ids + closing
            if len(ids) < limit:
                part = self._part(asked, ids, limit - len(ids), stream, tell)
                end.cut_off = part.cut_off
                ids = ids + part.ids
        if s.stop:
            assert self.words is not None
            end.keep, end.text = self.words.before_stop(ids, s.stop)
            end.cut_off &= end.text is None
        return end

    def _part(self, asked: _Asked, written: Sequence[int], limit: int, stream: bool, tell: _Tell) -> _Part:
        """Have up to ``limit`` tokens written after the prompt and what is ``written``."""
        request, s = asked.request, asked.request.sampling
        prompt = [*request.prompt_ids, *written]
        body = {
            "model": asked.name,
            "prompt": prompt,
            "max_tokens": limit,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "min_p": s.min_p,
            "repetition_penalty": s.repetition_penalty,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "seed": s.seed & (2**63 - 1),
            "stop": list(s.stop),
            "stop_token_ids": sorted(self.stop_ids),
            "ignore_eos": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "stream": stream,
        }
        if s.logprobs:
            body["logprobs"] = 0  # the chosen token's alone
        part = _Part()

        def take(choice: Any) -> bool:
            """Add what a response or a chunk of it brings; return whether it is the last."""
            if not isinstance(choice.get("token_ids"), list):
                raise EngineError(
                    f"{self.link.url} hands out no token ids", "use vLLM 0.10.2 or newer, which has `return_token_ids`"
                )
            if choice.get("prompt_token_ids", prompt) not in (prompt, None):
                raise EngineError(f"{self.link.url} changed the prompt's tokens", "serve the model this run is about")
            ids = [token for token in choice["token_ids"] if token not in self.stop_ids]
            scores = _logprobs(choice, len(choice["token_ids"]))[: len(ids)] if s.logprobs else []
            ended = choice.get("finish_reason")
            if ended not in (None, "stop", "length"):
                raise EngineError(
                    f"{self.link.url} ended an answer early ({ended})", "look at the server's log, then compare again"
                )
            # A stop token in the last place allowed is an end.
            part.cut_off = ended == "length" and len(ids) == len(choice["token_ids"])
            part.ids += ids
            if ended and s.stop:
                assert self.words is not None
                del ids[max(self.words.before_stop(part.ids, s.stop)[0] - len(part.ids) + len(ids), 0) :]
                del scores[len(ids) :]
            tell(ids, scores)
            return bool(ended)

        def read(response: http.client.HTTPResponse) -> _Part:
            if not stream:
                take(_choice(as_json(response), self.link.url))
                return part
            try:
                for event in _events(response):
                    if take(_choice(event, self.link.url)):
                        return part
                raise Broken("the stream ended before the answer")
            except (OSError, http.client.HTTPException, Broken) as error:
                if not part.ids or asked.call.ended.is_set():
                    raise
                raise EngineError(
                    f"{self.link.url} broke off after {len(part.ids)} tokens of an answer ({error})",
                    "see in the server's log whether it still runs",
                ) from None

        return self.link.send("POST", "/v1/completions", body, read, asked.call)

    @staticmethod
    def _book(
        completion: Completion,
        call: Call,
        ids: list[int],
        logprobs: list[float],
        on_token: Callable[[Request, int], None] | None,
    ) -> None:
        """Add new tokens, up to the one at which the request is cancelled."""
        for number, token in enumerate(ids):
            if call.ended.is_set():
                return
            completion.ids.append(token)
            completion.logprobs += logprobs[number : number + 1]
            if on_token:
                on_token(completion.request, token)

    @staticmethod
    def _finish(completion: Completion, end: _End) -> None:
        completion.cut_off, completion.text, completion.thinking_closed = end.cut_off, end.text, end.thinking_closed
        if end.keep is not None:
            del completion.ids[end.keep :], completion.logprobs[end.keep :]


def _choice(answer: Any, url: str) -> Any:
    """The one choice of a response or chunk. Raises EngineError for an error in a stream, and for other shapes."""
    if isinstance(answer, dict) and answer.get("error"):
        error = answer["error"]
        said = error.get("message", error) if isinstance(error, dict) else error
        raise EngineError(f"{url} gave up on an answer: {said}", "the server's log may say more")
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise EngineError(f"{url} answers in a shape that is not OpenAI's", "give the URL of a vLLM server")
    return choices[0]


def _events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The JSON of each event of a stream, up to its end mark. Raises Broken for half an event."""
    for line in response:
        kind, _, data = line.partition(b":")
        if kind != b"data":
            continue
        if data.strip() == b"[DONE]":
            return
        try:
            yield json.loads(data)
        except ValueError:
            raise Broken("half an event") from None


def _logprobs(choice: Any, count: int) -> list[float]:
    found = (choice.get("logprobs") or {}).get("token_logprobs") or []
    if len(found) != count or None in found:
        raise EngineError("the server gives no log probabilities of its tokens", "use vLLM 0.10.2 or newer")
    return [float(value) for value in found]
