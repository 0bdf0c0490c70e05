"""Stage 3: base, adapter and unseen questions -> ``compare/``: every answer of both sides, statistics, the report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from deepdoctor.compare.answers import Item, answer_items, items_of_questions, items_of_rows
from deepdoctor.compare.extract import RULE_VERSION
from deepdoctor.compare.loss import compare_losses
from deepdoctor.compare.report import summarise_task, write_report
from deepdoctor.data.questions import load_questions
from deepdoctor.data.rows import Question
from deepdoctor.data.store import PreparedData
from deepdoctor.model.generate import Generator
from deepdoctor.recipe import CompareSection
from deepdoctor.run_folder import write_json
from deepdoctor.session import Session
from deepdoctor.train.held_out import held_out_losses

__all__ = ["compare_sides", "read_tasks"]

LOSS_TOKENS = 4096
"""Packed tokens at once when only losses are wanted; nothing is kept for a backward pass."""


def _items(session: Session, data: PreparedData) -> list[Item]:
    """Everything both sides are asked, in order: held-out rows, then each task."""
    section, seed = session.recipe.compare, session.recipe.seed
    rows = [row for row, _ in data.held_out][: section.held_out_questions]
    items = items_of_rows(rows)
    for questions in read_tasks(section, seed):
        items += items_of_questions(questions)
    return items


def read_tasks(section: CompareSection, seed: int) -> list[list[Question]]:
    """Read every task of the recipe. Raises DataError for questions that cannot be used."""
    return [load_questions(source, section.max_questions, seed) for source in section.tasks]


def _losses(session: Session, data: PreparedData) -> dict[str, Any]:
    """Held-out loss of both sides, or {} where it is switched off or nothing is held out."""
    rows = [encoded for _, encoded in data.held_out]
    if not rows or not session.recipe.compare.held_out_loss:
        return {}
    sides = []
    with session.reporter.meter("loss", 2 * len(rows), "rows") as meter:
        for adapter in (None, session.adapter):
            sides.append(held_out_losses(session.decoder, adapter, rows, LOSS_TOKENS, meter.advance))
    return compare_losses(*sides)


def _answers(session: Session, items: Sequence[Item], path: Any) -> list[dict[str, Any]]:
    """Ask both sides, writing each record as it is finished."""
    section = session.recipe.compare
    sampling = session.sampling(section, session.recipe.seed)
    generator = Generator(
        session.decoder, session.adapter, session.prompt.stop_ids, section.batch_size, session.reduced
    )
    with (
        path.open("w", encoding="utf-8") as sink,
        session.reporter.meter("compare", 2 * len(items), "answers") as meter,
    ):
        tokens, started = 0, time.perf_counter()

        def keep(record: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += record["new_tokens"]
            sink.write(json.dumps(record, ensure_ascii=False) + "\n")
            sink.flush()
            meter.advance(1, f"{tokens / (time.perf_counter() - started):,.0f} tok/s")

        return answer_items(items, generator, session.prompt, sampling, on_record=keep)


def compare_sides(session: Session, data: PreparedData) -> dict[str, Any]:
    """Fill ``compare/`` of the run and return what ``stats.json`` holds.

    Writes ``answers.jsonl`` (one record per question and side), ``stats.json``, ``report.html`` and ``report.md``.
    Where the recipe asks for no loss, no held-out question and no task, the report says that nothing was measured.
    """
    run, recipe = session.run, session.recipe
    assert run is not None
    if run.done("compare"):
        return json.loads((run.path / "compare" / "stats.json").read_text(encoding="utf-8"))
    items = _items(session, data)
    if not items and not (data.held_out and recipe.compare.held_out_loss):
        session.reporter.say(
            "compare: nothing to measure: no held-out rows and no tasks; `--data.held_out 0.05` or "
            "`--compare.tasks embedded:questions` would give something"
        )
    with run.stage("compare") as folder:
        losses = _losses(session, data)
        records = _answers(session, items, folder / "answers.jsonl") if items else []
        tasks = [
            summarise_task([record for record in records if record["task"] == task])
            for task in dict.fromkeys(item.task for item in items)
        ]
        sampling = session.sampling(recipe.compare, recipe.seed)
        result = {
            "schema": 1,
            "run": recipe.name,
            "model": {
                "id": recipe.model.id,
                "revision": recipe.model.revision,
                "precision": session.decoder.precision,
                "compute_dtype": str(session.decoder.compute_dtype).removeprefix("torch."),
                "parameters": session.decoder.config.parameters,
                "trainable_parameters": session.adapter.trainable_parameters,
            },
            "data": run.manifest["data"],
            "train": {**run.manifest["train"], **_curves(session)},
            "protocol": {
                "template": session.prompt.name,
                "max_new_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "repetition_penalty": sampling.repetition_penalty,
                "seed": recipe.seed,
                "extraction_rule": RULE_VERSION,
                "batch_size": recipe.compare.batch_size,
                "date": time.strftime("%Y-%m-%d"),
                "machine": run.manifest["machine"],
                "versions": run.manifest["versions"],
            },
            "loss": losses,
            "tasks": tasks,
            "answers": records,
            "timings": run.manifest["timings"],
            "limits": _limits(session, items),
        }
        write_report(folder, result)
        write_json(folder / "stats.json", {key: value for key, value in result.items() if key != "answers"})
    run.update(compare={"loss": losses, "tasks": tasks})
    return result


def _curves(session: Session) -> dict[str, Any]:
    """Loss per step and held-out loss, from ``metrics.jsonl``."""
    assert session.run is not None
    lines = (session.run.path / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return {
        "curve": [{key: step[key] for key in ("step", "loss", "learning_rate", "grad_norm")} for step in steps],
        "held_out_curve": [
            {"step": step["step"], "loss": step["held_out_loss"]} for step in steps if "held_out_loss" in step
        ],
    }


def _limits(session: Session, items: Sequence[Item]) -> list[str]:
    """Sentences on what this measurement cannot show, from what it was made of."""
    recipe = session.recipe
    limits = ["Research only, not clinical guidance."]
    embedded = [s for s in (recipe.data.source, *recipe.compare.tasks) if s.startswith("embedded:")]
    if embedded:
        limits.append(f"{' and '.join(embedded)}: written for DeepDoctor as an illustration, reviewed by no clinician.")
    if session.decoder.config.parameters < 1e9:
        limits.append("A model of this size gains form, not medical knowledge, from such training.")
    if not any(item.options for item in items):
        limits.append("No question has a key, so nothing here measures whether answers are right.")
    limits.append("Rows and questions were not searched for overlap.")
    return limits
