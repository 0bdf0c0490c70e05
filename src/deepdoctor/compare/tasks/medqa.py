"""MedQA-USMLE, English, four options: exam vignettes, the primary end point."""

from __future__ import annotations

from deepdoctor.compare.tasks.task import Task

__all__ = ["TASK"]

TASK = Task(
    name="medqa",
    version="1",
    source="MedQA-USMLE, 4 options, test split (jind11/MedQA; Jin et al. 2020, arXiv 2009.13081)",
    licence="MIT",
    file="medqa-usmle-4opt-test.jsonl",
    protocol="question and four lettered options; free reasoning, then one letter",
    options=(4, 4),
    questions=1273,
    distinct=1273,
    traps=(
        "medqa: about one question in ten refers to a picture that is not part of the set.",
        "medqa: fine-tuning on chains of thought with wrong answers has raised it by 3.5 points (med-s1), so a gain is "
        "not proof of new knowledge.",
    ),
)
