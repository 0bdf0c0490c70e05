"""Tokens booked while the next step runs: the answers of booking first, of single answers, and of small caches."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_decoder import SIDES, WORDS, check_cancelling, draw_rows, random_adapter, spelled, tiny_pair

from deepdoctor.errors import ModelError
from deepdoctor.model import paged_runner as module
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.block_pool import BLOCK
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.drawer import Drawer, _SeenIds, _SeenMask
from deepdoctor.model.generate import Completion, Generator, Request, Words
from deepdoctor.model.paged_runner import PagedRunner
from deepdoctor.model.runner import SlotRunner
from deepdoctor.model.sampling import Sampling

KINDS = (
    Sampling(20),
    Sampling(33, repetition_penalty=1.3),
    Sampling(25, 0.8, 0.9, seed=3),
    Sampling(40, 1.2, 1.0, 1.1, seed=4, top_k=20, min_p=0.02, logprobs=True),
    Sampling(30, max_thinking_tokens=7, logprobs=True),
    Sampling(30, 0.7, seed=9, stop=("ab", "xa", "qq")),
    Sampling(1),
    Sampling(28, stop=("ca", "ha"), logprobs=True),
    Sampling(30, repetition_penalty=1.2, max_thinking_tokens=5),
)
"""Greedy and drawn, with and without penalty, limit of thinking, stop texts and log probabilities."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A tiny Qwen3 in fp32."""
    return tiny_pair(tmp_path_factory.mktemp("tiny"), "qwen3")[0]


@pytest.fixture(scope="module")
def adapter(tiny: Decoder) -> Adapter:
    """An adapter strong enough to change the tiny model's words."""
    return random_adapter(tiny).eval()


def many_requests(count: int = 27) -> list[Request]:
    """Every kind of request, on both sides, some with equal prompts."""
    prompts = draw_rows(*(3 + 9 * n for n in range(10)), seed=1)
    return [Request(prompts[n % 10], KINDS[n % len(KINDS)], SIDES[n % 2], n) for n in range(count)]


def answer(
    decoder: Decoder, adapter: Adapter, requests: Sequence[Request], slots: int, runner: Any, ahead: bool
) -> dict[object, Completion]:
    """Completions by key; what was heard of each is what it holds."""
    generator = Generator(decoder, adapter, (7, 33), slots, words=WORDS, runner=runner)
    generator._ahead = ahead
    heard: dict[object, list[int]] = {}
    done = {}
    for completion in generator.run(requests, lambda r, token: heard.setdefault(r.key, []).append(token)):
        key = completion.request.key
        assert key not in done
        done[key] = completion
        told = heard.get(key, [])
        assert told == completion.ids or (completion.text is not None and told[: len(completion.ids)] == completion.ids)
    return done


def same(found: dict[object, Completion], expected: dict[object, Completion]) -> None:
    """Everything is equal; log probabilities to rounding."""
    assert found.keys() == expected.keys()
    for key, c in found.items():
        wanted = expected[key]
        assert replace(c, logprobs=[]) == replace(wanted, logprobs=[])
        assert c.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert len(c.logprobs) == (len(c.ids) if c.request.sampling.logprobs else 0)


@pytest.fixture(scope="module")
def single(tiny: Decoder, adapter: Adapter) -> dict[object, Completion]:
    """Every request answered alone, each token booked before the next is computed."""
    found: dict[object, Completion] = {}
    for request in many_requests():
        found |= answer(tiny, adapter, [request], 1, "slots", False)
    assert sum(c.text is not None for c in found.values()) >= 2
    assert sum(c.thinking_closed for c in found.values()) >= 3
    assert sum(not c.cut_off and c.text is None for c in found.values()) >= 2
    return found


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("runner", ["slots", "paged"])
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_booking_changes_no_answer(
    tiny: Decoder, adapter: Adapter, single: dict[object, Completion], ahead: bool, runner: str, slots: int
) -> None:
    """Whether booked before the next step or beside it, refilled or not, answers are those of requests alone."""
    same(answer(tiny, adapter, many_requests(), slots, runner, ahead), single)


