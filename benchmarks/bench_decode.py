"""What a decode step reads: speed of one stream, and how far the next-token distribution moves from fp32.

    python benchmarks/bench_decode.py [--tokens 40] [--rounds 3]

Formats: fp32 in plain layout; bf16 in oneDNN's layout; what ``model/cpu_weights.py`` takes by itself (4 bits where the
weight is such a grid already, else bf16); int8 with one scale per row, which is not offered. The shift is the mean KL
divergence from fp32 over the same tokens of three embedded rows, and the share of equal most likely tokens. The formats
take turns, so that a busy moment of the host does not decide; the best round counts.
"""

from __future__ import annotations

import argparse
import time

from deepdoctor.cpu import prepare_cpu

prepare_cpu(print)

import torch
from torch import Tensor

from deepdoctor.data.sources import load_rows
from deepdoctor.model import cpu_weights, fast_decode
from deepdoctor.model.cpu_weights import Multiply
from deepdoctor.model.embedded import embedded_model
from deepdoctor.model.fast_decode import DecodeStep
from deepdoctor.model.kv_cache import SlotCache
from deepdoctor.model.load import load_decoder, load_tokenizer
from deepdoctor.recipe import DataSection


def bf16_only(weight: Tensor, bias: Tensor | None = None) -> Multiply:
    """The packed product without the 4-bit grid."""
    grid, cpu_weights.four_bit_grid = cpu_weights.four_bit_grid, lambda weight: None
    try:
        return cpu_weights.packed_multiply(weight, bias)
    finally:
        cpu_weights.four_bit_grid = grid


def int8_rows(weight: Tensor, bias: Tensor | None = None) -> Multiply:
    """ATen's int8 product with one scale per row of the weight."""
    scale = weight.abs().amax(1) / 127
    levels = (weight / scale[:, None]).round().to(torch.int8)
    rounded = scale.bfloat16()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), levels, rounded).float()


def step_of(name: str) -> DecodeStep:
    """A decode step that reads the weights in the named format."""
    decoder = load_decoder(embedded_model(), "fp32")
    multiply = {"bf16": bf16_only, "taken": cpu_weights.packed_multiply, "int8": int8_rows}.get(name)
    if multiply is None:
        return DecodeStep(decoder, None)
    usual, fast_decode.packed_multiply = fast_decode.packed_multiply, multiply
    try:
        return DecodeStep(decoder, None, packed=True)
    finally:
        fast_decode.packed_multiply = usual


def log_probabilities(step: DecodeStep, ids: list[int]) -> Tensor:
    """Next-token log probabilities (T, V) along given tokens, one decode step at a time."""
    cache = SlotCache(step.decoder, 1, len(ids), step.dtype)
    rows = []
    for at, token in enumerate(ids):
        place = torch.tensor([at])
        rows.append(step(torch.tensor([token]), place, cache.decode(place, at + 1, False)))
    return torch.cat(rows).log_softmax(-1)


def speed(step: DecodeStep, tokens: int) -> float:
    """Tokens per second of one stream at positions 100 and on."""
    cache = SlotCache(step.decoder, 1, 100 + tokens, step.dtype)
    started = time.perf_counter()
    for at in range(100, 100 + tokens):
        place = torch.tensor([at])
        step(torch.tensor([77]), place, cache.decode(place, at + 1, False))
    return tokens / (time.perf_counter() - started)


def main() -> None:
    """Measure and print one line per format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    steps = {name: step_of(name) for name in ("fp32", "bf16", "taken", "int8")}
    tokenizer = load_tokenizer(embedded_model())
    rows = load_rows(DataSection(source="embedded:rows"))[:3]
    texts = [tokenizer.encode(f"{row.question}\n{row.answer}")[:100] for row in rows]
    with torch.inference_mode():
        truth = [log_probabilities(steps["fp32"], ids) for ids in texts]
        best = dict.fromkeys(steps, 0.0)
        for _ in range(arguments.rounds):
            for name, step in steps.items():
                best[name] = max(best[name], speed(step, arguments.tokens))
        for name, step in steps.items():
            found = [log_probabilities(step, ids) for ids in texts]
            pairs = list(zip(truth, found, strict=True))
            shift = sum(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in pairs) / len(pairs)
            equal = sum(float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in pairs) / len(pairs)
            print(f"{name:<6} {best[name]:6.1f} tok/s   KL {shift:.1e}   same first choice {equal:.1%}")


if __name__ == "__main__":
    main()
