"""From stored answers to numbers, and from numbers to a page: ``report.html`` and ``report.md``.

Everything reported is computed from the answer records, so anybody with ``answers.jsonl`` gets the same figures.

An answer record, one per question and side::

    task, id, side ("base" | "tuned"), question, text, thinking, answer    texts; thinking None where there is no block
    prompt_tokens, new_tokens, thinking_tokens, answer_tokens              counts, None where not known
    cut_off, well_formed, looping                                          bools, None where not known
    options, key, letter, correct       of questions with a key: letter -> text, letter, letter read or None, bool
    group                               name shared by copies of one question, or None

The result (``schema`` 1; ``stats.json`` is this without ``answers``)::

    run, command        name of the run; command that repeats it (optional)
    model, data, train, protocol, timings     plain values, shown as they are
    train.curve         [{step, loss, learning_rate, grad_norm}]      train.held_out_curve   [{step, loss}]
    loss                {"reasoning" | "answer" | "all": {base, tuned, difference, ci_low, ci_high, n_rows, n_tokens,
                        base_perplexity, tuned_perplexity, verdict}}, nats per token, tuned minus base
    tasks               [as summarise_task returns; of several tasks accuracy may hold p_holm, of a harm check harm]
    pooled              PairedDifference over several tasks' questions, with verdict, tasks, heterogeneity (optional)
    repeat_note         sentence under the command (optional)
    answers             [records]
    limits              sentences
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deepdoctor.compare.stats import (
    holm,
    minimum_detectable_difference,
    paired_difference,
    paired_mean,
    proportion_interval,
    verdict,
)
from deepdoctor.errors import DataError, RunError
from deepdoctor.pages import template_environment

__all__ = ["SCHEMA", "adjust_tasks", "summarise_side", "summarise_task", "write_report"]

SCHEMA = 1
Record = Mapping[str, Any]


def _length(values: Iterable[int]) -> dict[str, float | None]:
    """Mean, median, 90th percentile and maximum of token counts; all None without values."""
    counts = np.asarray(list(values), dtype=np.float64)
    if not counts.size:
        return {"mean": None, "p50": None, "p90": None, "max": None}
    p50, p90 = np.percentile(counts, (50, 90))
    return {"mean": float(counts.mean()), "p50": float(p50), "p90": float(p90), "max": float(counts.max())}


def summarise_side(records: Sequence[Record]) -> dict[str, Any]:
    """Count what one side's answers look like, whatever they say.

    records: answers of one side to one task. Returns n; well_formed, cut_off, looping, empty with their ``_share``
    (None where n is 0) and the Wilson interval ``well_formed_ci``; unreadable (None where no question has a key);
    thinking_tokens, answer_tokens, new_tokens as {mean, p50, p90, max}. What no record knows is None.
    """
    n = len(records)
    keyed = [r for r in records if r.get("key") is not None]
    counts: dict[str, int | None] = {
        name: sum(bool(r[name]) for r in records) if not n or any(r[name] is not None for r in records) else None
        for name in ("well_formed", "cut_off", "looping")
    }
    counts["empty"] = sum(not (r["answer"] or "").strip() for r in records)
    summary: dict[str, Any] = {"n": n, **counts}
    summary |= {f"{name}_share": None if not n or count is None else count / n for name, count in counts.items()}
    formed = counts["well_formed"]
    summary["well_formed_ci"] = None if formed is None else list(proportion_interval(formed, n))
    summary["unreadable"] = sum(r["letter"] is None for r in keyed) if keyed else None
    summary["unreadable_share"] = summary["unreadable"] / len(keyed) if keyed else None
    for field in ("thinking_tokens", "answer_tokens", "new_tokens"):
        summary[field] = _length(r[field] for r in records if r[field] is not None)
    return summary


def _paired(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """(base, tuned) per question, in the order of the first mention. Raises DataError for a missing or double one."""
    sides: dict[Any, dict[str, Record]] = {}
    for record in records:
        place = f"task {record['task']}, question {record['id']}"
        if record["side"] not in ("base", "tuned"):
            raise DataError(f"{place}: side is {record['side']!r}, expected 'base' or 'tuned'")
        entry = sides.setdefault(record["id"], {})
        if record["side"] in entry:
            raise DataError(f"{place} has two answers of {record['side']}", "question ids must be unique within a task")
        entry[record["side"]] = record
    for name, entry in sides.items():
        if len(entry) < 2:
            missing = "tuned" if "base" in entry else "base"
            raise DataError(
                f"task {records[0]['task']}, question {name} has no answer of {missing}",
                "a paired comparison needs both; run the compare stage again",
            )
    return [(entry["base"], entry["tuned"]) for entry in sides.values()]


def summarise_task(records: Sequence[Record]) -> dict[str, Any]:
    """Compare both sides on one task, from the records alone.

    Returns task, kind ("mcq" where the questions have keys, else "open"), n; base and tuned (summarise_side); form
    (PairedDifference of the well-formed share, with verdict); length (PairedMean of new_tokens); either is None where a
    record does not know it. For mcq also accuracy
    (PairedDifference with verdict, base_ci and tuned_ci by Wilson), chance, majority_letter, discordance, detectable.
    Unreadable answers are wrong. ``group`` joins copies of a question into one cluster.
    Raises DataError for no records, several tasks, a question without both sides, or keys on some questions only.
    """
    tasks = list(dict.fromkeys(r["task"] for r in records))
    if len(tasks) != 1:
        raise DataError(f"summarise_task takes the answers of one task, not of {len(tasks)} ({', '.join(tasks[:3])})")
    pairs = _paired(records)
    base, tuned = [b for b, _ in pairs], [t for _, t in pairs]
    keys = {r["key"] is not None for r in (*base, *tuned)}
    if len(keys) != 1:
        raise DataError(f"task {tasks[0]}: some questions have a key and some have none", "split it into two tasks")
    groups = [b.get("group") for b in base]
    clusters = groups if any(g is not None for g in groups) else None
    form = length = None
    if all(r["well_formed"] is not None for r in (*base, *tuned)):
        form = paired_difference([b["well_formed"] for b in base], [t["well_formed"] for t in tuned], clusters)
    if all(r["new_tokens"] is not None for r in (*base, *tuned)):
        length = paired_mean([b["new_tokens"] for b in base], [t["new_tokens"] for t in tuned], clusters)
    summary: dict[str, Any] = {"task": tasks[0], "kind": "mcq" if keys.pop() else "open", "n": len(pairs)}
    if summary["kind"] == "mcq":
        summary |= _accuracy(base, tuned, clusters)
    return summary | {
        "form": form and asdict(form) | {"verdict": verdict(form.ci_low, form.ci_high, p_value=form.p_value)},
        "length": length and asdict(length),
        "base": summarise_side(base),
        "tuned": summarise_side(tuned),
    }


def adjust_tasks(accuracies: Sequence[dict[str, Any]]) -> None:
    """Adjust the p values of several tasks' accuracy by Holm, and let the verdicts rest on them; one stays as it is."""
    if len(accuracies) < 2:
        return
    for found, adjusted in zip(accuracies, holm([found["p_value"] for found in accuracies]), strict=True):
        found |= {
            "p_holm": adjusted,
            "holm_tasks": len(accuracies),
            "verdict": verdict(found["ci_low"], found["ci_high"], p_value=adjusted),
        }


