"""MMLU-Pro, category health, three to ten options: the set in which questions repeat."""

from __future__ import annotations

from deepdoctor.compare.tasks.task import Task

__all__ = ["TASK"]

TASK = Task(
    name="mmlu-pro-health",
    version="1",
    source="MMLU-Pro, test split, category health, July 2024 (TIGER-AI-Lab/MMLU-Pro; arXiv 2406.01574)",
    licence="MIT (repository: Apache-2.0)",
    file="mmlu-pro-health-test.jsonl",
    protocol="question and three to ten lettered options; free reasoning, then one letter",
    options=(3, 10),
    questions=818,
    distinct=683,
    traps=(
        "mmlu-pro-health: 818 rows are 683 different questions; 416 of them stand in MMLU's medical subjects too, so "
        "the two are not to be averaged.",
    ),
)
