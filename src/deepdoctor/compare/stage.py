"""Stage 3: base, adapter and unseen questions -> ``compare/``: every answer of every side, statistics, the report."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepdoctor.compare.answers import Item, answer_items, items_of_questions, items_of_rows
from deepdoctor.compare.energy import gpu_energy_j
from deepdoctor.compare.engine import MakeGenerator, answering
from deepdoctor.compare.extract import LAX_RULE_VERSION, RULE_VERSION
from deepdoctor.compare.journal import AnswerJournal
from deepdoctor.compare.looks import POOLED, hold_to_looks
from deepdoctor.compare.loss import compare_losses
from deepdoctor.compare.placebo import NATIVE, adjust_arms, arm_losses, native_prompt, summarise_arms
from deepdoctor.compare.pooled import Part, pool_tasks
from deepdoctor.compare.positions import fixed_order
from deepdoctor.compare.report import adjust_tasks, summarise_task, write_report
from deepdoctor.compare.stats import harm_check, paired_difference
from deepdoctor.compare.tasks.load import known_task
from deepdoctor.compare.votes import cast_votes
from deepdoctor.data.overlap import OverlapReport, find_overlap
from deepdoctor.data.overlap_embedding import token_embedding
from deepdoctor.data.prompt import THINK_CLOSE, Prompt
from deepdoctor.data.store import PreparedData
from deepdoctor.model.adapter import ADAPTER_FILE, Adapter
from deepdoctor.recipe import SamplingSection
from deepdoctor.run_folder import write_json
from deepdoctor.session import Session
from deepdoctor.train.held_out import RowLoss, held_out_losses
from deepdoctor.train.placebo import load_placebos, placebo_name, shuffles_of

__all__ = ["compare_sides"]

SIDES = ("base", "tuned")
LOSS_TOKENS = 4096
"""Packed tokens at once when only losses are wanted; nothing is kept for a backward pass."""
SHOWN_PAIRS = 50
"""Questions that look like a training row, handed to the page with both texts; overlap.json has all."""


@dataclass(frozen=True)
class _Asked:
    """Who answers. adapters: tuned and the trained placebo arms by side. native: prompt of the arm NATIVE, or None."""

    adapters: dict[str, Adapter]
    native: Prompt | None

    @property
    def batch(self) -> tuple[str, ...]:
        """Sides that are asked with the recipe's prompt, in one batch."""
        return ("base", *self.adapters)

    @property
    def arms(self) -> tuple[str, ...]:
        """The placebo arms."""
        return ((NATIVE,) if self.native else ()) + tuple(side for side in self.adapters if side not in SIDES)

    @property
    def sides(self) -> tuple[str, ...]:
        """All of them, in the order of answers.jsonl."""
        return (*SIDES, *self.arms)


def _asked(session: Session) -> _Asked:
    """Load what the recipe's sides need; say where an arm is left out."""
    native = native_prompt(session)
    if NATIVE in session.recipe.compare.placebo and native is None:
        session.reporter.say(
            f"compare: {NATIVE} is left out: the recipe asks in the model's own chat format ({session.prompt.name}) "
            "already, so base is that arm"
        )
    return _Asked({"tuned": session.adapter, **load_placebos(session)}, native)


def _items(session: Session, data: PreparedData) -> list[Item]:
    """Everything both sides are asked, in order: held-out rows, then each task; samples of a question together."""
    section = session.recipe.compare
    rows = [row for row, _ in data.held_out][: section.held_out_questions]
    items = items_of_rows(rows, samples=section.samples)
    for questions in session.tasks:
        items += items_of_questions(
            questions, section.samples, session.recipe.seed if section.shuffle_options else None
        )
    return items


def _overlap(session: Session, data: PreparedData) -> OverlapReport | None:
    """Search the training rows for the questions, and say what was found."""
    questions = [question for task in session.tasks for question in task]
    if not questions:
        return None
    embedding = None
    if session.recipe.data.overlap_embedding:
        embedding = token_embedding(session.tokenizer.encode, session.decoder.embedding, len(data.train))
    report = find_overlap([row for row, _ in data.train], questions, embedding)
    suspects = len(report.suspects())
    if suspects:
        session.reporter.say(f"compare: {suspects} of {len(questions)} questions look like a training row")
    return report


def _harm_margin(task: str) -> float | None:
    """The margin of a known set that is only used to look for harm, else None; files go by their usual name."""
    known = known_task(task)
    return known.harm_margin if known else None


