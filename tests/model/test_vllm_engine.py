"""Answers from a vLLM server against those of our own engine, over real HTTP; what goes wrong on the way."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_decoder import (
    SIDES,
    WORDS,
    check_cancelling,
    draw_rows,
    packed_logits,
    random_adapter,
    spelled,
    tiny_pair,
)

from deepdoctor.errors import EngineError, UsageError
from deepdoctor.model import vllm_http
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.generate import Completion, Generator, Request
from deepdoctor.model.sampling import Sampling
from deepdoctor.model.vllm_engine import VllmGenerator
from helpers_vllm import FakeVllm, fake_vllm

STOP = 7


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Adapter]:
    """A tiny Qwen3 in fp32 and an adapter strong enough to change its words."""
    decoder = tiny_pair(tmp_path_factory.mktemp("tiny"), "qwen3")[0]
    return decoder, random_adapter(decoder).eval()


@pytest.fixture
def server(tiny: tuple[Decoder, Adapter], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    """A server with the tiny model; waits between tries are short."""
    decoder, adapter = tiny
    monkeypatch.setattr(vllm_http, "FIRST_WAIT_S", 0.001)
    lock = threading.Lock()

    def next_token(name: str, ids: list[int]) -> tuple[int, float]:
        with lock:
            scores = packed_logits(decoder, [ids], adapter if name == "tuned" else None)[-1].float().log_softmax(-1)
        return int(scores.argmax()), float(scores.max())

    with fake_vllm(next_token, spelled) as running:
        yield running


def requests_of(sampling: Sampling, count: int = 4) -> list[Request]:
    """Prompts of several lengths, both sides in turn."""
    rows = draw_rows(*range(3, 3 + count), seed=4)
    return [Request(row, sampling, SIDES[n % 2], n) for n, row in enumerate(rows)]


def by_key(completions: Iterator[Completion]) -> dict[object, Completion]:
    """Completions by key; each comes once."""
    done = list(completions)
    found = {c.request.key: c for c in done}
    assert len(found) == len(done)
    return found


def same(found: dict[object, Completion], expected: dict[object, Completion]) -> None:
    """Every field of every completion is equal; log probabilities nearly."""
    assert found.keys() == expected.keys()
    for key, one in expected.items():
        assert replace(found[key], logprobs=[]) == replace(one, logprobs=[])
        torch.testing.assert_close(torch.tensor(found[key].logprobs), torch.tensor(one.logprobs), rtol=1e-4, atol=1e-5)


def client_threads() -> list[str]:
    """Names of the generator's threads that still run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vllm-")]


def stop_of(tiny: tuple[Decoder, Adapter], place: int) -> int:
    """The token that the first request's answer has at a place."""
    return next(Generator(*tiny, ()).run(requests_of(Sampling(12), 1))).ids[place]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("setting", ["plain", "logprobs", "stop text", "thinking", "thinking all", "closed before"])
def test_completions_are_those_of_our_engine(
    tiny: tuple[Decoder, Adapter], server: FakeVllm, setting: str, stream: bool
) -> None:
    """Ids, end, text, closed thinking and log probabilities are Generator's; tokens come in order in this thread."""
    free = {c.request.key: c.ids for c in Generator(*tiny, ()).run(requests_of(Sampling(12)))}
    text = spelled(free[0])
    settings: dict[str, Any] = {
        "plain": {},
        "logprobs": {"logprobs": True},
        "stop text": {"stop": ("never there", text[7:10], text[15:17]), "logprobs": True},
        "thinking": {"max_thinking_tokens": 4, "stop": (text[4:6],)},
        "thinking all": {"max_thinking_tokens": 11},
        "closed before": {"max_thinking_tokens": 5},
    }
    words = replace(WORDS, close=spelled(free[0][2:3])) if setting == "closed before" else WORDS
    requests = requests_of(Sampling(12, **settings[setting]))
    stop = (stop_of(tiny, 6), 2) if setting in ("plain", "logprobs") else ()
    expected = by_key(Generator(*tiny, stop, words=words).run(requests))
    heard: dict[object, list[int]] = {n: [] for n in range(4)}
    threads = set()

    def on_token(request: Request, token: int) -> None:
        heard[request.key].append(token)
        threads.add(threading.current_thread())

    generator = VllmGenerator(server.url, stop, words=words)
    same(by_key(generator.run(requests, on_token if stream else None)), expected)
    assert all(body["stream"] == stream for body in server.bodies)
    if stream:
        assert threads == {threading.current_thread()}
        assert all(heard[n][: len(c.ids)] == c.ids for n, c in expected.items())
    if setting == "plain":
        assert not all(c.cut_off for c in expected.values())


def test_what_is_sent(server: FakeVllm) -> None:
    """The prompt goes as ids with every setting written out, so that no default of the server acts."""
    settings = Sampling(3, 0.7, 0.9, 1.2, seed=2**63 + 5, top_k=40, min_p=0.05)
    request = Request((3, 4, 5), settings, "tuned", "k")
    list(VllmGenerator(f"{server.url}/v1/", (9, STOP)).run([request]))
    assert server.bodies == [
        {
            "model": "tuned",
            "prompt": [3, 4, 5],
            "max_tokens": 3,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.2,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "seed": 5,
            "stop": [],
            "stop_token_ids": [STOP, 9],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "stream": False,
        }
    ]


