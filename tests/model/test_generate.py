"""Answers against transformers, batches against single answers, refilled slots, sides in one batch, sampling."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_decoder import (
    SIDES,
    WORDS,
    check_cancelling,
    count_tokens,
    draw_rows,
    packed_logits,
    random_adapter,
    spelled,
    tiny_pair,
)

from deepdoctor.errors import UsageError
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.fast_decode import can_pack
from deepdoctor.model.generate import Completion, Generator, Request
from deepdoctor.model.load import load_decoder, load_tokenizer
from deepdoctor.model.sampling import Sampling
from deepdoctor.model.tokenizer import Tokenizer

PROMPTS = (
    "A man has chest pain. The first test is",
    "Fever and a stiff neck suggest",
    "Iron deficiency anaemia is treated with",
    "The",
)
STOP = 7


@pytest.fixture(scope="session")
def real(smollm2: Path) -> tuple[Decoder, Any, Tokenizer]:
    """SmolLM2 in fp32: ours, transformers' and the tokenizer, loaded once."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return load_decoder(smollm2, "fp32"), theirs, load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    """A tiny Qwen3 in fp32."""
    return tiny_pair(tmp_path_factory.mktemp("tiny"), "qwen3")


@pytest.fixture(scope="module")
def adapter(tiny: tuple[Decoder, Any]) -> Adapter:
    """An adapter strong enough to change the tiny model's words."""
    return random_adapter(tiny[0]).eval()


def answers(
    decoder: Decoder, requests: Sequence[Request], adapter: Adapter | None = None, slots: int = 16, stop: Any = (STOP,)
) -> dict[object, Completion]:
    """Completions by key; each request finishes exactly once."""
    done = list(Generator(decoder, adapter, stop, slots).run(requests))
    assert sorted(str(c.request.key) for c in done) == sorted(str(r.key) for r in requests)
    return {c.request.key: c for c in done}


def ids(completions: dict[object, Completion]) -> dict[object, list[int]]:
    """The tokens alone."""
    return {key: c.ids for key, c in completions.items()}


def transformers_greedy(model: Any, prompt: Sequence[int], new: int, stop: Sequence[int], **options: Any) -> list[int]:
    """The tokens transformers' own generate adds, stop token left out."""
    out = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=list(stop) or None,
        pad_token_id=0,
        **options,
    )
    added = out[0, len(prompt) :].tolist()
    return added[:-1] if added and added[-1] in stop else added


def test_real_greedy_equals_transformers(real: tuple[Decoder, Any, Tokenizer]) -> None:
    """Four prompts, 24 tokens: alone, in one batch, and with two slots refilled, the tokens are transformers'."""
    decoder, theirs, tokenizer = real
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    expected = {n: transformers_greedy(theirs, p, 24, tokenizer.stop_ids) for n, p in enumerate(prompts)}
    requests = [Request(p, Sampling(24), key=n) for n, p in enumerate(prompts)]
    together = answers(decoder, requests, stop=tokenizer.stop_ids)
    assert ids(together) == expected
    assert all(c.cut_off == (len(c.ids) == 24) for c in together.values())
    assert ids(answers(decoder, requests, slots=2, stop=tokenizer.stop_ids)) == expected
    assert ids(answers(decoder, requests[:1], stop=tokenizer.stop_ids)) == {0: expected[0]}


def test_real_repetition_penalty_equals_transformers(real: tuple[Decoder, Any, Tokenizer]) -> None:
    """With a penalty of 1.3 on prompt and answer the tokens are transformers', and not those without it."""
    decoder, theirs, tokenizer = real
    prompt = tokenizer.encode(PROMPTS[1])
    expected = transformers_greedy(theirs, prompt, 20, tokenizer.stop_ids, repetition_penalty=1.3)
    requests = [Request(prompt, Sampling(20, repetition_penalty=p), key=p) for p in (1.0, 1.3)]
    found = ids(answers(decoder, requests, stop=tokenizer.stop_ids))
    assert found[1.3] == expected != found[1.0]


