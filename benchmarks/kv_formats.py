"""What an 8-bit KV cache costs in exactness: logits along real rows, against the cache as computed.

    python benchmarks/kv_formats.py [--base FOLDER] [--precision auto] [--rows 48] [--tokens 192] [--out FILE]

Each row's prompt is prefilled; then the row's own reasoning and answer are given token by token through the paged
runner, so that every format sees the same tokens. Against the cache in the compute dtype stand, per token: the mean
Kullback-Leibler divergence of the next token's distribution (nats), the share of tokens whose likeliest next token is
the same, and the mean loss of the row's next token. precision: of the base; bf16 beside fp32 is a yardstick.

base: model folder, or embedded:smollm2-135m-instruct. rows: how many of embedded:rows, of those that have more than
``--tokens`` tokens after the prompt; the first so many are given. On one core: 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deepdoctor.data.prompt import Prompt as Template
from deepdoctor.data.sources import load_rows
from deepdoctor.model.block_pool import KVFormat
from deepdoctor.model.decoder import Decoder
from deepdoctor.model.load import choose_device, load_decoder, load_tokenizer, resolve_model
from deepdoctor.model.paged_runner import PagedRunner
from deepdoctor.model.runner import Prompt
from deepdoctor.recipe import DataSection

FORMATS: tuple[KVFormat, ...] = ("auto", "fp8", "int8")
SLOTS = 16


@torch.inference_mode()
def log_probabilities(
    decoder: Decoder, kv_format: KVFormat, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> Tensor:
    """Of every next token after each of a row's tokens: (tokens, rows, V) in fp32, on the host."""
    longest = max(map(len, prompts)) + len(rows[0]) + 1
    runner = PagedRunner(decoder, None, len(rows), longest, kv_format=kv_format)
    runner.add([Prompt(tuple(prompt)) for prompt in prompts])
    steps = zip(*rows, strict=True)
    return torch.stack([runner.decode(tokens).float().log_softmax(-1).cpu() for tokens in steps])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    device, source = choose_device("auto"), resolve_model(arguments.base)
    template = Template(load_tokenizer(source), "native", None, "reasoning_and_answer")
    encoded = [template.encode_row(row) for row in load_rows(DataSection(source="embedded:rows"))]
    long = [row for row in encoded if len(row.input_ids) - row.reasoning[0] > arguments.tokens][: arguments.rows]
    decoder = load_decoder(source, arguments.precision, device)
    sums = {kv_format: [0.0, 0.0, 0.0] for kv_format in FORMATS}
    count = 0
    for first in range(0, len(long), SLOTS):
        part = long[first : first + SLOTS]
        prompts = [row.input_ids[: row.reasoning[0]] for row in part]
        given = [row.input_ids[row.reasoning[0] :][: arguments.tokens] for row in part]
        following = torch.tensor([row.input_ids[row.reasoning[0] + 1 :][: arguments.tokens] for row in part]).T
        exact = log_probabilities(decoder, "auto", prompts, given)
        count += following.numel()
        for kv_format in FORMATS:
            found = exact if kv_format == "auto" else log_probabilities(decoder, kv_format, prompts, given)
            kl = (exact.exp() * (exact - found)).sum(-1).sum()
            same = (found.argmax(-1) == exact.argmax(-1)).sum()
            loss = -found.gather(-1, following[..., None]).sum()
            for number, value in enumerate((kl, same, loss)):
                sums[kv_format][number] += float(value)
        print(f"{count} tokens", flush=True)
    print(f"\n{arguments.base} as {decoder.precision}, computed in {decoder.compute_dtype} on {device.type},")
    print(f"{len(long)} rows, {count} tokens\n\n| cache | KL, nats | same likeliest token | loss, nats |")
    print("|---|---|---|---|")
    results = {}
    for kv_format, (kl, same, loss) in sums.items():
        results[kv_format] = {"kl": kl / count, "same_token": same / count, "loss": loss / count, "tokens": count}
        print(f"| {kv_format} | {kl / count:.2e} | {100 * same / count:.2f} % | {loss / count:.4f} |")
        assert math.isfinite(kl)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