def test_no_more_at_once_than_slots(server: FakeVllm) -> None:
    """Nine requests with three slots: three at once, never four."""
    server.token_s = 0.01
    assert len(list(VllmGenerator(server.url, (), slots=3).run(requests_of(Sampling(3), 9)))) == 9
    assert server.most == 3


def test_cancelled_requests_leave_the_others_alone(tiny: tuple[Decoder, Adapter], server: FakeVllm) -> None:
    """One is cancelled at its third token and one while it waits: the first hangs up, the other is never sent."""
    requests = requests_of(Sampling(9), 5)
    expected = {key: c.ids for key, c in by_key(Generator(*tiny, ()).run(requests)).items()}
    server.token_s = 0.01
    check_cancelling(VllmGenerator(server.url, (), slots=2), requests, expected)
    assert len(server.bodies) == 4 and requests[0].prompt_ids in server.broken


def test_cancel_does_not_wait_for_the_answer(server: FakeVllm) -> None:
    """Without streaming, a cancelled request ends at once although the server is still writing."""
    server.token_s = 0.5
    generator = VllmGenerator(server.url, ())
    threading.Timer(0.2, generator.cancel, [0]).start()
    started = time.perf_counter()
    (found,) = generator.run(requests_of(Sampling(40), 1))
    assert (found.cancelled, found.ids, found.cut_off) == (True, [], False)
    assert time.perf_counter() - started < 5


def test_leaving_early_hangs_up(server: FakeVllm) -> None:
    """Who stops reading after the first completion leaves no thread behind, and nothing more is sent."""
    server.token_s = 0.02
    answers = VllmGenerator(server.url, (), slots=2).run(requests_of(Sampling(8), 9))
    next(answers)
    answers.close()
    assert not client_threads()
    time.sleep(0.1)
    assert len(server.bodies) <= 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_busy_or_broken_server_is_asked_again(tiny: tuple[Decoder, Adapter], server: FakeVllm, stream: bool) -> None:
    """429, 503, a cut connection and a stream that ends before its first token change nothing in the answers."""
    requests = requests_of(Sampling(5))
    expected = by_key(Generator(*tiny, ()).run(requests))
    server.faults = ["busy", "later", "cut", "busy", "cut", *(["no end"] if stream else [])]
    generator = VllmGenerator(server.url, (), slots=2)
    same(by_key(generator.run(requests, (lambda request, token: None) if stream else None)), expected)
    assert server.tries == 4 + (6 if stream else 5)


