"""Before a comparison: what so many questions can show, and how many a wanted resolution needs.

Both rest on one formula, 2.8 * sqrt(share of pairs that differ / different questions): power 80 %, two-sided 5 %. The
share of pairs that differ is not known beforehand. Near-equal models were seen to differ on 11 % (PubMedQA), 15 %
(MedQA), 19 % (MMLU-Pro health) and 22 % (MedMCQA) of the questions, base models and their tuned versions on 14 to 27 %
(MMLU-Pro health); hence the range assumed. After a comparison the report says the same from what was seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from scipy import special

from deepdoctor.compare.stats import minimum_detectable_difference
from deepdoctor.compare.tasks.known import TASKS, find_task
from deepdoctor.compare.tasks.task import Task
from deepdoctor.data.questions import load_questions
from deepdoctor.errors import UsageError

__all__ = [
    "ASSUMED_DISCORDANCE",
    "TOKENS_PER_ANSWER",
    "Plan",
    "plan_comparison",
    "plan_lines",
    "plan_tasks",
    "print_plans",
    "questions_needed",
]

ASSUMED_DISCORDANCE = (0.15, 0.25)
"""Share of questions on which only one side is right, low and high. Source: module docstring."""
TOKENS_PER_ANSWER = 1024
"""Most tokens of one answer, thinking included: the recipe's default limit, so minutes are an upper bound."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a comparison on ``questions`` questions of a task can show; shares in 0..1, pairs are (low, high).

    units: different questions among them. discordance: assumed. detectable: smallest true differences that show four
    times in five; None where not even a difference of 1 does. resolution: the difference wanted, or None. needed:
    questions that it takes. available: questions of the public set, or None. margin: of a harm check, or None.
    tokens: most tokens both sides write. minutes: for these tokens at the measured speed, or None.
    """

    task: str
    questions: int
    units: float
    discordance: tuple[float, float]
    detectable: tuple[float | None, float | None]
    resolution: float | None
    needed: tuple[int, int] | None
    available: int | None
    margin: float | None
    tokens: int
    minutes: float | None


def questions_needed(
    resolution: float, discordance: float, copies: float = 1.0, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Number of questions that shows a true paired difference of ``resolution`` with the given power.

    resolution: a share in 0..1, above 0. discordance: share of pairs that differ, in 0..1, raised to the resolution
    where it lies below. copies: questions per different question, >= 1. The inverse of minimum_detectable_difference.
    Raises ValueError outside these ranges.
    """
    if not 0 < resolution <= 1 or not 0 <= discordance <= 1 or copies < 1:
        raise ValueError(f"resolution {resolution}, discordance {discordance}, copies {copies}: out of range")
    reach = float(special.ndtri(1 - alpha / 2) + special.ndtri(power))
    return math.ceil(copies * reach**2 * max(discordance, resolution) / resolution**2 - 1e-9)


def plan_comparison(
    task: Task,
    questions: int | None = None,
    distinct: float | None = None,
    resolution: float | None = None,
    discordance: Sequence[float] = ASSUMED_DISCORDANCE,
    tokens_per_s: float | None = None,
) -> Plan:
    """Plan a comparison of base and tuned on one task.

    questions: how many are asked; the whole public set where left out. distinct: how many of them differ; as in the
    public set where left out. resolution: the true difference that is to show, a share. discordance: low and high, or
    one value, shares. tokens_per_s: measured over a whole comparison on the machine in question.
    Raises UsageError, naming the option, for values out of range and for a task of unknown size.
    """
    asked = questions if questions is not None else task.questions
    if asked is None:
        raise UsageError(f"--plan does not know how many questions {task.name} holds", "say so: `--questions N`")
    if asked < 1:
        raise UsageError(f"--questions is {asked}, expected at least 1")
    if resolution is not None and not 0 < resolution <= 1:
        raise UsageError(f"--resolution is {100 * resolution:g} points, expected more than 0 and at most 100")
    if len(discordance) not in (1, 2) or not all(0 < share <= 1 for share in discordance):
        raise UsageError(
            f"--discordance is {' '.join(map(str, discordance))}, expected one or two shares above 0 and at most 1",
            "for instance `--discordance 0.15 0.25`",
        )
    if tokens_per_s is not None and not (math.isfinite(tokens_per_s) and tokens_per_s > 0):
        raise UsageError(f"--tokens-per-s is {tokens_per_s:g}, expected a measured speed above 0")
    low, high = min(discordance), max(discordance)
    copies = task.questions / task.distinct if task.questions and task.distinct else 1.0
    units = distinct if distinct is not None else asked / copies
    tokens = 2 * asked * TOKENS_PER_ANSWER
    return Plan(
        task=task.name,
        questions=asked,
        units=units,
        discordance=(low, high),
        detectable=(minimum_detectable_difference(units, low), minimum_detectable_difference(units, high)),
        resolution=resolution,
        needed=None
        if resolution is None
        else (questions_needed(resolution, low, asked / units), questions_needed(resolution, high, asked / units)),
        available=task.questions,
        margin=task.harm_margin,
        tokens=tokens,
        minutes=None if tokens_per_s is None else tokens / tokens_per_s / 60,
    )


