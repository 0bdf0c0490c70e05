"""What a decode step reads: speed of one stream and of many, and how far the next-token distribution moves from fp32.

    python benchmarks/bench_decode.py [--streams 1,16] [--tokens 40] [--rounds 3]

Formats: fp32 in plain layout; bf16 in oneDNN's layout; what ``model/cpu_weights.py`` takes for few rows and for many,
here for any count; what it takes by itself; int8 with one scale per row, which is not offered. The shift is the mean KL
divergence from fp32 over the same tokens of embedded rows, as many at once as there are streams, and the share of equal
most likely tokens. The formats take turns, so that a busy moment of the host does not decide; the best round counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

from deepdoctor.cpu import prepare_cpu

prepare_cpu(print)

import torch
from torch import Tensor

from deepdoctor.data.sources import load_rows
from deepdoctor.model import cpu_weights
from deepdoctor.model.cpu_weights import PackedWeight
from deepdoctor.model.decoder import DecoderLayer
from deepdoctor.model.embedded import embedded_model
from deepdoctor.model.fast_decode import DecodeStep
from deepdoctor.model.kv_cache import SlotCache
from deepdoctor.model.load import load_decoder, load_tokenizer
from deepdoctor.recipe import DataSection

Product = Callable[..., Tensor]
TEXT_TOKENS = 60


def int8_rows(weight: Tensor, bias: Tensor | None = None) -> Product:
    """ATen's int8 product with one scale per row of the weight."""
    scale = weight.abs().amax(1) / 127
    levels = (weight / scale[:, None]).round().to(torch.int8)
    rounded = scale.bfloat16()
    return lambda x, wide=False: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), levels, rounded).float()


def of_one(make: Callable[[Tensor, Tensor | None], Product]) -> Callable[[Tensor, Tensor | None], Product]:
    """Make one copy at once, and use it for any number of rows."""

    def made(weight: Tensor, bias: Tensor | None = None) -> Product:
        multiply = make(weight, bias)
        return lambda x, wide=False: multiply(x)

    return made


FORMATS: dict[str, Callable[[Tensor, Tensor | None], Product]] = {
    "bf16": of_one(lambda weight, bias: cpu_weights._blocked(weight, bias, torch.bfloat16, 1)),
    "few": of_one(cpu_weights._few_rows),
    "many": of_one(cpu_weights._many_rows),
    "taken": PackedWeight,
    "int8": int8_rows,
}


def step_of(name: str) -> DecodeStep:
    """A decode step that reads the weights in the named format."""
    decoder = load_decoder(embedded_model(), "fp32")
    if name not in FORMATS:
        return DecodeStep(decoder, None)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        for linear in layer.linears:
            assert linear.weight is not None
            linear.packed = FORMATS[name](linear.weight, linear.bias)
    decoder.packed_head = FORMATS[name](decoder.head, None)
    return DecodeStep(decoder, None, packed=True)


def log_probabilities(step: DecodeStep, ids: Tensor) -> Tensor:
    """Next-token log probabilities (n * T, V) along given tokens (n, T), one decode step at a time."""
    count, length = ids.shape
    cache = SlotCache(step.decoder, count, length, step.dtype)
    rows = []
    for at in range(length):
        places = torch.full((count,), at)
        rows.append(step(ids[:, at], places, cache.decode(places, at + 1, False)).float().log_softmax(-1))
    return torch.cat(rows)


def speed(step: DecodeStep, streams: int, tokens: int) -> float:
    """Tokens per second of all streams together at positions 100 and on."""
    cache = SlotCache(step.decoder, streams, 100 + tokens, step.dtype)
    ids = torch.full((streams,), 77)
    started = time.perf_counter()
    for at in range(100, 100 + tokens):
        places = torch.full((streams,), at)
        step(ids, places, cache.decode(places, at + 1, False))
    return streams * tokens / (time.perf_counter() - started)


def measure(
    steps: dict[str, DecodeStep], groups: Sequence[Tensor], streams: int, arguments: argparse.Namespace
) -> None:
    """Print one line per format; groups: tokens (streams, T) of texts to compare the distribution along."""
    best = dict.fromkeys(steps, 0.0)
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            best[name] = max(best[name], speed(step, streams, arguments.tokens))
    truth = torch.cat([log_probabilities(steps["fp32"], ids) for ids in groups])
    for name, step in steps.items():
        found = torch.cat([log_probabilities(step, ids) for ids in groups])
        shift = float((truth.exp() * (truth - found)).sum(-1).mean())
        equal = float((truth.argmax(-1) == found.argmax(-1)).float().mean())
        print(f"{streams:2} {name:<6} {best[name]:6.1f} tok/s   KL {shift:.1e}   same first choice {equal:.1%}")


def main() -> None:
    """Measure and print one line per format and number of streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    steps = {name: step_of(name) for name in ("fp32", *FORMATS)}
    tokenizer = load_tokenizer(embedded_model())
    rows = load_rows(DataSection(source="embedded:rows"))
    texts = (tokenizer.encode(f"{row.question}\n{row.answer}") for row in rows)
    ids = torch.tensor([text[:TEXT_TOKENS] for text in texts if len(text) >= TEXT_TOKENS])
    for streams in map(int, arguments.streams.split(",")):
        # At least three texts, as many at once as there are streams.
        groups = ids[: streams * -(-3 // streams)].split(streams)
        with torch.inference_mode():
            measure(steps, groups, streams, arguments)


if __name__ == "__main__":
    main()
