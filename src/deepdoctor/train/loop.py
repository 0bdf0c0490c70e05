"""The training loop, in full.

A step's rows are packed into micro-batches; the loss is the sum over label tokens divided by the label tokens of the
whole step, so how rows are cut into micro-batches (or, later, over ranks) does not change the curve.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.errors import TrainingError
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import Decoder
from deepdoctor.recipe import TrainSection
from deepdoctor.train.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from deepdoctor.train.gradients import Gradients, Prepared, Replan, make_gradients
from deepdoctor.train.held_out import mean_loss
from deepdoctor.train.optimizer import learning_rate_at, make_optimizer
from deepdoctor.train.order import step_rows, total_steps
from deepdoctor.train.plan import Plan, memory_in_use_mib

__all__ = ["Interrupted", "TrainResult", "train"]

log = logging.getLogger(__name__)

FP16_FIRST_SCALE = 1024.0
"""fp16 gradients of a mean loss fall below 6e-8, where fp16 ends; 1,024 lifts them and leaves 60x to the top."""


PROBED_STEPS = 2000
"""Steps among which the largest micro-batch is looked for."""


class Interrupted(Exception):
    """Training was stopped by the user; a checkpoint of the last whole step has been written."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"stopped after step {step}")
        self.step, self.checkpoint = step, checkpoint


@dataclass
class TrainResult:
    """What training did. metrics: one dict per step, as in ``metrics.jsonl``; its seconds are those of steps."""

    steps: int
    progress: Progress
    optimizer: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    plan: Plan | None = None
    """The plan that was trained by in the end, where the engine trained."""


@dataclass
class _Hooks:
    """Calls out of the loop, so that it prints nothing itself."""

    on_step: Callable[[dict[str, Any], int], None] = lambda metrics, steps: None
    on_held_out: Callable[[int, float], None] = lambda step, loss: None


