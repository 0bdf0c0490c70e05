"""Our side of the training benchmark, through the code that `deepdoctor run` goes through.

Settings of a case (all optional): precision ("nf4", "bf16", ...), memory_mib (what PyTorch may allocate; a card has
CONTEXT_MIB more), micro_batch_tokens (token budget; null: the plan's choice), global_batch_size, max_seq_len,
learning_rate, skip.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["load_case", "recipe_values", "train_case"]

STARTED = float(os.environ.get("BENCH_STARTED", time.time()))
"""When the benchmark started this process, seconds since the epoch."""


def recipe_values(base: Path, rows: Path, settings: Mapping[str, Any], steps: int, runs_dir: Path) -> dict[str, Any]:
    """A recipe like recipes/tutorial.yaml on local rows and a local base, the rows in file order."""
    from deepdoctor.sizes import CONTEXT_MIB

    capped = settings.get("memory_mib")
    vram = f"{capped + CONTEXT_MIB:.0f}MiB" if capped else None
    return {
        "name": "bench",
        "runs_dir": str(runs_dir),
        "seed": 3407,
        "model": {"id": str(base), "precision": settings.get("precision", "nf4"), "vram": vram},
        "data": {
            "source": str(rows),
            "held_out": 0,
            "template": "tutorial",
            "max_seq_len": settings.get("max_seq_len", 2048),
            "train_on": "all",
            "duplicates": "keep",
            "missing_image": "keep",
        },
        "train": {
            "lora_rank": 16,
            "lora_alpha": 16,
            "global_batch_size": settings.get("global_batch_size", 8),
            "micro_batch_tokens": settings.get("micro_batch_tokens"),
            "max_steps": steps,
            "warmup_steps": 5,
            "learning_rate": settings.get("learning_rate", 2e-4),
            "schedule": "linear",
            "optimizer": "adamw_8bit",
            "attention": settings.get("attention", "auto"),
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "shuffle": False,
            "save_steps": 0,
        },
        "compare": {"held_out_loss": False, "held_out_questions": 0},
        "export": {"merged": False},
    }


def train_case(base: Path, rows: Path, tokenizer: Path, settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Train ``steps`` steps and return figures of each: tokens, seconds (between synchronised ends of steps), loss.

    base: model folder. rows: JSONL with Question, Complex_CoT, Response. tokenizer: folder, only looked at where base
    has no tokenizer of its own. Peaks are those of PyTorch's allocator, in GiB, 0 on a CPU.
    """
    started = time.perf_counter()
    import torch

    from deepdoctor.data.stage import prepare_data
    from deepdoctor.recipe import Recipe
    from deepdoctor.run_folder import RunFolder
    from deepdoctor.session import Session
    from deepdoctor.train.loop import train
    from deepdoctor.train.stage import make_run_plan
    from deepdoctor.ui import Reporter

    import_s = time.perf_counter() - started
    _with_tokenizer(base, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe.model_validate(recipe_values(base, rows, settings, steps, Path(scratch)))
        run = RunFolder.create(recipe, False)
        session = Session(recipe, run, Reporter())
        data = prepare_data(session)
        encoded = [row for _, row in data.train]
        started = time.perf_counter()
        decoder = session.decoder
        _synchronize()
        load_s = time.perf_counter() - started
        plan = make_run_plan(session, data)
        for line in plan.lines():
            print(f"plan: {line}", file=sys.stderr)
        clock = _Clock(settings.get("skip", 0))
        folder = run.path / "train"
        folder.mkdir()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        clock.begin()
        result = train(
            decoder,
            session.new_adapter(),
            encoded,
            recipe.train,
            seed=recipe.seed,
            folder=folder,
            token_budget=plan.token_budget,
            plan=plan,
            replan=lambda spare_mib: make_run_plan(session, data, spare_mib),
            on_step=clock.on_step,
        )
    # The loss comes from the loop's own record: it may hand a step over before its loss is known.
    return {
        "tokens": [line["tokens"] for line in result.metrics],
        "step_s": clock.seconds,
        "loss": [line["loss"] for line in result.metrics],
        "optimizer": result.optimizer,
        "import_s": import_s,
        "load_s": load_s,
        "to_first_step_s": clock.first_step_s,
        "predicted_peak_gib": (result.plan or plan).predicted_peak_mib / 1024,
        "token_budget": plan.token_budget,
        "longest_row": plan.longest_row,
        "rows": len(encoded),
        "plan": (result.plan or plan).to_json(),
        **clock.peaks(),
    }


def load_case(base: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load (and quantise) the base and return seconds and memory."""
    started = time.perf_counter()
    import torch

    from deepdoctor.model.load import choose_device, load_decoder

    import_s = time.perf_counter() - started
    device = choose_device("auto")
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the CUDA context is no part of the load
    before = _host_gib()
    started = time.perf_counter()
    decoder = load_decoder(base, settings.get("precision", "nf4"), device)
    _synchronize()
    return {
        "import_s": import_s,
        "load_s": time.perf_counter() - started,
        "weights_gib": decoder.nbytes / 2**30,
        "host_before_gib": before,
        **_Clock(0).peaks(),
    }


def _with_tokenizer(base: Path, tokenizer: Path) -> None:
    """Refuse a base that has none; the tokenizer is read from the base's folder."""
    if not (base / "tokenizer.json").exists():
        raise SystemExit(f"{base} has no tokenizer.json; copy the files of {tokenizer} there")


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _host_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class _Clock:
    """Seconds of every step; memory peaks of the whole run and after the skipped steps."""

    def __init__(self, skip: int):
        self.skip = skip
        self.seconds: list[float] = []
        self.peak_run = 0
        self.first_step_s = 0.0

    def begin(self) -> None:
        """Start the first step; it counts everything up to its end (optimizer, memory, compilation)."""
        _synchronize()
        self.last = time.perf_counter()

    def on_step(self, metrics: dict[str, Any], steps: int) -> None:
        """End a step."""
        import torch

        _synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        if len(self.seconds) == 1:
            self.first_step_s = time.time() - STARTED
        if len(self.seconds) == self.skip and torch.cuda.is_available():
            self.peak_run = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.last = now

    def peaks(self) -> dict[str, float]:
        """Peaks so far, GiB."""
        import torch

        cuda = torch.cuda.is_available()
        after = torch.cuda.max_memory_allocated() if cuda else 0
        return {
            "peak_gib": after / 2**30,
            "peak_run_gib": max(after, self.peak_run) / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
            "host_peak_gib": _host_gib(),
        }
