"""MedXpertQA Text, test split, ten options: hard, and partly rewritten from MedQA."""

from __future__ import annotations

from deepdoctor.compare.tasks.task import Task

__all__ = ["TASK"]

TASK = Task(
    name="medxpertqa",
    version="1",
    source="MedXpertQA Text, test split (TsinghuaC3I/MedXpertQA; Zuo et al. 2025, arXiv 2501.18362)",
    licence="MIT",
    file="medxpertqa-text-test.jsonl",
    protocol="question and ten lettered options; free reasoning, then one letter",
    options=(10, 10),
    questions=2450,
    distinct=2450,
    traps=(
        "medxpertqa: about 13 % (8 to 20 %) of the questions seem to be rewritten from MedQA's training split, others "
        "from its test split; a gain after training on such rows is suspect.",
        "medxpertqa: models of 8 billion parameters score 11 to 23 %, guessing 10 %.",
    ),
)