def plan_tasks(
    tasks: Sequence[str],
    questions: int | None,
    resolution: float | None,
    discordance: Sequence[float],
    tokens_per_s: float | None,
) -> list[Plan]:
    """Plan each task of a command line; names and questions files as ``find_task`` takes them.

    Of a file, its questions and how many of them differ are counted. Raises UsageError and DataError.
    """
    if not tasks:
        raise UsageError("--plan needs a question set", f"add `--task NAME`: {', '.join(TASKS)}, or a .jsonl file")
    plans = []
    for name in tasks:
        task, path = find_task(name)
        asked, distinct = questions, None
        if path is not None:
            found = load_questions(str(path), questions, 0)
            if questions is not None and questions > len(found):
                raise UsageError(
                    f"--questions is {questions}, and {path} holds {len(found)}", "leave it out to take all"
                )
            asked, distinct = len(found), float(len({q.dup_group or q.id for q in found}))
        plans.append(plan_comparison(task, asked, distinct, resolution, discordance, tokens_per_s))
    return plans


def print_plans(plans: Sequence[Plan], as_json: bool) -> None:
    """Print sentences, or one JSON object with a list of plans."""
    if as_json:
        print(json.dumps({"plans": [asdict(plan) for plan in plans]}))
        return
    for plan in plans:
        for line in plan_lines(plan):
            print(line)


def plan_lines(plan: Plan) -> list[str]:
    """The plan in sentences."""
    low, high = plan.detectable
    asked = f"{plan.questions:,} questions" if plan.questions > 1 else "1 question"
    same = f" ({plan.units:,.0f} different)" if round(plan.units) < plan.questions else ""
    assumed = _range(100 * plan.discordance[0], 100 * plan.discordance[1], "%")
    if low is None or high is None:
        lines = [f"{plan.task}: with {asked}{same} no difference of any size would show reliably"]
    else:
        lines = [
            f"{plan.task}: with these {asked}{same} you can see {_range(100 * low, 100 * high, 'points')}",
            f"  a smaller true difference would show less than four times in five; assumed: only one side right on "
            f"{assumed} of them",
        ]
    if plan.resolution is not None and plan.needed is not None:
        few, many = plan.needed
        need = f"{few:,}" if few == many else f"{few:,} to {many:,}"
        line = f"  to see {100 * plan.resolution:g} points it takes {need} questions"
        if plan.available is not None and few > plan.available:
            line += f"; the public set has {plan.available:,}, which is too few"
        elif plan.available is not None and many > plan.available:
            line += f"; the public set has {plan.available:,}, which may be too few"
        lines.append(line)
    if plan.margin is not None and high is not None and low is not None:
        word = (
            "can" if high <= plan.margin else "can, where the sides differ little," if low <= plan.margin else "cannot"
        )
        lines.append(
            f"  a harm check: {asked} {word} rule out a loss of {100 * plan.margin:g} points (the margin, stated "
            "beforehand) if there is none"
        )
    if plan.available is not None and plan.questions > plan.available:
        lines.append(f"  the public set has {plan.available:,} questions only")
    if plan.minutes is None:
        lines.append("  minutes are left out: they need a measured speed, `--tokens-per-s N`")
    else:
        lines.append(
            f"  at most {math.ceil(plan.minutes):,} minutes for both sides at the speed given "
            f"({TOKENS_PER_ANSWER:,} tokens an answer)"
        )
    return lines


def _range(low: float, high: float, unit: str) -> str:
    """ "3.3 to 4.3 points", or one number where both read the same; whole percentages without decimals."""
    shown = [f"{value:.1f}" if unit == "points" else f"{value:g}" for value in (low, high)]
    return f"{' to '.join(dict.fromkeys(shown))} {unit}"
