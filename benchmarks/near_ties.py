"""Where greedy answers leave transformers', and how near the two tokens were there.

    python benchmarks/near_ties.py [--base FOLDER] [--precision bf16] [--prompts 64] [--tokens 64] [--out FILE]

Both sides answer the same prompts greedily over the same weights, in the same precision and on the same device. In fp32
the tokens should be equal. In 16 bits two orders of the same sums differ in their last bits, so a token may differ
where two logits lie about a rounding apart, and nothing after it can be compared. At the first token that differs, one
pass in fp32 over what both had written until then gives the logits of both tokens. Their distance is counted in steps:
of one unit in the last place that ``--precision`` has at their size.

How far rounding moves logits is measured there, too: the errors of transformers' own logits in ``--precision`` against
fp32, as their standard deviation over the LIKELIEST tokens, all such places together. A difference of two logits is off
by sqrt(2) of it; a near tie is a distance of at most NEAR of that.

base: model folder, or embedded:smollm2-135m-instruct. Prompts are the questions of embedded:rows. Prints one line per
prompt that differs; writes them all with --out. 64 prompts of 64 tokens take 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepdoctor.data.prompt import Prompt
from deepdoctor.data.sources import load_rows
from deepdoctor.kernels.attention import attend_packed
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.generate import Generator, Request
from deepdoctor.model.load import choose_device, load_decoder, load_tokenizer, resolve_model
from deepdoctor.model.sampling import Sampling
from deepdoctor.recipe import DataSection

NEAR = 3.0
"""Standard deviations of a difference."""
LIKELIEST = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def step_at(value: float, dtype: torch.dtype) -> float:
    """Distance from one number of ``dtype`` to the next at this size."""
    return float(torch.finfo(dtype).eps) * 2.0 ** math.floor(math.log2(max(abs(value), 1e-30)))


def load_transformers(source: Path, dtype: torch.dtype, device: str) -> Any:
    """Their model of the same weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval().to(device)


def transformers_answers(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int, stop: Sequence[int]
) -> list[list[int]]:
    """The tokens transformers' own generate adds to each prompt alone, stop tokens left out."""
    device, found = model.device, []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([list(prompt)], device=device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=device),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(stop),
            pad_token_id=0,
        )
        added = out[0, len(prompt) :].tolist()
        found.append(added[:-1] if added[-1] in stop else added)
    return found


@torch.inference_mode()
def exact_logits(decoder: Decoder, ids: Sequence[int]) -> torch.Tensor:
    """Logits (V,) after these tokens, by one pass."""
    places = torch.arange(len(ids), device=decoder.device)
    heads = decoder.config.num_kv_heads
    hidden = decoder(
        torch.tensor(ids, device=decoder.device), places, lambda _, qkv: attend_packed(qkv, heads, [len(ids)])
    )
    return decoder.logits(hidden[-1:])[0].float()


def compared(
    exact: Decoder, model: Any, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int], end: int
) -> dict[str, Any]:
    """Where the two answers part, and how near the two tokens are there; end: stands for a token that ends one."""
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if ours == theirs:
        return {"tokens": len(ours), "differs_at": None}
    logits = exact_logits(exact, [*prompt, *ours[:at]])
    pair = [float(logits[answer[at] if at < len(answer) else end]) for answer in (ours, theirs)]
    step = step_at(max(pair, key=abs), model.dtype)
    with torch.inference_mode():
        given = torch.tensor([[*prompt, *ours[:at]]], device=model.device)
        error = model(given, logits_to_keep=1).logits[0, -1].float() - logits
    return {
        "tokens": len(ours),
        "differs_at": at,
        "ours": pair[0],
        "theirs": pair[1],
        "gap": abs(pair[0] - pair[1]),
        "step": step,
        "steps": abs(pair[0] - pair[1]) / step,
        "exact_takes": "ours" if pair[0] > pair[1] else "theirs",
        "error_steps": float(error[logits.topk(LIKELIEST).indices].std()) / step,
    }


def print_table(cases: Sequence[dict[str, Any]], what: str) -> None:
    """One line per answer that differs, then how many there are."""
    parted = [(number, case) for number, case in enumerate(cases, 1) if case["differs_at"] is not None]
    print("\n| prompt | first token that differs | in fp32: ours | theirs | step | apart, steps | fp32 takes |")
    print("|---|---|---|---|---|---|---|")
    for number, case in parted:
        place = f"{case['differs_at'] + 1} of {case['tokens']}"
        logits = f"{case['ours']:.3f} | {case['theirs']:.3f} | {case['step']:g} | {case['steps']:.2f}"
        print(f"| {number} | {place} | {logits} | {case['exact_takes']} |")
    print(f"\n{what}: {len(cases) - len(parted)} of {len(cases)} answers are equal to the end.")
    if parted:
        off = math.sqrt(statistics.fmean(2 * case["error_steps"] ** 2 for _, case in parted))
        near = sum(case["steps"] <= NEAR * off for _, case in parted)
        takes = sum(case["exact_takes"] == "ours" for _, case in parted)
        farthest = max(case["steps"] for _, case in parted)
        print(f"Rounding moves a difference of two logits by {off:.2f} steps: a near tie has {NEAR * off:.2f} at most.")
        print(f"{near} of {len(parted)} part at one, the farthest at {farthest:.2f}. fp32 takes our token in {takes}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    device, dtype = choose_device("auto"), DTYPES[arguments.precision]
    source = resolve_model(arguments.base)
    tokenizer = load_tokenizer(source)
    prompt = Prompt(tokenizer, "native", None, "reasoning_and_answer")
    rows = load_rows(DataSection(source="embedded:rows"))
    prompts = [prompt.prompt_ids(row.question) for row in rows[: arguments.prompts]]
    started = time.perf_counter()
    decoder = load_decoder(source, arguments.precision, device)
    requests = [Request(ids, Sampling(arguments.tokens), key=number) for number, ids in enumerate(prompts)]
    done = {c.request.key: c.ids for c in Generator(decoder, None, prompt.stop_ids).run(requests)}
    ours = [done[number] for number in range(len(prompts))]
    print(f"ours: {sum(map(len, ours))} tokens in {time.perf_counter() - started:.0f} s", flush=True)
    del decoder
    started = time.perf_counter()
    model = load_transformers(source, dtype, str(device))
    theirs = transformers_answers(model, prompts, arguments.tokens, prompt.stop_ids)
    print(f"transformers: {sum(map(len, theirs))} tokens in {time.perf_counter() - started:.0f} s", flush=True)
    exact = load_decoder(source, "fp32", device)
    end = prompt.stop_ids[0]
    cases = [compared(exact, model, *triple, end) for triple in zip(prompts, ours, theirs, strict=True)]
    print_table(cases, f"{arguments.precision} on {device.type}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