def _accuracy(base: Sequence[Record], tuned: Sequence[Record], clusters: list[Any] | None) -> dict[str, Any]:
    """Right answers of both sides, what guessing gives, and what this many questions can show."""
    base_right, tuned_right = (
        [r["letter"] is not None and r["letter"] == r["key"] for r in side] for side in (base, tuned)
    )
    found = paired_difference(base_right, tuned_right, clusters)
    discordance = (found.b_only + found.t_only) / found.n
    counts = [len(r.get("options") or ()) for r in base]
    return {
        "accuracy": asdict(found)
        | {
            "verdict": verdict(found.ci_low, found.ci_high, p_value=found.p_value),
            "base_ci": list(proportion_interval(sum(base_right), found.n)),
            "tuned_ci": list(proportion_interval(sum(tuned_right), found.n)),
        },
        "chance": float(np.mean([1 / count for count in counts])) if all(counts) else None,
        "majority_letter": Counter(r["key"] for r in base).most_common(1)[0][1] / found.n,
        "discordance": discordance,
        "detectable": minimum_detectable_difference(found.n / found.design_effect, discordance),
    }


def write_report(folder: Path, result: Mapping[str, Any]) -> None:
    """Write ``report.html`` (one file, nothing fetched, no script) and ``report.md`` into the folder.

    result: see the module docstring. Each file appears whole or not at all. Raises RunError for another schema.
    """
    from markupsafe import Markup

    from deepdoctor.compare.charts import forest_chart, loss_chart
    from deepdoctor.compare.report_text import TEXT, markdown_escape
    from deepdoctor.compare.report_view import forest_panels, report_view

    if result.get("schema") != SCHEMA:
        raise RunError(
            f"a comparison of schema {result.get('schema')!r} cannot be shown: this version reads schema {SCHEMA}",
            "run the compare stage again",
        )
    environment = template_environment(Path(__file__).parent / "templates")
    environment.filters["md"] = lambda text: Markup(markdown_escape(text))
    view = report_view(result)
    words = TEXT | {"repeat_note": result.get("repeat_note") or TEXT["repeat_note"]}
    train = result.get("train") or {}
    panels = forest_panels(result)
    charts = {
        "forest": {size: forest_chart(panels, size) for size in ("wide", "narrow")} if panels else None,
        "curve": {
            size: loss_chart(train["curve"], train.get("held_out_curve") or [], size) for size in ("wide", "narrow")
        }
        if train.get("curve")
        else None,
    }
    for name in ("report.html", "report.md"):
        page = environment.get_template(f"{name}.j2").render(view=view, t=words, charts=charts)
        partial = folder / f".{name}.partial"
        partial.write_text(page, encoding="utf-8", errors="replace", newline="\n")
        os.replace(partial, folder / name)
