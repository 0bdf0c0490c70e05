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

from deepdoctor.data.pack import micro_batches, pack
from deepdoctor.data.prompt import EncodedRow
from deepdoctor.errors import TrainingError
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import Decoder, PackedAttention
from deepdoctor.recipe import TrainSection
from deepdoctor.train.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from deepdoctor.train.held_out import held_out_losses, mean_loss
from deepdoctor.train.optimizer import learning_rate_at, make_optimizer
from deepdoctor.train.order import step_rows, total_steps
from deepdoctor.train.plan import memory_in_use_mib

__all__ = ["Interrupted", "TrainResult", "train"]

log = logging.getLogger(__name__)

FP16_FIRST_SCALE = 1024.0
"""fp16 gradients of a mean loss fall below 6e-8, where fp16 ends; 1,024 lifts them and leaves 60x to the top."""


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
    micro-batch. fingerprint: hash of what decides the curve. row_names: for messages, e.g. "rows.jsonl:12".
    resume: go on from the newest checkpoint. on_step: called with each step's metrics and the number of steps.
    Raises TrainingError for a non-finite loss or gradient (naming step and rows), Interrupted after Ctrl-C.
    """
    hooks = _Hooks(on_step or (lambda metrics, steps: None), on_held_out or (lambda step, loss: None))
    steps = total_steps(len(rows), section.global_batch_size, section.max_steps, section.epochs)
    order = step_rows(len(rows), section.global_batch_size, steps, seed, section.shuffle)
    warmup = section.warmup_steps or math.ceil(section.warmup_ratio * steps)
    adapter.to(decoder.device).train()
    parameters = list(adapter.parameters())
    optimizer, optimizer_name = make_optimizer(
        parameters,
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
        progress = load_checkpoint(newest, adapter, optimizer, fingerprint)
        log.info("resumed from %s", newest)
    metrics_path = folder / "metrics.jsonl"
    metrics = _keep_metrics(metrics_path, progress.step)

    def save() -> Path:
        return save_checkpoint(
            checkpoints, adapter, optimizer, progress, fingerprint, base_model, section.keep_checkpoints
        )

    with metrics_path.open("a", encoding="utf-8") as sink, _stop_after_step() as stop:
        for step in range(progress.step, steps):
            started = time.perf_counter()
            rate = learning_rate_at(step, steps, section.learning_rate, section.schedule, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = [rows[i] for i in order[step]]
            loss, tokens, labels = _gradients(decoder, adapter, chosen, section, token_budget, progress)
            _refuse_non_finite("loss", loss, step, order[step], row_names)
            norm = _gradient_norm(parameters)
            _refuse_non_finite("gradient norm", norm, step, order[step], row_names)
            if section.max_grad_norm and norm > section.max_grad_norm:
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], section.max_grad_norm / norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
                "rows": len(chosen),
                "tokens": tokens,
                "label_tokens": labels,
                "tokens_per_s": tokens / seconds,
                "step_ms": seconds * 1000,
                "memory_mib": memory_in_use_mib(decoder.device),
                "updates_applied": progress.updates_applied,
                "loss_scale": progress.loss_scale,
            }
            if held_out and section.eval_steps and progress.step % section.eval_steps == 0 and progress.step < steps:
                line["held_out_loss"] = mean_loss(held_out_losses(decoder, adapter, held_out, token_budget))
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
    adapter.eval()
    return TrainResult(steps, progress, optimizer_name, metrics)


def _gradients(
    decoder: Decoder,
    adapter: Adapter,
    rows: Sequence[EncodedRow],
    section: TrainSection,
    token_budget: int,
    progress: Progress,
) -> tuple[float, int, int]:
    """Accumulate the step's gradient in the fp32 masters; return mean loss, tokens and label tokens.

    In fp16 an overflow halves the loss scale and computes the same step again, so no update is ever skipped.
    """
    labels = sum(sum(label != IGNORE_INDEX for label in row.labels[1:]) for row in rows)
    if not labels:
        return float("nan"), 0, 0
    groups = micro_batches([len(row.input_ids) for row in rows], token_budget, section.micro_batch_size)
    while True:
        total = torch.zeros((), dtype=torch.float64)
        for group in groups:
            batch = pack([rows[i] for i in group]).to(decoder.device)
            attend = PackedAttention(decoder.config.num_kv_heads, batch.row_lengths)
            hidden = decoder(batch.input_ids, batch.positions, attend, adapter.prepare(decoder))
            losses = linear_cross_entropy(hidden[batch.predict], decoder.head, batch.labels)
            loss = losses.sum() / labels
            (loss * progress.loss_scale).backward()
            total += losses.detach().double().sum().cpu() / labels
        if progress.loss_scale == 1.0 or not math.isfinite(float(total)):
            break
        gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / progress.loss_scale)
        if math.isfinite(_gradient_norm(list(adapter.parameters()))) or progress.loss_scale <= 1:
            break
        progress.loss_scale /= 2
        log.warning("fp16 overflow: loss scale lowered to %g, step computed again", progress.loss_scale)
        adapter.zero_grad(set_to_none=True)
    return float(total), sum(len(row.input_ids) for row in rows), labels


def _gradient_norm(parameters: Sequence[Tensor]) -> float:
    """Global L2 norm of all gradients, one synchronisation."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    return float(torch.linalg.vector_norm(torch.stack(norms)))


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
