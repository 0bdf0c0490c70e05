"""What a comparison says: its result turned into worded, formatted pieces that the templates only lay out.

Sentences are made from the result alone. A verdict is never worded more strongly than its interval: where neither side
beats always giving the commonest letter, the page says that nothing about knowledge was shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepdoctor.compare.charts import ForestPanel, ForestRow
from deepdoctor.compare.report_text import (
    TEXT,
    clean,
    interval,
    nats,
    nats_difference,
    p_value,
    percent,
    plain_value,
    points,
    task_name,
    tokens_difference,
)

__all__ = ["forest_panels", "report_view"]

MOST_QUESTIONS = 100  # shown on the page; all stand in answers.jsonl
MOST_CHARACTERS = 20_000  # of one text shown
GLYPHS = {"better": "▲", "worse": "▼", "cannot tell": "◆"}
PARTS = ("reasoning", "answer", "all")


def _badge(verdict: str) -> dict[str, str]:
    return {"verdict": verdict, "glyph": GLYPHS[verdict], "css": verdict.replace(" ", "-")}


def _joined(entries: Sequence[Mapping[str, Any]]) -> str:
    """One word where all agree, else each verdict with what it holds for: "better on X, cannot tell on Y"."""
    verdicts = {entry["verdict"] for entry in entries}
    if len(verdicts) == 1:
        return f"{verdicts.pop()}."
    return ", ".join(f"{entry['verdict']} on {entry['label']}" for entry in entries) + "."


def _above_guessing(task: Mapping[str, Any]) -> str:
    """Whether either side is shown to beat always giving the commonest letter (or guessing)."""
    found = task["accuracy"]
    level = max(task["majority_letter"], task["chance"] or 0.0)
    above = {side: found[f"{side}_ci"][0] > level for side in ("base", "tuned")}
    named = f"always giving the commonest letter ({percent(level)})"
    if all(above.values()):
        return f"Both sides answer above {named}."
    if any(above.values()):
        return f"Only {'tuned' if above['tuned'] else 'base'} is shown to answer above {named}."
    return f"Neither side is shown to answer above {named}, so this says nothing about knowledge of the subject."


def _tiles(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One tile per kind of measurement: title, entries (label, verdict, figure, detail) and a note."""
    tasks = result.get("tasks") or []
    parts = _parts(result)
    shown = [(name, part) for name, part in parts if name != "all" or len(parts) == 1]
    tiles = [
        {"title": TEXT["accuracy"], "note": "", "entries": _accuracy_entries(tasks, result.get("pooled"))},
        {"title": TEXT["loss"], "note": TEXT["loss_note"], "entries": [_loss_entry(*part) for part in shown]},
        {
            "title": TEXT["form"],
            "note": TEXT["form_note"],
            "entries": [_form_entry(task) for task in tasks if task["form"]],
        },
    ]
    return [tile for tile in tiles if tile["entries"]]


def _share_difference(found: Mapping[str, Any]) -> str:
    bounds = interval(found["ci_low"], found["ci_high"], points)
    return f"Difference {points(found['difference'])} points, 95\u00a0% interval {bounds}, {p_value(found['p_value'])}."


