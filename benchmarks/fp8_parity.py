"""Does fp8 train as well as bf16? Real weights, real rows: held-out loss of adapters that differ in precision alone.

    python benchmarks/fp8_parity.py [--base FOLDER] [--rows FILE] [--precisions bf16 fp8] [--seeds 1 2 3] [--out FILE]

Each precision trains one adapter per seed; a seed decides the adapter's start and the order of the rows, so that runs
of one seed see the same. Trained adapters answer from the base as it is held (bf16 for fp8 too), as they would after
training. The relative difference from the first precision, seed by seed, is held against GOAL; beside it stands how
far the seeds of that precision lie apart. The rate is high and the rows few, so that the loss falls in 40 steps.

base: model folder, or embedded:smollm2-135m-instruct. rows: JSONL with Question, Complex_CoT and Response, or
embedded:rows. About a minute on an H100. Writes benchmarks/results/fp8_parity_<gpu>_<date>.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench_common import device_name, write_results
from deepdoctor.data.stage import prepare_data
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.recipe import Recipe
from deepdoctor.run_folder import RunFolder
from deepdoctor.session import Session
from deepdoctor.train.held_out import held_out_losses, mean_loss
from deepdoctor.train.loop import train
from deepdoctor.train.stage import make_run_plan
from deepdoctor.ui import SilentReporter

GOAL = 0.005
"""Largest relative difference of the held-out loss that counts as the same."""
HELD_OUT_TOKENS = 8192
"""Tokens at once when losses are taken."""


def _recipe(arguments: argparse.Namespace, precision: str, runs: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": precision,
            "runs_dir": str(runs),
            "model": {"id": arguments.base, "precision": precision},
            "data": {
                "source": arguments.rows,
                "max_rows": arguments.max_rows,
                "held_out": arguments.held_out,
                "max_seq_len": arguments.max_seq_len,
            },
            "train": {
                "lora_rank": 16,
                "lora_alpha": 32,
                "global_batch_size": arguments.batch,
                "max_steps": arguments.steps,
                "warmup_steps": 4,
                "learning_rate": arguments.learning_rate,
                "schedule": "cosine",
                "save_steps": 0,
            },
            "compare": {"held_out_questions": 0},
            "export": {"merged": False},
        }
    )


def run_precision(arguments: argparse.Namespace, precision: str) -> list[dict[str, Any]]:
    """Train one adapter per seed and return what each ended with."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = _recipe(arguments, precision, Path(scratch))
        run = RunFolder.create(recipe, False)
        session = Session(recipe, run, SilentReporter())
        data = prepare_data(session)
        rows, held_out = ([encoded for _, encoded in side] for side in (data.train, data.held_out))
        decoder, section = session.decoder, recipe.train
        plan = make_run_plan(session, data)
        before = mean_loss(held_out_losses(decoder, None, held_out, HELD_OUT_TOKENS))
        cases = []
        for seed in arguments.seeds:
            lora = LoraSettings(section.lora_rank, section.lora_alpha, targets=tuple(section.target_modules))
            adapter = Adapter(decoder.config, lora, seed)
            started = time.perf_counter()
            result = train(
                decoder,
                adapter,
                rows,
                section,
                seed=seed,
                folder=run.path / f"seed-{seed}",
                token_budget=plan.token_budget,
                plan=plan,
            )
            seconds = time.perf_counter() - started
            cases.append(
                {
                    "precision": precision,
                    "seed": seed,
                    "held_out_loss": mean_loss(held_out_losses(decoder, adapter, held_out, HELD_OUT_TOKENS)),
                    "base_loss": before,
                    "train_loss": [line["loss"] for line in result.metrics],
                    "grad_norm": [line["grad_norm"] for line in result.metrics],
                    "tokens": result.progress.tokens,
                    "rows": [len(rows), len(held_out)],
                    "seconds": seconds,
                }
            )
            print(f"{precision} seed {seed}: {cases[-1]['held_out_loss']:.5f} (base {before:.5f}), {seconds:.1f} s")
    return cases


def compared(cases: list[dict[str, Any]], precisions: list[str]) -> list[dict[str, Any]]:
    """The relative differences of every precision from the first, over the seeds, and what the loss fell by."""
    losses = {(case["precision"], case["seed"]): case["held_out_loss"] for case in cases}
    seeds = sorted({case["seed"] for case in cases})
    first = [losses[precisions[0], seed] for seed in seeds]
    found = []
    for precision in precisions[1:]:
        apart = [losses[precision, seed] / other - 1 for seed, other in zip(seeds, first, strict=True)]
        found.append(
            {
                "precision": precision,
                "against": precisions[0],
                "mean": statistics.fmean(apart),
                "low": min(apart),
                "high": max(apart),
                "between_seeds": (max(first) - min(first)) / statistics.fmean(first),
                "fallen_by": statistics.fmean(cases[0]["base_loss"] - loss for loss in first),
                "goal": GOAL,
                "reached": max(map(abs, apart)) <= GOAL,
            }
        )
    return found


def main() -> None:
    """Run every precision and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--rows", default="embedded:rows")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], help="the first is the yardstick")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--held-out", type=int, default=32, help="rows that do not train")
    parser.add_argument("--max-rows", type=int, default=600)
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    cases: list[dict[str, Any]] = []
    for precision in arguments.precisions:
        cases += run_precision(arguments, precision)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    summary = compared(cases, arguments.precisions)
    for line in summary:
        print(
            f"{line['precision']} against {line['against']}: held-out loss {line['mean']:+.3%} "
            f"({line['low']:+.3%} to {line['high']:+.3%}; seeds of {line['against']} lie {line['between_seeds']:.3%} "
            f"apart, training lowered the loss by {line['fallen_by']:.3f}); goal {GOAL:.1%}: "
            f"{'reached' if line['reached'] else 'missed'}"
        )
    # Names only: a result tells nothing of the machine's folders.
    given = {name: value for name, value in vars(arguments).items() if name != "out"}
    given |= {name: Path(given[name]).name for name in ("base", "rows")}
    values = {"arguments": given, "summary": summary, "cases": cases}
    print(write_results("fp8_parity", device_name(), arguments.out, values))


if __name__ == "__main__":
    main()
