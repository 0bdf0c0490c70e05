"""The comparison in a few lines, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["outcome_lines"]


def outcome_lines(stats: Mapping[str, Any]) -> list[str]:
    """What a comparison found, in plain text. stats: as in ``stats.json``."""
    lines = []
    for part, loss in stats.get("loss", {}).items():
        interval = (
            f", 95 % interval {loss['ci_low']:+.3f} to {loss['ci_high']:+.3f}" if loss["ci_low"] is not None else ""
        )
        lines.append(
            f"held-out loss, {part}: {loss['base']:.3f} -> {loss['tuned']:.3f} ({loss['difference']:+.3f}{interval}): "
            f"{loss['verdict']}"
        )
    for task in stats.get("tasks", []):
        base, tuned = task["base"], task["tuned"]
        lines.append(
            f"{task['task']}: well-formed {base['well_formed']}/{base['n']} -> {tuned['well_formed']}/{tuned['n']}, "
            f"cut off {base['cut_off']}/{base['n']} -> {tuned['cut_off']}/{tuned['n']}"
        )
        if task.get("accuracy"):
            accuracy = task["accuracy"]
            lines.append(
                f"{task['task']}: accuracy {accuracy['base_mean']:.1%} -> {accuracy['tuned_mean']:.1%} "
                f"(95 % interval of the difference {accuracy['ci_low']:+.1%} to {accuracy['ci_high']:+.1%}, "
                f"p {accuracy['p_value']:.2g}): {accuracy['verdict']}"
            )
            for arm, found in (task.get("placebo") or {}).items():
                over = found["accuracy"]["over_placebo"]
                lines.append(
                    f"{task['task']}: accuracy over the placebo {arm} {over['difference']:+.1%} "
                    f"({over['ci_low']:+.1%} to {over['ci_high']:+.1%}, p {over['p_value']:.2g}): {over['verdict']}"
                )
    return lines