def _parts(session: Session, records: Sequence[dict[str, Any]], sides: Sequence[str] = SIDES) -> list[Part]:
    """Per task with a key: which questions two sides got right, by the majority of samples."""
    right = {(r["task"], r["id"], r["side"]): r["letter"] == r["key"] for r in cast_votes(records)}
    parts = []
    for questions in session.tasks:
        name = questions[0].task
        base, tuned = ([right[name, question.id, side] for question in questions] for side in sides)
        parts.append(Part(name, questions, base, tuned))
    return parts


def _summaries(
    items: Sequence[Item],
    records: Sequence[dict[str, Any]],
    overlap: OverlapReport | None,
    parts: Sequence[Part],
    margin: float | None,
    arms: Sequence[str] = (),
) -> list[Any]:
    """The statistics of each task; also without the questions that look like a row, and against the placebo arms.

    P values of several tasks are adjusted; a harm check keeps its own, and says whether a loss beyond the margin is
    ruled out.
    """
    by_name = {part.name: part for part in parts}
    suspects = overlap.suspects() if overlap is not None else set()
    summaries = []
    for task in dict.fromkeys(item.task for item in items):
        of_all = [record for record in records if record["task"] == task]
        of_task = [record for record in of_all if record["side"] in SIDES]
        clean = [record for record in of_task if (task, record["id"]) not in suspects]
        summary = summarise_task(of_task)
        if clean and len(clean) < len(of_task):
            summary["without_suspects"] = summarise_task(clean)
        own_margin = _harm_margin(task)
        if task in by_name and own_margin is not None:
            part = by_name[task]
            difference = paired_difference(part.base, part.tuned, part.groups)
            summary["harm"] = asdict(harm_check(difference, own_margin if margin is None else margin))
        if arms:
            summary["placebo"] = summarise_arms(of_all, arms)
        summaries.append(summary)
    together = [s for s in summaries if "accuracy" in s and "harm" not in s]
    adjust_tasks([s["accuracy"] for s in together])
    adjust_arms(together, arms)
    return summaries


def _placebo(
    session: Session, records: Sequence[dict[str, Any]], losses: dict[str, list[RowLoss]], asked: _Asked
) -> dict[str, Any]:
    """What is said of the placebo arms as a whole; {} where the recipe has none."""
    assert session.run is not None
    wanted = session.recipe.compare.placebo
    if not wanted:
        return {}
    pooled = {}
    for arm in asked.arms:
        pools = {
            name: pool_tasks([part for part in _parts(session, records, sides) if _harm_margin(part.name) is None])
            for name, sides in (("over_placebo", (arm, "tuned")), ("placebo_gain", ("base", arm)))
        }
        if pools["over_placebo"]:
            pooled[arm] = pools
    return {
        "arms": list(asked.arms),
        "left_out": [arm for arm in wanted if arm not in asked.arms],
        "loss": arm_losses(losses, asked.arms),
        "pooled": pooled,
        "train": {kind: session.run.manifest.get(placebo_name(kind)) for kind in shuffles_of(session)},
    }


def _losses(session: Session, data: PreparedData, asked: _Asked) -> dict[str, list[RowLoss]]:
    """Held-out loss of base and every adapter; {} where it is switched off or nothing is held out."""
    rows = [encoded for _, encoded in data.held_out]
    if not rows or not session.recipe.compare.held_out_loss:
        return {}
    sides: dict[str, Adapter | None] = {"base": None, **asked.adapters}
    with session.reporter.meter("loss", len(sides) * len(rows), "rows") as meter:
        return {
            side: held_out_losses(session.decoder, adapter, rows, LOSS_TOKENS, meter.advance)
            for side, adapter in sides.items()
        }


def _protocol(session: Session, items: Sequence[Item], asked: _Asked) -> str:
    """A text that differs wherever answers could: weights, adapters, prompts, settings, questions."""
    assert session.run is not None
    recipe = session.recipe
    files = {side: folder / ADAPTER_FILE for side, folder in _folders(session).items()}
    prompts = [session.prompt, *([asked.native] if asked.native else [])]
    texts = json.dumps([(i.task, i.id, i.sample, [prompt.text(i.question) for prompt in prompts]) for i in items])
    parts = {
        "model": recipe.model.model_dump(mode="json"),
        "held_as": [session.decoder.precision, str(session.decoder.compute_dtype)],
        "adapters": {side: hashlib.sha256(path.read_bytes()).hexdigest() for side, path in files.items()},
        "rule": [RULE_VERSION, LAX_RULE_VERSION],
        "settings": recipe.compare.model_dump(mode="json"),
        "seed": recipe.seed,
        "asked": hashlib.sha256(texts.encode()).hexdigest(),
    }
    return json.dumps(parts, sort_keys=True)


