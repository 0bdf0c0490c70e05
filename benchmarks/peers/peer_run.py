"""What both peers share: the tutorial's text, rows in file order, the clock and the result line."""

from __future__ import annotations

import itertools
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

__all__ = ["LORA", "run", "texts", "training_arguments"]

TEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. "
    "Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a "
    "logical and accurate response.\n\n"
    "### Instruction:\n"
    "You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.\n"
    "Please answer the following medical question.\n\n"
    "### Question:\n{}\n\n### Response:\n<think>\n{}\n</think>\n{}"
)
"""The tutorial's format."""
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bias": "none",
}
STARTED = float(os.environ.get("BENCH_STARTED", time.time()))
"""When the benchmark started this process, seconds since the epoch."""


def texts(path: str, eos: str) -> list[dict[str, str]]:
    """Rows of a JSONL file in the tutorial's format."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    fields = ("Question", "Complex_CoT", "Response")
    return [{"text": TEXT.format(*(row[field].strip() for field in fields)) + eos} for row in rows]


def training_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SFTConfig that both peers get: those of the tutorial."""
    cuda = torch.cuda.is_available()
    return {
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": settings["accumulate"],
        "warmup_steps": 5,
        "max_steps": settings["steps"],
        "learning_rate": 2e-4,
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": 1,
        "optim": "adamw_8bit" if cuda else "adamw_torch",
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "seed": 3407,
        "output_dir": "trainer",
        "report_to": "none",
        "dataset_text_field": "text",
        "max_length": 2048,
        "packing": False,
        "save_strategy": "no",
    }


class _Clock(TrainerCallback):
    """Seconds and loss of every step; memory peaks of the whole run and after the skipped steps."""

    def __init__(self, skip: int):
        self.skip = skip
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_run = 0
        self.first_step_s = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        _synchronize()
        if state.global_step == self.skip and torch.cuda.is_available():
            self.peak_run = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self.begun)
        if len(self.seconds) == 1:
            self.first_step_s = time.time() - STARTED

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tokens(trainer: Any, steps: int, accumulate: int) -> list[int]:
    """Real tokens of every optimizer step, read from the trainer's own batches."""

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for _ in itertools.count():
            yield from trainer.get_train_dataloader()

    counts = []
    source = batches()
    for _ in range(steps):
        step = list(itertools.islice(source, accumulate))
        counts.append(
            sum(int((b["attention_mask"] if "attention_mask" in b else b["input_ids"] != -1).sum()) for b in step)
        )
    return counts


def run(trainer: Any, settings: dict[str, Any], import_s: float, load_s: float) -> None:
    """Train, rows in file order, and print the result line."""
    trainer._get_train_sampler = lambda rows=None: SequentialSampler(trainer.train_dataset if rows is None else rows)
    tokens = _tokens(trainer, settings["steps"], settings["accumulate"])
    clock = _Clock(settings["skip"])
    trainer.add_callback(clock)
    trainer.train()
    cuda = torch.cuda.is_available()
    result = {
        "tokens": tokens[: len(clock.seconds)],
        "step_s": clock.seconds,
        "loss": clock.losses,
        "import_s": import_s,
        "load_s": load_s,
        "to_first_step_s": clock.first_step_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "peak_run_gib": max(clock.peak_run, torch.cuda.max_memory_allocated()) / 2**30 if cuda else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print("RESULT", json.dumps(result), flush=True)
