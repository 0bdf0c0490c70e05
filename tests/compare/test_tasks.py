"""The known question sets: complete, consistent, found by name or file, and true to the data where it is at hand."""

import json
from pathlib import Path

import pytest

from deepdoctor.compare.tasks.known import TASKS, find_task
from deepdoctor.data.questions import load_questions
from deepdoctor.errors import UsageError

EVAL = Path(__file__).parents[2].parent / "shared" / "data" / "eval"


@pytest.mark.parametrize("name", TASKS)
def test_definitions_are_complete(name: str) -> None:
    """Name, version, source, licence, protocol, counts and traps are stated; a harm margin is a share."""
    task = TASKS[name]
    assert task.name == name and task.version and task.source and task.licence and task.protocol
    assert 2 <= task.options[0] <= task.options[1] <= 10
    assert task.questions and task.distinct and task.distinct <= task.questions
    assert task.cluster_field == "dup_group" and task.file.endswith(".jsonl")
    assert all(trap.startswith(f"{name}: ") and trap.endswith(".") for trap in task.traps)
    assert task.harm_margin is None or 0 < task.harm_margin < 0.2


def test_only_pubmedqa_is_a_harm_check() -> None:
    """The set that cannot separate models looks for harm; the others are end points."""
    assert [name for name, task in TASKS.items() if task.harm_margin] == ["pubmedqa"]


def test_found_by_name_or_file() -> None:
    """A name, a file with a known name, a file of one's own; else the nearest name is offered."""
    assert find_task("medqa") == (TASKS["medqa"], None)
    known, path = find_task("some/medqa-usmle-4opt-test.jsonl")
    assert known is TASKS["medqa"] and path == Path("some/medqa-usmle-4opt-test.jsonl")
    own, path = find_task("mine.jsonl")
    assert (own.name, own.questions, own.harm_margin, path) == ("mine", None, None, Path("mine.jsonl"))
    with pytest.raises(UsageError, match="neither a known question set") as wrong:
        find_task("MMLU_pro_health_")
    assert wrong.value.hint == "did you mean `mmlu-pro-health`?"


@pytest.mark.parametrize("name", TASKS)
def test_saved_questions_fit_their_definition(name: str) -> None:
    """The questions at hand have as many options as stated, are at most the public set, and are read as they stand."""
    task = TASKS[name]
    path = EVAL / task.file
    if not path.is_file():
        pytest.skip(f"needs {path}")
    questions = load_questions(str(path), None, 0)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) - 2 <= len(questions) <= len(rows) <= (task.questions or 0)
    counts = {len(question.options) for question in questions}
    assert task.options[0] <= min(counts) and max(counts) <= task.options[1]
    assert {row["id"]: row["answer"] for row in rows}.items() >= {q.id: q.answer for q in questions}.items()