def test_real_packed_weights_read_alike(real: tuple[Decoder, Any, Tokenizer]) -> None:
    """With reduced copies on a CPU that has them, the first eight tokens stay those of fp32."""
    decoder, _, tokenizer = real
    if not can_pack(decoder):
        pytest.skip("this CPU has no bf16 kernels")
    request = Request(tokenizer.encode(PROMPTS[0]), Sampling(8))
    plain = next(Generator(decoder, None, tokenizer.stop_ids).run([request])).ids
    assert next(Generator(decoder, None, tokenizer.stop_ids, reduced=True).run([request])).ids == plain


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tiny_greedy_equals_transformers(tmp_path: Path, family: str) -> None:
    """Every family's answers are transformers', prompts of one token and of many in one batch."""
    decoder, theirs = tiny_pair(tmp_path, family)
    prompts = draw_rows(1, 9, 30, 2, seed=4)
    requests = [Request(p, Sampling(12), key=n) for n, p in enumerate(prompts)]
    found = ids(answers(decoder, requests, stop=()))
    assert found == {n: transformers_greedy(theirs, p, 12, ()) for n, p in enumerate(prompts)}


def mixed_requests(count: int = 5) -> list[Request]:
    """Prompts and limits of different lengths, every second one tuned."""
    prompts = draw_rows(*(3 + 5 * n for n in range(count)), seed=8)
    limits = (3, 17, 9, 1, 12)
    return [Request(p, Sampling(limits[n % 5]), SIDES[n % 2], n) for n, p in enumerate(prompts)]


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """PyTorch fills memory that nobody has written yet with nan."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_unwritten_memory_does_not_matter(tiny: tuple[Decoder, Any], adapter: Adapter, nan_filled: None) -> None:
    """Slots of different fill answer the same where fresh memory holds nan.

    A masked position of the cache used to bring in whatever lay there: 0 times nan is nan.
    """
    assert torch.empty(3).isnan().all()
    requests = mixed_requests()
    found = ids(answers(tiny[0], requests, adapter, 3, stop=()))
    for request in requests:
        logits = packed_logits(
            tiny[0], [[*request.prompt_ids, *found[request.key]]], adapter if request.side == "tuned" else None
        )
        assert found[request.key] == logits[len(request.prompt_ids) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_refilled_slots_answer_the_same(tiny: tuple[Decoder, Any], adapter: Adapter, slots: int) -> None:
    """Few slots, refilled as answers of different lengths end, give every answer that five slots give.

    A slot that went on while another was refilled used to book its last token twice.
    """
    requests = mixed_requests()
    assert ids(answers(tiny[0], requests, adapter, slots)) == ids(answers(tiny[0], requests, adapter, 5))


def test_long_prompts_are_prefilled_in_turns(
    tiny: tuple[Decoder, Any], adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not all prompts fit one prefill, the rest come in later ones and no answer changes."""
    requests = [replace(r, sampling=Sampling(6)) for r in mixed_requests()]
    expected = ids(answers(tiny[0], requests, adapter, 5))
    monkeypatch.setattr("deepdoctor.model.generate.PREFILL_TOKENS", 12)
    assert ids(answers(tiny[0], requests, adapter, 5)) == expected


def test_base_and_tuned_share_a_batch(tiny: tuple[Decoder, Any], adapter: Adapter) -> None:
    """Both sides of a prompt in one batch answer as each side alone, and the base side as without any adapter."""
    prompts = draw_rows(4, 11, 7, seed=2)
    both = [Request(p, Sampling(10), side, (n, side)) for n, p in enumerate(prompts) for side in SIDES]
    mixed = ids(answers(tiny[0], both, adapter))
    for side in SIDES:
        alone = [r for r in both if r.side == side]
        assert ids(answers(tiny[0], alone, adapter)) == {r.key: mixed[r.key] for r in alone}
    base = [r for r in both if r.side == "base"]
    assert ids(answers(tiny[0], base)) == {r.key: mixed[r.key] for r in base}
    assert any(mixed[n, "base"] != mixed[n, "tuned"] for n in range(3))