@pytest.mark.parametrize("blocks", [6, 8])
def test_a_full_cache_is_booked_first(
    tiny: Decoder, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """An answer that goes back to the queue has all its tokens, also where the last was not booked yet."""
    long = [replace(r, sampling=replace(r.sampling, max_new_tokens=BLOCK + 20)) for r in many_requests(12)]
    expected = answer(tiny, adapter, long, 16, "slots", False)
    monkeypatch.setattr(module, "fitting_blocks", lambda *given, **named: blocks)
    for ahead in (False, True):
        same(answer(tiny, adapter, long, 16, "paged", ahead), expected)


@pytest.mark.parametrize("kind", [SlotRunner, PagedRunner])
@pytest.mark.parametrize("ahead", [False, True])
def test_ends_that_are_known_are_not_computed(
    tiny: Decoder, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, kind: Any, ahead: bool
) -> None:
    """Rows that end by a count or a stop token are not decoded again; one that ends by a stop text is, once, ahead."""
    rows: list[int] = []
    decode = kind.decode
    monkeypatch.setattr(kind, "decode", lambda self, tokens: rows.append(len(tokens)) or decode(self, tokens))
    prompt = draw_rows(9, seed=4)[0]
    runner = "paged" if kind is PagedRunner else "slots"
    free = answer(tiny, adapter, [Request(prompt, Sampling(9), key=0)], 1, runner, ahead)[0].ids
    assert rows == [1] * 8 and not {7, 33} & set(free)
    rows.clear()
    requests = [Request(prompt, Sampling(n), key=n) for n in (1, 4, 9)]
    answer(tiny, adapter, requests, 3, runner, ahead)
    assert rows == [2, 2, 2, 1, 1, 1, 1, 1]
    rows.clear()
    stop = spelled(free[4:5])
    assert spelled(free).index(stop) == 8
    found = answer(tiny, adapter, [Request(prompt, Sampling(9, stop=(stop,)), key=0)], 1, runner, ahead)[0]
    assert found.ids == free[:4] and rows == [1] * (5 if ahead else 4)


def test_cancelled_requests_leave_the_others_alone(tiny: Decoder, adapter: Adapter) -> None:
    """One request is cancelled while it is answered, one while it waits, with a step on its way."""
    requests = [Request(p, Sampling(9), SIDES[n % 2], n) for n, p in enumerate(draw_rows(3, 8, 13, 18, 23, seed=8))]
    expected = {c.request.key: c.ids for c in Generator(tiny, adapter, (), 5).run(requests)}
    generator = Generator(tiny, adapter, (), 2)
    generator._ahead = True
    check_cancelling(generator, requests, expected)


@pytest.mark.parametrize("runner", ["slots", "paged"])
def test_a_consumer_may_stop(tiny: Decoder, adapter: Adapter, runner: Any) -> None:
    """A run that is closed early, or ended by an error of its consumer, leaves a generator that answers as before."""
    requests = many_requests()
    generator = Generator(tiny, adapter, (7, 33), 4, words=WORDS, runner=runner)
    generator._ahead = True
    expected = {c.request.key: c.ids for c in generator.run(requests)}
    run = generator.run(requests)
    next(run)
    run.close()

    def fail(request: Request, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(generator.run(requests, fail))
    assert {c.request.key: c.ids for c in generator.run(requests)} == expected


@pytest.mark.parametrize(
    ("text", "closed"), [("<think>", True), (" \n<think>", True), ("", False), ("x<think>", False)]
)
def test_only_opened_thinking_is_closed(tiny: Decoder, text: str, closed: bool) -> None:
    """Where the prompt opens no thinking, the limit acts on answers that begin with the tag alone.

    An answer without any thinking used to be cut by a closing tag.
    """

    def decode(ids: Sequence[int]) -> str:
        return text + spelled(ids)

    request = Request(draw_rows(9, seed=4)[0], Sampling(12, max_thinking_tokens=4), key=0)
    words = Words(decode, close="zz", closing_ids=(5, 6), opened=False)
    (found,) = Generator(tiny, None, (), words=words).run([request])
    assert found.thinking_closed == closed and (found.ids[4:6] == [5, 6]) == closed
    (opened,) = Generator(tiny, None, (), words=replace(words, opened=True)).run([request])
    assert opened.thinking_closed


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_broken_logits(tmp_path: Path, temperature: float) -> None:
    """Logits that are nan end the run with an error that says so, rather than with token 0."""
    decoder, _ = tiny_pair(tmp_path, "llama")
    decoder.norm.fill_(float("nan"))
    with pytest.raises(ModelError, match="logits that are nan or infinite"):
        list(Generator(decoder, None, ()).run([Request([1], Sampling(3, temperature))]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_was_seen_is_kept_for_a_penalty(device: str) -> None:
    """Nothing is kept for requests without one, and on a CPU no (slots, V) for those with one."""
    drawer = Drawer(4, 1000, torch.device(device))
    drawer.begin(0, [5, 6], Sampling(temperature=0.5))
    assert drawer._seen is None
    drawer.begin(1, [5, 6], Sampling(repetition_penalty=1.1))
    assert isinstance(drawer._seen, _SeenIds if device == "cpu" else _SeenMask)


@torch.inference_mode()
def test_both_ways_to_remember_draw_alike() -> None:
    """Ids and mask give the same tokens and log probabilities, while slots start anew, move and grow."""
    draw = torch.Generator().manual_seed(0)
    samplings = [
        Sampling(repetition_penalty=1.5),
        Sampling(),
        Sampling(temperature=0.9, repetition_penalty=0.7, seed=3, logprobs=True),
        Sampling(temperature=1.1, seed=5),
    ]
    drawers = [Drawer(4, 300, torch.device("cpu")) for _ in range(2)]
    drawers[1]._seen = _SeenMask(4, 300, torch.device("cpu"))
    for slot, s in enumerate(samplings):
        for drawer in drawers:
            drawer.begin(slot, [slot, 7 * slot, 50], s)
    for step in range(300):
        logits = torch.randn(4, 300, generator=draw)
        forced = {2: 17} if step == 5 else {}
        (ids, ours), (wanted, theirs) = (d.draw(logits, 0, samplings, [step] * 4, forced) for d in drawers)
        assert ids == wanted and ours == pytest.approx(theirs, abs=1e-5)
        if step == 100:
            for drawer in drawers:
                drawer.begin(0, [1, 2, 3], samplings[0])
                drawer.move(2, 0)
                drawer.begin(2, list(range(40)), samplings[2])
