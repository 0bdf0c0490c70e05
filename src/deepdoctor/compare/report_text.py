"""The words of the report in one place, and how its numbers are written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeGuard

__all__ = [
    "TEXT",
    "clean",
    "interval",
    "markdown_escape",
    "nats",
    "nats_difference",
    "p_value",
    "percent",
    "plain_value",
    "points",
    "task_name",
    "tokens_difference",
]

TEXT: dict[str, Any] = {
    "title": "Base and tuned, compared",
    "kicker": "DeepDoctor comparison",
    "research": "Research only, not clinical guidance.",
    "verdict": "Verdict",
    "accuracy": "Right answers",
    "loss": "Held-out loss",
    "form": "Form",
    "nothing": "Nothing was measured that could be compared.",
    "how_called": "Better or worse is said only when the 95\u00a0% interval leaves out zero and, for shares, the exact "
    "test gives p\u00a0<\u00a00.05. Otherwise one cannot tell. Every difference is tuned minus base.",
    "pooled": "all tasks together",
    "harm": {
        "ruled out": "a loss beyond it is ruled out",
        "harm": "tuned lost more than it",
        "cannot tell": "a loss beyond it cannot be ruled out",
    },
    "loss_note": "Lower is better. A lower loss means that tuned expects the held-out text more; it does not show that "
    "more of its answers are right.",
    "form_note": "Well-formed: one think block, opened at the start, closed, and followed by an answer. Form says "
    "nothing about whether the answer is right.",
    "forest": "Differences and their intervals",
    "forest_note": "Dot: measured difference. Bar: 95\u00a0% interval. A bar that crosses zero cannot tell.",
    "curve": "Training",
    "curve_note": "Loss of the label tokens while training; the held-out rows were never trained on.",
    "loss_table": "Loss on held-out rows",
    "perplexity_note": "Nats per token, perplexity in brackets. The interval is over rows, weighted by their tokens.",
    "sides": "What the answers look like",
    "sides_note": "Unreadable and empty answers count as wrong. Looping: the text ends in the same stretch three times "
    "over or more.",
    "power": "What this many questions can show",
    "answers": "Answers side by side",
    "base": "base",
    "tuned": "tuned",
    "thinking": "Thinking",
    "no_thinking": "no think block",
    "no_answer": "no answer after the thinking",
    "nothing_written": "nothing was written",
    "markdown_questions": 12,
    "protocol": "Protocol",
    "repeat": "How to repeat",
    "repeat_note": "From the run folder, which keeps the resolved recipe, versions, seeds and every answer "
    "(answers.jsonl); stats.json holds the numbers of this page.",
    "limits": "Limits",
    "no_interval": "no interval",
    "part": {"reasoning": "reasoning", "answer": "answer", "all": "reasoning and answer"},
    "columns": ["", "base", "tuned", "difference", "95\u00a0% interval", "verdict"],
    "facts": {"model": "Model", "data": "Rows", "train": "Training", "protocol": "Asking", "timings": "Seconds"},
    "flips": {"lost": "right → wrong", "gained": "wrong → right", "both": "both right", "none": "both wrong"},
    "left": "base better",
    "right": "tuned better",
    "points": "difference in percentage points",
    "nats": "difference in nats per token (lower is better)",
}


def _signed(text: str) -> str:
    """Real minus signs, and no sign on a zero: "-0.0" -> "0.0"."""
    return (text.lstrip("+-") if not text.strip("+-0.") else text).replace("-", "−")


def _shown(value: float | None) -> TypeGuard[float]:
    """Whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def percent(share: float | None) -> str:
    """0.375 -> "37.5 %", unbroken."""
    return f"{100 * share:.1f}\u00a0%" if _shown(share) else "–"


def points(difference: float | None) -> str:
    """A difference of shares in percentage points: 0.125 -> "+12.5"."""
    return _signed(f"{100 * difference:+.1f}") if _shown(difference) else "–"


def nats(value: float | None) -> str:
    """A loss in nats per token: 2.1034 -> "2.103"."""
    return f"{value:.3f}" if _shown(value) else "–"


def nats_difference(value: float | None) -> str:
    """A difference of losses: -0.4 -> "−0.400"."""
    return _signed(f"{value:+.3f}") if _shown(value) else "–"


def tokens_difference(value: float | None) -> str:
    """A difference of token counts: 1200.4 -> "+1,200"."""
    return _signed(f"{value:+,.0f}") if _shown(value) else "–"


def p_value(value: float | None) -> str:
    """0.0004 -> "p < 0.001", unbroken; empty without a test."""
    if value is None:
        return ""
    return (
        "p\u00a0<\u00a00.001"
        if value < 0.001
        else f"p\u00a0=\u00a0{value:.3f}"
        if value < 0.1
        else f"p\u00a0=\u00a0{value:.2f}"
    )


def interval(low: float | None, high: float | None, show: Callable[[float], str]) -> str:
    """Both ends in the unit ``show`` writes, or a word where there is no interval."""
    return TEXT["no_interval"] if low is None or high is None else f"{show(low)} to {show(high)}"


def task_name(task: str, most: int = 30) -> str:
    """A task's name as shown: the file's name of a path, shortened in the middle."""
    name = clean(task).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    name = "held-out rows" if name == "held_out_rows" else name
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def plain_value(key: str, value: Any) -> str:
    """A setting or count as shown; seeds without separators."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if "seed" in key or abs(value) < 10_000 else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def clean(text: str) -> str:
    """Text fit for a page: control characters and lone surrogates become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text.replace("\r\n", "\n"))


def markdown_escape(text: Any) -> str:
    """Plain text for a Markdown line or table cell: HTML and Markdown signs lose their meaning, lines are joined."""
    text = re.sub(r"\s*\n\s*", " ", str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#|~])", r"\\\1", text)