def _looked_at(session: Session, items: Sequence[Item]) -> dict[str, str]:
    """Per task with a key and for POOLED, a hash that differs wherever base's or tuned's letters could."""
    recipe = session.recipe
    drawn = recipe.compare.model_dump(mode="json", include={*SamplingSection.model_fields, "samples"} - {"batch_size"})
    if drawn["kv_cache"] == "auto":
        del drawn["kv_cache"]  # looks from before there was a choice stay known
    common = [recipe.model.id, recipe.model.revision, session.decoder.precision, RULE_VERSION, recipe.seed, drawn]
    texts: dict[str, list[Any]] = {}
    for item in (item for item in items if item.options):
        texts.setdefault(item.task, []).append([item.id, item.sample, session.prompt.text(item.question)])
    hashes = {task: hashlib.sha256(json.dumps([common, of]).encode()).hexdigest() for task, of in texts.items()}
    return hashes | {POOLED: hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()}


def _folders(session: Session) -> dict[str, Path]:
    """The PEFT folder of every side that has an adapter."""
    assert session.run is not None
    names: dict[str, str] = {"tuned": "train", **{kind: placebo_name(kind) for kind in shuffles_of(session)}}
    return {side: session.run.path / name / "adapter" for side, name in names.items()}


def _answers(
    session: Session, items: Sequence[Item], folder: Path, asked: _Asked
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Ask every side what no interrupted comparison has asked yet; write ``answers.jsonl`` in the order of items.

    Returns the records and what the asking took: asking_seconds, where nothing was asked before; answer_tokens_per_s;
    energy_wh, where the GPU counts it.
    """
    assert session.run is not None
    journal = AnswerJournal(session.run.path / ".compare.answers.jsonl", _protocol(session, items, asked))
    found = len(journal.records)
    if found:
        session.reporter.say(f"compare: going on after {found} answers of an interrupted comparison")
    done, tokens = False, 0
    energy, started = gpu_energy_j(session.decoder.device), time.perf_counter()
    try:
        with session.reporter.meter("compare", len(asked.sides) * len(items), "answers") as meter:
            meter.advance(found)

            def keep(record: dict[str, Any]) -> None:
                nonlocal tokens
                tokens += record["new_tokens"]
                if journal.add(record):
                    meter.advance(1, f"{tokens / (time.perf_counter() - started):,.0f} tok/s")

            with answering(session, _folders(session)) as make:
                left = journal.left(items, asked.batch)
                _ask(session, make, left, session.prompt, asked.adapters, asked.batch, keep)
                if asked.native:
                    # Other ids from the first on and other stop tokens, so nothing could be shared with the batch.
                    left = journal.left(items, (NATIVE,))
                    native = lambda record: keep({**record, "side": NATIVE})  # noqa: E731
                    _ask(session, make, left, asked.native, {}, ("base",), native)
        records = list(journal.in_order(items, asked.sides))
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
        done = True
    finally:
        journal.close(done)
    seconds, after = time.perf_counter() - started, gpu_energy_j(session.decoder.device)
    cost = {"answer_tokens_per_s": round(tokens / seconds, 1)}
    if not found:
        cost["asking_seconds"] = round(seconds, 3)
        if energy is not None and after is not None:
            cost["energy_wh"] = round((after - energy) / 3600, 2)
    return records, cost


def _ask(
    session: Session,
    make: MakeGenerator,
    items: Sequence[Item],
    prompt: Prompt,
    adapters: dict[str, Adapter],
    sides: Sequence[str],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Put the items to the sides in one batch; keep: called with each record."""
    sampling = session.sampling(session.recipe.compare, session.recipe.seed)
    words = session.words
    if prompt is not session.prompt:
        closing = tuple(session.tokenizer.encode(f"\n{THINK_CLOSE}{prompt.gap}"))
        words = replace(words, closing_ids=closing, opened=prompt.opens_think)
    answer_items(items, make(prompt, adapters, words), prompt, sampling, sides, on_record=keep)


def compare_sides(session: Session, data: PreparedData) -> dict[str, Any]:
    """Fill ``compare/`` of the run and return what ``stats.json`` holds.

    Writes ``answers.jsonl`` (one record per question, side and sample), ``overlap.json`` (which questions look like a
    training row), ``stats.json``, ``report.html`` and ``report.md``.
    The manifest's ``looks`` keeps what each comparison found (``looks``).
    Where the recipe asks for no loss, no held-out question and no task, the report says that nothing was measured.
    """
    run, recipe = session.run, session.recipe
    assert run is not None
    if run.done("compare"):
        return json.loads((run.path / "compare" / "stats.json").read_text(encoding="utf-8"))
    items = _items(session, data)
    overlap = _overlap(session, data)
    if not items and not (data.held_out and recipe.compare.held_out_loss):
        session.reporter.say(
            "compare: nothing to measure: no held-out rows and no tasks; `--data.held_out 0.05` or "
            "`--compare.tasks embedded:questions` would give something"
        )
    asked = _asked(session)
    started = time.perf_counter()
    with run.stage("compare") as folder:
        by_side = _losses(session, data, asked)
        losses = compare_losses(by_side["base"], by_side["tuned"]) if by_side else {}
        records, cost = _answers(session, items, folder, asked) if items else ([], {})
        parts = _parts(session, records)
        tasks = _summaries(items, records, overlap, parts, recipe.compare.harm_margin, asked.arms)
        pooled = pool_tasks([part for part in parts if _harm_margin(part.name) is None])
        tuned = hashlib.sha256((_folders(session)["tuned"] / ADAPTER_FILE).read_bytes()).hexdigest()
        looks, looked = hold_to_looks(tasks, pooled, run.manifest.get("looks", ()), tuned, _looked_at(session, items))
        sampling = session.sampling(recipe.compare, recipe.seed)
        result = {
            "schema": 1,
            "run": recipe.name,
            "commands": [_again(session)],
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
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "repetition_penalty": sampling.repetition_penalty,
                "max_thinking_tokens": sampling.max_thinking_tokens,
                "kv_cache": recipe.compare.kv_cache,
                "samples": recipe.compare.samples,
                "shuffle_options": recipe.compare.shuffle_options,
                "seed": recipe.seed,
                "tasks": session.task_sources,
                "extraction_rule": RULE_VERSION,
                "lax_rule": LAX_RULE_VERSION,
                "batch_size": recipe.compare.batch_size,
                "date": time.strftime("%Y-%m-%d"),
                "machine": run.manifest["machine"],
                "versions": run.manifest["versions"],
            },
            "loss": losses,
            "tasks": tasks,
            "pooled": pooled,
            "placebo": _placebo(session, records, by_side, asked),
            "answers": records,
            "timings": run.manifest["timings"] | {"compare": round(time.perf_counter() - started, 3)},
            "cost": cost,
            "limits": [*_limits(session, items, overlap), *looked],
        }
        if overlap is not None:
            found = overlap.to_json()
            write_json(folder / "overlap.json", found)
            result["overlap"] = {key: found[key] for key in ("version", "rows", "questions", "suspects", "totals")}
        write_report(folder, result | ({"overlap": _shown(overlap)} if overlap is not None else {}))
        write_json(folder / "stats.json", {key: value for key, value in result.items() if key != "answers"})
        run.update(looks=looks)
    run.update(compare={"loss": losses, "tasks": tasks, "pooled": result["pooled"]})
    return result