FAULTS = {
    "busy": "answers 503 \\(starting\\), 7 times in a row",
    "cut": "broke off in the middle of an answer",
    "garbage": "does not speak HTTP",
    "html": "not JSON: '<html>'",
    "shape": "not OpenAI's",
    "refused": "/v1/completions answers 400: max_tokens is odd",
    "no ids": "no token ids",
    "no logprobs": "no log probabilities",
    "other prompt": "changed the prompt's tokens",
    "abort": "ended an answer early \\(abort\\)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_server_and_what_it_said(server: FakeVllm, fault: str) -> None:
    """What does not pass ends the run with one clear error, and leaves no thread behind."""
    server.faults = [fault] * 40
    with pytest.raises(EngineError, match=FAULTS[fault]) as raised:
        list(VllmGenerator(server.url, (), slots=3).run(requests_of(Sampling(5, logprobs=True))))
    assert raised.value.hint
    assert fault in ("busy", "cut") or len(server.faults) >= 36
    assert not client_threads()


@pytest.mark.parametrize(
    ("fault", "message"), [("half", "broke off after 2 tokens"), ("gives up", "gave up on an answer: out of blocks")]
)
def test_a_stream_that_breaks_is_not_begun_anew(server: FakeVllm, fault: str, message: str) -> None:
    """Tokens that were handed out cannot be taken back, so a stream cut after some is an error."""
    server.faults = [fault]
    with pytest.raises(EngineError, match=message):
        list(VllmGenerator(server.url, ()).run(requests_of(Sampling(5), 1), lambda request, token: None))
    assert server.tries == 1


def test_a_server_that_is_not_there(server: FakeVllm) -> None:
    """The error names the URL; something that is no URL is refused before any call."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"{url} cannot be reached \\(Connection refused\\)"):
            list(VllmGenerator(url, ()).run(requests_of(Sampling(2))))
    for wrong in ("127.0.0.1:8000", "ftp://host", "http://", "http://host:port"):
        with pytest.raises(UsageError, match="is not the URL of a server"):
            VllmGenerator(wrong, ())
    assert list(VllmGenerator(url, ()).run([])) == []


def test_the_servers_models_are_looked_at_first(server: FakeVllm) -> None:
    """A missing model names those there are; a list of another shape and a wrong key are told apart."""
    requests = requests_of(Sampling(2))
    mine = VllmGenerator(server.url, (), names={"tuned": "mine"})
    with pytest.raises(EngineError, match="no model named mine; it has base, tuned") as raised:
        list(mine.run(requests))
    assert "--lora-modules mine=FOLDER" in str(raised.value.hint)
    assert len(list(mine.run(requests[:1]))) == 1
    with pytest.raises(EngineError, match="no model named other"):
        list(VllmGenerator(server.url, (), names={"base": "other"}).run(requests))
    with pytest.raises(EngineError, match="no model named placebo"):
        list(VllmGenerator(server.url, ()).run([replace(requests[0], side="placebo")]))
    swapped = VllmGenerator(server.url, (), names={"tuned": "base", "base": "tuned"})
    assert [c.request.side for c in swapped.run(requests[:1])] == ["base"] and server.bodies[-1]["model"] == "tuned"
    server.models = {"data": [{"id": "a-hub/model", "parent": None}, {"id": "tuned", "parent": "a-hub/model"}]}
    assert len(list(VllmGenerator(server.url, ()).run(requests[:1]))) == 1
    assert server.bodies[-1]["model"] == "a-hub/model"
    for shape in ([], {"data": ["base"]}, {"detail": "x"}):
        server.models = shape
        with pytest.raises(EngineError, match="has no list of models"):
            list(VllmGenerator(server.url, ()).run(requests))
    server.models, server.key = None, "secret"
    with pytest.raises(EngineError, match="refuses the key \\(401: Unauthorized\\)"):
        list(VllmGenerator(server.url, ()).run(requests))
    assert len(list(VllmGenerator(server.url, (), api_key="secret").run(requests))) == 4


def test_room_for_prompt_and_answer(tiny: tuple[Decoder, Adapter], server: FakeVllm) -> None:
    """A window below the need is an error; at the model's own limit answers are cut off as by our engine."""
    server.window = 14
    request = Request(draw_rows(10, seed=1)[0], Sampling(6), key="q1")
    with pytest.raises(
        EngineError, match=r"'q1' needs 16 tokens \(10 of the prompt, 6 new ones\); .* holds 14"
    ) as raised:
        list(VllmGenerator(server.url, ()).run([request]))
    assert "--max-model-len 16" in str(raised.value.hint)
    with pytest.raises(EngineError, match="holds 14"):
        list(VllmGenerator(server.url, (), positions=1024).run([request]))
    (found,) = VllmGenerator(server.url, (), positions=14).run([request])
    assert found.cut_off and len(found.ids) == 4
    with pytest.raises(UsageError, match="'q1' has a prompt of 10 tokens; the server takes fewer than 10"):
        list(VllmGenerator(server.url, (), positions=10).run([request]))
    server.window = None
    (free,) = VllmGenerator(server.url, ()).run([request])
    assert free.ids[:4] == found.ids and len(free.ids) == 6
    long = Request(draw_rows(1020, seed=1)[0], Sampling(9), key="q2")
    server.window = tiny[0].config.max_position_embeddings
    generator = VllmGenerator(server.url, (), positions=tiny[0].config.max_position_embeddings)
    same(by_key(generator.run([long])), by_key(Generator(*tiny, ()).run([long])))


def test_requests_that_cannot_be_answered(server: FakeVllm) -> None:
    """They are refused before anything is sent, with the request's key."""
    faults = [
        (Request([], Sampling(1), key="q1"), "'q1' has an empty prompt"),
        (Request([1], Sampling(1, top_p=0), key="q2"), "'q2': top_p is 0, expected"),
        (Request([1], Sampling(1, stop=("x",)), key="q3"), "'q3' has a stop text"),
    ]
    for request, message in faults:
        with pytest.raises(UsageError, match=message):
            list(VllmGenerator(server.url, ()).run([request]))
    both = Request([1], Sampling(9, max_thinking_tokens=2, logprobs=True), key="q4")
    with pytest.raises(UsageError, match="'q4' wants log probabilities and a thinking limit"):
        list(VllmGenerator(server.url, (), words=WORDS).run([both]))
    assert server.tries == 0


def test_an_error_of_the_caller_passes_through(server: FakeVllm) -> None:
    """What on_token raises comes out of the run, and the threads end."""

    def fail(request: Request, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(VllmGenerator(server.url, ()).run(requests_of(Sampling(5)), fail))
    assert not client_threads()


def test_tls_with_a_server_that_has_none() -> None:
    """A https URL gets a TLS connection; a server without TLS there is an error at once."""
    with socket.create_server(("127.0.0.1", 0)) as plain:
        port = plain.getsockname()[1]

        def hang_up() -> None:
            with plain.accept()[0] as accepted:
                accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                accepted.recv(4096)

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        with pytest.raises(EngineError, match=f"https://127.0.0.1:{port} cannot be reached"):
            list(VllmGenerator(f"https://127.0.0.1:{port}", ()).run(requests_of(Sampling(1))))
        thread.join()