@pytest.mark.parametrize("settings", [{"targets": ("k_proj",)}, {"targets": ("q_proj", "v_proj", "down_proj")}])
def test_decoding_follows_the_decoder(tiny: tuple[Decoder, Any], settings: dict[str, Any]) -> None:
    """Each greedy token is the argmax of a whole pass over prompt and answer so far, adapters on some blocks only."""
    decoder = tiny[0]
    part = random_adapter(decoder, rslora=True, **settings).eval()
    prompt = draw_rows(6, seed=11)[0]
    found = answers(decoder, [Request(prompt, Sampling(8), "tuned", 0)], part, stop=())[0].ids
    logits = packed_logits(decoder, [prompt + found], part)
    assert found == logits[5:-1].argmax(-1).tolist()


def test_an_nf4_base_with_adapter(tmp_path: Path) -> None:
    """From a quantised base too, each token is the argmax of a whole pass."""
    tiny_pair(tmp_path, "llama", attention_bias=True)
    decoder = load_decoder(tmp_path, "nf4", compute_dtype=torch.float32)
    part = random_adapter(decoder).eval()
    prompt = draw_rows(6, seed=12)[0]
    found = answers(decoder, [Request(prompt, Sampling(8), "tuned", 0)], part, stop=())[0].ids
    assert found == packed_logits(decoder, [prompt + found], part)[5:-1].argmax(-1).tolist()


def test_stop_tokens_end_an_answer(tiny: tuple[Decoder, Any]) -> None:
    """The answer ends before the first stop token, which is not kept; cut_off tells an end at the limit."""
    decoder = tiny[0]
    request = Request(draw_rows(9, seed=4)[0], Sampling(12), key=0)
    free = answers(decoder, [request], stop=())[0]
    assert len(free.ids) == 12 and free.cut_off
    for place in (0, 4):
        stop = free.ids[place]
        until = free.ids[: free.ids.index(stop)]
        for stops in ((stop,), (stop, 639)):
            ended = answers(decoder, [request], stop=stops)[0]
            assert (ended.ids, ended.cut_off) == (until, False)
    exact = free.ids[11]
    if exact not in free.ids[:11]:
        short = Request(request.prompt_ids, Sampling(11), key=0)
        assert answers(decoder, [short], stop=(exact,))[0].cut_off


def test_one_new_token(tiny: tuple[Decoder, Any], adapter: Adapter) -> None:
    """max_new_tokens 1 gives the argmax after the prompt, cut off, for more requests than slots."""
    prompts = draw_rows(3, 8, 5, 1, seed=6)
    requests = [Request(p, Sampling(1), SIDES[n > 1], n) for n, p in enumerate(prompts)]
    found = answers(tiny[0], requests, adapter, slots=2, stop=())
    for n, prompt in enumerate(prompts):
        logits = packed_logits(tiny[0], [prompt], adapter if n > 1 else None)
        assert (found[n].ids, found[n].cut_off) == ([int(logits[-1].argmax())], True)


def test_positions_run_out(tmp_path: Path) -> None:
    """An answer stops, cut off, where the model has no more positions, and its tokens are those of a whole pass."""
    decoder, _ = tiny_pair(tmp_path, "llama", max_position_embeddings=16)
    prompt = draw_rows(10)[0]
    found = answers(decoder, [Request(prompt, Sampling(100), key=0)], stop=())[0]
    assert found.cut_off and len(found.ids) == 6
    assert found.ids == packed_logits(decoder, [prompt + found.ids])[9:-1].argmax(-1).tolist()
    full = Request(draw_rows(15)[0], Sampling(100), key=0)
    assert len(answers(decoder, [full], stop=())[0].ids) == 1


def test_penalty_equals_the_logits_processor(tiny: tuple[Decoder, Any]) -> None:
    """Drawn greedily from the penalised logits of prompt and answer, step by step; other requests are left alone."""
    from transformers import RepetitionPenaltyLogitsProcessor

    decoder = tiny[0]
    prompts = draw_rows(6, 12, seed=9)
    penalties = (1.8, 1.0)
    requests = [Request(p, Sampling(15, repetition_penalty=penalties[n]), key=n) for n, p in enumerate(prompts)]
    found = ids(answers(decoder, requests, stop=()))
    processor = RepetitionPenaltyLogitsProcessor(1.8)
    so_far = list(prompts[0])
    for token in found[0]:
        logits = packed_logits(decoder, [so_far])[-1:]
        assert token == int(processor(torch.tensor([so_far]), logits).argmax())
        so_far.append(token)
    assert found[1] == ids(answers(decoder, requests[1:], stop=()))[1]
    assert found[0] != ids(answers(decoder, [Request(prompts[0], Sampling(15), key=0)], stop=()))[0]