def _again(session: Session) -> str:
    """The command that repeats the run from its folder, with known question sets at the commits that were used."""
    recipe, where = session.recipe, session.task_sources
    words = ["deepdoctor", "run", "recipe.yaml", "--name", shlex.quote(recipe.name + "-again")]
    if any(of.get("hub") and of["revision"] for of in where.values()):
        pairs = zip(recipe.compare.tasks, where.items(), strict=True)
        pinned = [f"{name}@{of['revision']}" if of.get("hub") and of["revision"] else s for s, (name, of) in pairs]
        words += ["--compare.tasks", *map(shlex.quote, pinned)]
    return " ".join(words)


def _shown(overlap: OverlapReport) -> dict[str, Any]:
    """What the page shows of the search: overlap.json without a verdict per question, and with SHOWN_PAIRS pairs."""
    found = overlap.to_json()
    near = [pair for pair in found["near"] if pair["suspect"]]
    counts = {key: found[key] for key in ("version", "rows", "questions", "suspects", "totals", "blind")}
    return counts | {"near": near[:SHOWN_PAIRS], "near_total": len(near)}


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


def _limits(session: Session, items: Sequence[Item], overlap: OverlapReport | None) -> list[str]:
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
    if recipe.compare.shuffle_options:
        kept = {(item.task, item.id) for item in items if item.options and fixed_order(item.options)}
        if kept:
            limits.append(
                f"{len(kept)} question(s) kept the order of their options, one of which speaks of others by place or "
                'letter ("all of the above").'
            )
    limits += [trap for questions in session.tasks if (known := known_task(questions[0].task)) for trap in known.traps]
    if overlap is not None:
        found = overlap.to_json()
        limits.append(
            f"{found['suspects']} of {found['questions']} questions look like one of the {found['rows']} training rows "
            "(overlap.json names them); a full paraphrase would not be seen."
        )
    return limits
