"""Greedy answers of a real model against transformers' own, in fp32: every token."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from test_generate import transformers_greedy

from deepdoctor.data.prompt import Prompt
from deepdoctor.data.sources import load_rows
from deepdoctor.model.generate import Generator, Request
from deepdoctor.model.load import load_decoder, load_tokenizer
from deepdoctor.model.sampling import Sampling
from deepdoctor.recipe import DataSection

SLOW = (pytest.mark.slow, pytest.mark.timeout(7200))


@pytest.mark.parametrize(("prompts", "tokens"), [(8, 32), pytest.param(64, 128, marks=SLOW)])
def test_every_greedy_token_is_transformers(smollm2: Path, prompts: int, tokens: int) -> None:
    """Questions of the embedded rows, in both caches, with refills: every answer is generate's on its prompt alone."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(smollm2)
    template = Prompt(tokenizer, "native", None, "reasoning_and_answer")
    rows = load_rows(DataSection(source="embedded:rows"))
    asked = [template.prompt_ids(row.question) for row in rows[:prompts]]
    assert len(asked) == prompts
    requests = [Request(ids, Sampling(tokens), key=number) for number, ids in enumerate(asked)]
    decoder, stop = load_decoder(smollm2, "fp32"), template.stop_ids
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    expected = {n: transformers_greedy(theirs, ids, tokens, stop) for n, ids in enumerate(asked)}
    # Answers that end early would leave little to compare.
    assert sum(map(len, expected.values())) > 0.8 * prompts * tokens
    runners: tuple[Literal["slots", "paged"], ...] = ("slots", "paged")
    for runner in runners:
        made = Generator(decoder, None, stop, min(16, prompts // 2), runner=runner).run(requests)
        assert {c.request.key: c.ids for c in made} == expected, runner