def test_a_refilled_slot_forgets_what_it_saw(tiny: tuple[Decoder, Any]) -> None:
    """The penalty of a later request does not count tokens of the answer that had its slot before."""
    prompts = draw_rows(20, 5, 9, 6, seed=13)
    limits = (2, 8, 5, 9)
    requests = [Request(p, Sampling(limits[n], repetition_penalty=2.0), key=n) for n, p in enumerate(prompts)]
    alone = {n: answers(tiny[0], [r], stop=())[n].ids for n, r in enumerate(requests)}
    for slots in (1, 2):
        assert ids(answers(tiny[0], requests, slots=slots, stop=())) == alone


def test_sampling_depends_on_the_seed_alone(tiny: tuple[Decoder, Any], adapter: Adapter) -> None:
    """The same request draws the same answer alone, in a batch and after a refill; another seed draws another."""
    prompts = draw_rows(5, 5, 12, 3, seed=5)
    requests = [Request(prompts[n % 4], Sampling(10, 1.0, 0.95, seed=100 + n), SIDES[n % 3 == 0], n) for n in range(6)]
    together = ids(answers(tiny[0], requests, adapter))
    assert ids(answers(tiny[0], requests, adapter, slots=2)) == together
    for request in requests[:2]:
        assert ids(answers(tiny[0], [request], adapter))[request.key] == together[request.key]
    seeds = [Request(prompts[0], Sampling(10, 1.0, seed=seed), key=seed) for seed in range(4)]
    assert len({tuple(found) for found in ids(answers(tiny[0], seeds)).values()}) == 4


def test_temperature_zero_is_greedy(tiny: tuple[Decoder, Any]) -> None:
    """Temperature 0 takes the largest logit whatever seed and top_p say, and so does a temperature near 0."""
    prompt = draw_rows(9, seed=4)[0]
    settings = [Sampling(10), Sampling(10, 0.0, 0.5, seed=3), Sampling(10, 1e-4, seed=5), Sampling(10, 5.0, 1e-6)]
    found = ids(answers(tiny[0], [Request(prompt, s, key=n) for n, s in enumerate(settings)], stop=()))
    assert found[0] == found[1] == found[2] == found[3]


def test_tokens_are_reported_in_order(tiny: tuple[Decoder, Any], adapter: Adapter) -> None:
    """on_token brings every token of every answer once, in its order, before the answer is yielded."""
    requests = mixed_requests()
    heard: dict[object, list[int]] = {}
    for completion in Generator(tiny[0], adapter, (STOP,), 2).run(
        requests, lambda request, token: heard.setdefault(request.key, []).append(token)
    ):
        assert heard.get(completion.request.key, []) == completion.ids
    assert set(heard) == {r.key for r in requests}


def test_nothing_to_answer(tiny: tuple[Decoder, Any]) -> None:
    """No request gives no completion."""
    assert list(Generator(tiny[0], None, (STOP,)).run([])) == []


def test_refused_requests(tiny: tuple[Decoder, Any], adapter: Adapter) -> None:
    """An empty prompt, one beyond the model's positions, and a tuned request without adapter name the request."""
    short = Sampling(4)
    faults = [
        (Request([], short, key="q1"), adapter, "request 'q1' has an empty prompt"),
        (
            Request([1] * 1024, short, key="q2"),
            adapter,
            "'q2' has a prompt of 1024 tokens; the model takes fewer than 1024",
        ),
        (Request([1], short, "tuned", "q3"), None, "'q3' asks the side 'tuned', known are: base"),
    ]
    ranges = {"top_p": 0.0, "top_k": -1, "min_p": 1.0, "temperature": -0.1, "max_new_tokens": 0, "stop": ("",)}
    for name, value in ranges.items():
        wrong = replace(short, **{name: value})
        faults.append((Request([1], wrong, key="q4"), adapter, f"'q4': {name} is .*, expected"))
    faults.append((Request([1], replace(short, stop=("x",)), key="q5"), adapter, "'q5' has a stop text"))
    for request, given, message in faults:
        with pytest.raises(UsageError, match=message):
            list(Generator(tiny[0], given, (STOP,)).run([Request([1], short, key="fine"), request]))


