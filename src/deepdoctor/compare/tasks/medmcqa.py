"""MedMCQA, validation split, four options: short entrance-exam questions."""

from __future__ import annotations

from deepdoctor.compare.tasks.task import Task

__all__ = ["TASK"]

TASK = Task(
    name="medmcqa",
    version="1",
    source="MedMCQA, validation split (medmcqa/medmcqa; Pal et al. 2022, arXiv 2203.14371); the test key is not public",
    licence="MIT (dataset card: Apache-2.0)",
    file="medmcqa-validation.jsonl",
    protocol="question and four lettered options; free reasoning, then one letter",
    options=(4, 4),
    questions=4183,
    distinct=4163,
    traps=("medmcqa: a third of the keys are A; some rows of medical-o1 were made from questions of this split.",),
)