def train(
    decoder: Decoder,
    adapter: Adapter,
    rows: Sequence[EncodedRow],
    section: TrainSection,
    *,
    seed: int,
    folder: Path,
    token_budget: int,
    plan: Plan | None = None,
    replan: Replan | None = None,
    fingerprint: str = "",
    base_model: str = "",
    held_out: Sequence[EncodedRow] = (),
    row_names: Sequence[str] = (),
    resume: bool = False,
    on_step: Callable[[dict[str, Any], int], None] | None = None,
    on_held_out: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train ``adapter`` in place.

    rows, held_out: encoded rows. folder: gets ``metrics.jsonl`` and ``checkpoints/``. token_budget: packed tokens of a
    micro-batch. plan: with an engine, trains by it; replan: what to do when memory runs out. fingerprint: hash of what
    decides the curve. row_names: for messages, e.g. "rows.jsonl:12".
    resume: go on from the newest checkpoint. on_step: called with each step's metrics and the number of steps.
    Raises TrainingError for a non-finite loss or gradient (naming step and rows), Interrupted after Ctrl-C.
    """
    hooks = _Hooks(on_step or (lambda metrics, steps: None), on_held_out or (lambda step, loss: None))
    steps = total_steps(len(rows), section.global_batch_size, section.max_steps, section.epochs)
    order = step_rows(len(rows), section.global_batch_size, steps, seed, section.shuffle)
    warmup = section.warmup_steps or math.ceil(section.warmup_ratio * steps)
    adapter.to(decoder.device).train()
    gradients = make_gradients(decoder, adapter, section, token_budget, plan, replan)
    optimizer, optimizer_name = make_optimizer(
        gradients.parameters,
        section.optimizer,
        section.learning_rate,
        section.weight_decay,
        (section.beta1, section.beta2),
        decoder.device,
    )
    progress = Progress(loss_scale=FP16_FIRST_SCALE if decoder.compute_dtype == torch.float16 else 1.0)
    checkpoints = folder / "checkpoints"
    torch.manual_seed(seed)
    newest = latest_checkpoint(checkpoints) if resume else None
    if newest is not None:
        progress = load_checkpoint(newest, adapter, optimizer, fingerprint, gradients.pieces)
        gradients.after_update()
        log.info("resumed from %s", newest)
    metrics_path = folder / "metrics.jsonl"
    metrics = _keep_metrics(metrics_path, progress.step)

    def save() -> Path:
        return save_checkpoint(
            checkpoints,
            adapter,
            optimizer,
            progress,
            fingerprint,
            base_model,
            section.keep_checkpoints,
            gradients.pieces,
        )

    def prepare(step: int) -> Prepared | None:
        return gradients.prepare([rows[i] for i in order[step]]) if step < steps else None

    gradients.probe([[rows[i] for i in step] for step in order[:PROBED_STEPS]])
    ready = prepare(progress.step)
    with metrics_path.open("a", encoding="utf-8") as sink, _stop_after_step() as stop:
        for step in range(progress.step, steps):
            started = time.perf_counter()
            rate = learning_rate_at(step, steps, section.learning_rate, section.schedule, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            assert ready is not None
            now = ready
            read = gradients.read(*_gradients(gradients, now, section, progress))
            if gradients.ahead:
                # Queued behind the gradient, so that the GPU never idles. A spoilt update stops the run below, and
                # is saved nowhere.
                _update(optimizer, gradients)
            ready = prepare(step + 1)  # while the GPU is at work
            loss, norm = read()
            _refuse_non_finite("loss", loss, step, order[step], row_names)
            _refuse_non_finite("gradient norm", norm, step, order[step], row_names)
            if not gradients.ahead:
                _update(optimizer, gradients)
            tokens, labels = now.tokens, now.labels
            seconds = time.perf_counter() - started
            progress.step += 1
            progress.updates_applied += 1
            progress.tokens += tokens
            progress.label_tokens += labels
            progress.seconds += seconds
            line = {
                "step": progress.step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "rows": len(now.rows),
                "tokens": tokens,
                "label_tokens": labels,
                "tokens_per_s": tokens / seconds,
                "step_ms": seconds * 1000,
                "memory_mib": memory_in_use_mib(decoder.device),
                "updates_applied": progress.updates_applied,
                "loss_scale": progress.loss_scale,
            }
            if held_out and section.eval_steps and progress.step % section.eval_steps == 0 and progress.step < steps:
                line["held_out_loss"] = mean_loss(gradients.held_out(held_out))
                hooks.on_held_out(progress.step, line["held_out_loss"])
            metrics.append(line)
            sink.write(json.dumps(line) + "\n")
            sink.flush()
            hooks.on_step(line, steps)
            if stop.is_set():
                raise Interrupted(progress.step, save())
            if section.save_steps and progress.step % section.save_steps == 0:
                save()
        save()
    gradients.close()
    adapter.eval()
    return TrainResult(steps, progress, optimizer_name, metrics, plan=gradients.plan)


def _gradients(
    gradients: Gradients, step: Prepared, section: TrainSection, progress: Progress
) -> tuple[Tensor | float, Tensor | float]:
    """Leave the step's gradient, clipped, in the fp32 masters; return mean loss and norm before clipping.

    In fp16 an overflow halves the loss scale and computes the same step again, so no update is ever skipped.
    """
    if not step.labels:
        return float("nan"), 0.0
    while True:
        loss = gradients.compute(step, progress.loss_scale)
        if progress.loss_scale == 1.0:
            return loss, gradients.clip(section.max_grad_norm)
        gradients.unscale(1 / progress.loss_scale)
        norm = gradients.clip(section.max_grad_norm)
        if math.isfinite(float(norm)) or not math.isfinite(float(loss)) or progress.loss_scale <= 1:
            return loss, norm
        progress.loss_scale /= 2
        log.warning("fp16 overflow: loss scale lowered to %g, step computed again", progress.loss_scale)
        gradients.zero()


def _update(optimizer: torch.optim.Optimizer, gradients: Gradients) -> None:
    optimizer.step()
    gradients.zero()
    gradients.after_update()


def _refuse_non_finite(what: str, value: float, step: int, rows: Sequence[int], names: Sequence[str]) -> None:
    """Stop before the update, so that no checkpoint ever holds weights it has spoilt."""
    if math.isfinite(value):
        return
    shown = ", ".join(names[i] if i < len(names) else str(i) for i in rows)
    raise TrainingError(
        f"the {what} of step {step + 1} is {value}; its rows: {shown}",
        "look at these rows, lower train.learning_rate, or use bf16 instead of fp16; the last checkpoint is whole",
    )


def _keep_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines up to ``step`` and drop the rest, which a killed run wrote after its last checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = []
    if step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if entry["step"] <= step:
                kept.append(entry)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    return kept


@contextmanager
def _stop_after_step() -> Any:
    """Turn the first Ctrl-C or SIGTERM into a flag that is read between steps; a second Ctrl-C acts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        log.warning("stopping after this step; press Ctrl-C again to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