def free_answer(decoder: Decoder, new: int = 12) -> tuple[Request, list[int]]:
    """A prompt and what greedy decoding makes of it."""
    request = Request(draw_rows(9, seed=4)[0], Sampling(new), key=0)
    return request, answers(decoder, [request], stop=())[0].ids


def test_a_stop_text_may_cross_tokens(tiny: tuple[Decoder, Any]) -> None:
    """A text that begins inside one token and ends inside another ends the answer before it, and so at its start."""
    decoder = tiny[0]
    request, free = free_answer(decoder)
    text = spelled(free)
    for begin, end in ((7, 10), (0, 3), (2, 4), (5, 6)):
        stop = text[begin:end]
        at = text.index(stop)
        asked = replace(request, sampling=replace(request.sampling, stop=("never there", stop), logprobs=True))
        found = next(Generator(decoder, None, (), words=WORDS).run([asked]))
        assert (found.text, found.ids, found.cut_off) == (text[:at], free[: at // 2], False)
        assert len(found.logprobs) == len(found.ids)


def test_thinking_is_closed_at_its_limit(tiny: tuple[Decoder, Any]) -> None:
    """After max_thinking_tokens the closing tokens are written and the answer goes on; not where it was closed."""
    decoder = tiny[0]
    request, free = free_answer(decoder)
    asked = replace(request, sampling=replace(request.sampling, max_thinking_tokens=4))
    found = next(Generator(decoder, None, (), words=WORDS).run([asked]))
    assert found.ids[:6] == [*free[:4], 5, 6] and found.thinking_closed
    logits = packed_logits(decoder, [[*request.prompt_ids, *found.ids]])
    assert found.ids[6:] == logits[len(request.prompt_ids) + 5 : -1].argmax(-1).tolist()
    closed = replace(WORDS, close=spelled(free[2:3]))
    done = next(Generator(decoder, None, (), words=closed).run([asked]))
    assert done.ids == free and not done.thinking_closed


def test_cancelled_requests_leave_the_others_alone(tiny: tuple[Decoder, Any], adapter: Adapter) -> None:
    """One request is cancelled while it is answered, one while it waits; the other answers are what they were."""
    requests = [replace(r, sampling=Sampling(9)) for r in mixed_requests()]
    expected = ids(answers(tiny[0], requests, adapter, stop=()))
    check_cancelling(Generator(tiny[0], adapter, (), 2), requests, expected)


def test_log_probabilities_are_the_models_own(tiny: tuple[Decoder, Any], adapter: Adapter) -> None:
    """They are those of a whole pass, whatever temperature and penalty the tokens were drawn with."""
    prompts = draw_rows(6, 9, seed=3)
    settings = Sampling(7, 1.3, 0.9, 1.4, seed=2, logprobs=True)
    requests = [Request(p, settings, SIDES[n == 1], n) for n, p in enumerate(prompts)]
    for key, found in answers(tiny[0], requests, adapter, stop=()).items():
        whole = [*prompts[key], *found.ids]
        logits = packed_logits(tiny[0], [whole], adapter if key else None)[len(prompts[key]) - 1 : -1]
        wanted = logits.float().log_softmax(-1).gather(1, torch.tensor(found.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logprobs), wanted, rtol=1e-4, atol=1e-5)


def test_equal_prompts_run_once(tiny: tuple[Decoder, Any], adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of one prompt share its prefill, also with one still being answered; each side has its own."""
    one, other = draw_rows(8, 5, seed=7)
    prompts = [one, other, one, one, other, one]
    requests = [Request(p, Sampling(6, 1.0, seed=n), SIDES[n % 2], n) for n, p in enumerate(prompts)]
    alone = {n: answers(tiny[0], [r], adapter)[n].ids for n, r in enumerate(requests)}
    run = count_tokens(monkeypatch)
    assert ids(answers(tiny[0], requests, adapter, 6)) == alone
    assert run == [8 + 5 + 8 + 5]
    assert ids(answers(tiny[0], requests, adapter, 3)) == alone