def _accuracy_entries(tasks: Sequence[Mapping[str, Any]], pooled: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """An entry per task with a key, and one for all of them together where they were pooled."""
    entries = [_accuracy_entry(task) for task in tasks if task["kind"] == "mcq"]
    if pooled:
        unlike = pooled["heterogeneity"]
        note = (
            f" The tasks' differences are unlike one another ({p_value(unlike)})."
            if unlike is not None and unlike < 0.05
            else ""
        )
        entries.append(
            _badge(pooled["verdict"])
            | {
                "label": str(TEXT["pooled"]),
                "figure": f"{percent(pooled['base_mean'])} → {percent(pooled['tuned_mean'])}",
                "detail": f"{pooled['n']:,} questions of {len(pooled['tasks'])} tasks, each counted once. "
                f"{_share_difference(pooled)}{note}",
            }
        )
    return entries


def _beside(task: Mapping[str, Any]) -> str:
    """What stands beside the difference: p adjusted for several tasks, the harm check, the lax reading rule."""
    found, harm, lax = task["accuracy"], task.get("harm"), task.get("lax")
    text = ""
    if found.get("p_holm") is not None:
        text += f" Adjusted for {found['holm_tasks']} tasks (Holm): {p_value(found['p_holm'])}."
    if harm:
        text += f" Margin of harm {100 * harm['margin']:g} points: {TEXT['harm'][harm['verdict']]}."
    if lax:
        bounds = interval(lax["ci_low"], lax["ci_high"], points)
        text += f" Reading letters at any price: {points(lax['difference'])} points ({bounds}): {lax['verdict']}."
    return text


def _accuracy_entry(task: Mapping[str, Any]) -> dict[str, str]:
    found, n = task["accuracy"], task["n"]
    right = f"{round(found['base_mean'] * n)} → {round(found['tuned_mean'] * n)} of {n} questions"
    copies = f" ({found['n_clusters']} distinct)" if found["n_clusters"] < n else ""
    return _badge(found["verdict"]) | {
        "label": task_name(task["task"]),
        "figure": f"{percent(found['base_mean'])} → {percent(found['tuned_mean'])}",
        "detail": f"{right}{copies}. {_share_difference(found)}{_beside(task)} {_above_guessing(task)}",
    }


def _loss_entry(name: str, part: Mapping[str, Any]) -> dict[str, str]:
    bounds = interval(part["ci_low"], part["ci_high"], nats_difference)
    return _badge(part["verdict"]) | {
        "label": TEXT["part"][name],
        "figure": f"{nats(part['base'])} → {nats(part['tuned'])}",
        "detail": f"Difference {nats_difference(part['difference'])} nats per token, 95\u00a0% interval {bounds}; "
        f"{part['n_rows']} rows, {part['n_tokens']:,} tokens.",
    }


def _form_entry(task: Mapping[str, Any]) -> dict[str, str]:
    base, tuned = task["base"], task["tuned"]
    counts = f"{base['well_formed']} → {tuned['well_formed']} of {task['n']} answers well-formed."
    return _badge(task["form"]["verdict"]) | {
        "label": task_name(task["task"]),
        "figure": f"{percent(base['well_formed_share'])} → {percent(tuned['well_formed_share'])}",
        "detail": f"{counts} {_share_difference(task['form'])}",
    }


def _parts(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    loss = result.get("loss") or {}
    return [(name, loss[name]) for name in PARTS if loss.get(name)]


def forest_panels(result: Mapping[str, Any]) -> list[ForestPanel]:
    """The differences of a result as panels: shares in points (right is better), losses in nats (left is better)."""
    shares = []
    for kind, title in (("accuracy", "right"), ("form", "well-formed")):
        for task in result.get("tasks") or []:
            found = task.get(kind)
            if found and found["difference"] is not None:
                low, high = found["ci_low"], found["ci_high"]
                text = f"{points(found['difference'])} [{points(low)}, {points(high)}]"
                label = f"{title}: {task_name(task['task'], 24)}"
                shares.append(
                    ForestRow(label, 100 * found["difference"], 100 * low, 100 * high, text, found["verdict"])
                )
    losses = []
    for name, part in _parts(result):
        low, high = part["ci_low"], part["ci_high"]
        bounds = f" [{nats_difference(low)}, {nats_difference(high)}]" if low is not None else ""
        text, label = f"{nats_difference(part['difference'])}{bounds}", f"loss: {TEXT['part'][name]}"
        losses.append(ForestRow(label, part["difference"], low, high, text, part["verdict"]))
    panels = []
    if shares:
        panels.append(ForestPanel(str(TEXT["points"]), str(TEXT["left"]), str(TEXT["right"]), shares))
    if losses:
        panels.append(ForestPanel(str(TEXT["nats"]), str(TEXT["right"]), str(TEXT["left"]), losses))
    return panels


def _side_tables(tasks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per task: label, base and tuned of form, harms and lengths."""
    tables = []
    for task in tasks:
        sides = (task["base"], task["tuned"])
        rows = []
        if sides[0]["well_formed_ci"] and sides[1]["well_formed_ci"]:
            rows.append(("well-formed (95\u00a0% interval)", *(_share_ci(side) for side in sides)))
        for field, label in (
            ("cut_off", "cut off"),
            ("unreadable", "unreadable"),
            ("looping", "looping"),
            ("empty", "empty"),
        ):
            if sides[0][field] is not None and sides[1][field] is not None:
                rows.append((label, *(f"{side[field]} ({percent(side[f'{field}_share'])})" for side in sides)))
        for field, label in (("thinking_tokens", "thinking tokens"), ("answer_tokens", "answer tokens")):
            if any(side[field]["mean"] is not None for side in sides) or not task["n"]:
                rows.append((f"{label}: mean / median / p90 / max", *(_spread(side[field]) for side in sides)))
        length = task.get("length") or {}
        if length.get("difference") is not None:
            bounds = interval(length["ci_low"], length["ci_high"], tokens_difference)
            rows.append(("mean tokens written", f"{length['base_mean']:,.0f}", f"{length['tuned_mean']:,.0f}"))
            mean = tokens_difference(length["difference"])
            note = f"Tuned minus base: {mean} tokens per answer (95\u00a0% interval {bounds})."
        else:
            note = ""
        tables.append({"task": task_name(task["task"]), "n": task["n"], "rows": rows, "note": note})
    return tables


def _share_ci(side: Mapping[str, Any]) -> str:
    low, high = side["well_formed_ci"]
    return f"{side['well_formed']} of {side['n']} ({percent(low)} to {percent(high)})"


def _spread(values: Mapping[str, float | None]) -> str:
    return " / ".join("–" if values[k] is None else f"{values[k]:,.0f}" for k in ("mean", "p50", "p90", "max"))


def _power(tasks: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a true difference had to be to show with 80 % probability, per task with a key."""
    sentences = []
    for task in tasks:
        if task["kind"] != "mcq":
            continue
        units = task["accuracy"]["n_clusters"]
        n = f"{task['n']} questions" + (f" ({units} distinct)" if units < task["n"] else "")
        start = (
            f"{task_name(task['task'])}: with {n}, on {percent(task['discordance'])} of which only one side was right, "
        )
        if task["detectable"] is None:
            sentences.append(start + "no difference of any size would be shown reliably.")
        else:
            size = f"{100 * task['detectable']:.1f}"
            sentences.append(
                start
                + f"a true difference of {size} points would be shown four times in five; smaller ones less often."
            )
    return sentences


def _answers(result: Mapping[str, Any]) -> dict[str, Any]:
    """Questions with both answers; those that changed sides first, losses before gains."""
    pairs: dict[tuple[Any, Any], dict[str, Mapping[str, Any]]] = {}
    for record in result.get("answers") or []:
        pairs.setdefault((record["task"], record["id"]), {})[record["side"]] = record
    both = [pair for pair in pairs.values() if len(pair) == 2]
    order = sorted(both, key=lambda pair: _rank(pair["base"], pair["tuned"]))
    states = [_state(pair["base"], pair["tuned"]) for pair in both]
    items = []
    for pair in order[:MOST_QUESTIONS]:
        base, tuned = pair["base"], pair["tuned"]
        state = _state(base, tuned)
        items.append(
            {
                "task": task_name(base["task"]),
                "id": clean(str(base["id"])),
                "question": _short(base["question"]),
                "key": base.get("key"),
                "state": state,
                "flip": TEXT["flips"][state] if state else "",
                "sides": [_side(name, pair[name]) for name in ("base", "tuned")],
            }
        )
    lost, gained = states.count("lost"), states.count("gained")
    note = f"{len(items)} of {len(both)} questions" if len(items) < len(both) else f"All {len(both)} questions"
    if any(states):
        note += f"; {lost} went from right to wrong, {gained} from wrong to right" + ", shown first" * bool(
            lost + gained
        )
    return {"entries": items, "note": f"{note}. Every answer stands in answers.jsonl."}


def _state(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    """ "lost", "gained", "both", "none", or "" without a key."""
    if base.get("key") is None:
        return ""
    return {(1, 0): "lost", (0, 1): "gained", (1, 1): "both", (0, 0): "none"}[
        bool(base["correct"]), bool(tuned["correct"])
    ]


def _rank(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> int:
    """Order on the page: losses, gains, form lost, form gained, the rest."""
    state = _state(base, tuned)
    if state in ("lost", "gained"):
        return ("lost", "gained").index(state)
    return {(1, 0): 2, (0, 1): 3}.get((bool(base["well_formed"]), bool(tuned["well_formed"])), 4)


def _short(text: str | None) -> str:
    text = clean(text or "").strip()
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … ({len(text) - MOST_CHARACTERS:,} more characters in answers.jsonl)"


def _side(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    marks = []
    if record.get("key") is not None:
        letter = record["letter"]
        read = f"{letter}, right" if record["correct"] else f"{letter}, wrong (key {record['key']})"
        marks.append(
            ("right" if record["correct"] else "wrong", read if letter else f"unreadable (key {record['key']})")
        )
    marks += [("flaw", text) for field, text in (("cut_off", "cut off"), ("looping", "looping")) if record[field]]
    if record["well_formed"] is False:
        marks.append(("flaw", "not well-formed"))
    return {
        "name": name,
        "marks": [{"css": css, "text": clean(text)} for css, text in marks],
        "tokens": f"{record['new_tokens']:,} tokens" if record["new_tokens"] is not None else "length not known",
        "thinking_tokens": f"{record['thinking_tokens'] or 0:,} tokens",
        "thinking": None if record["thinking"] is None else _short(record["thinking"]),
        "answer": _short(record["answer"]),
        "missing": TEXT["no_answer"] if record["thinking"] else TEXT["nothing_written"],
    }


def _facts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Model, rows, training, protocol and timings as label and value, nested values flattened."""
    tables = []
    for section, heading in TEXT["facts"].items():
        rows = list(_flat(result.get(section) or {}))
        if rows:
            tables.append({"heading": heading, "rows": rows})
    return tables


def _flat(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        label = f"{above}{str(key).replace('_', ' ')}"
        if key in ("curve", "held_out_curve"):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{label}: ")
        else:
            yield clean(label), clean(plain_value(key, value))


def report_view(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything the templates print, worded and formatted; texts are plain, escaping is the template's."""
    tasks, tiles = result.get("tasks") or [], _tiles(result)
    model, protocol, run = result.get("model") or {}, result.get("protocol") or {}, str(result.get("run") or "run")
    verdicts = sum(len(tile["entries"]) for tile in tiles)
    limits = [clean(str(sentence)) for sentence in result.get("limits") or [] if sentence != TEXT["research"]]
    adjusted = any(task.get("accuracy") and task["accuracy"].get("p_holm") is not None for task in tasks)
    if verdicts > 1 and adjusted:
        limits.append("Verdicts on right answers are adjusted for the number of tasks (Holm); other verdicts are not.")
    elif verdicts > 1:
        limits.append(
            f"This page states {verdicts} verdicts, each at the 5 % level; they are not adjusted for their number."
        )
    loss_rows = [
        _badge(part["verdict"])
        | {
            "cells": [
                TEXT["part"][name],
                f"{nats(part['base'])} ({part['base_perplexity']:,.2f})",
                f"{nats(part['tuned'])} ({part['tuned_perplexity']:,.2f})",
                nats_difference(part["difference"]),
                interval(part["ci_low"], part["ci_high"], nats_difference),
            ]
        }
        for name, part in _parts(result)
    ]
    return {
        "run": clean(run),
        "subtitle": clean(
            " · ".join(str(v) for v in (model.get("id"), model.get("precision"), protocol.get("date")) if v)
        ),
        "headline": [f"{tile['title']}: {_joined(tile['entries'])}" for tile in tiles] or [TEXT["nothing"]],
        "tiles": tiles,
        "loss_rows": loss_rows,
        "sides": _side_tables(tasks),
        "power": _power(tasks),
        "answers": _answers(result),
        "facts": _facts(result),
        "limits": limits,
        "command": clean(
            str(result.get("command") or f"deepdoctor run recipe.yaml --name {shlex.quote(run + '-again')}")
        ),
    }
