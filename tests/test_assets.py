"""The embedded rows and questions: enough of them, whole, balanced, and without overlap."""

import json
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest


def records(name: str) -> list[dict[str, Any]]:
    """The objects of an embedded JSONL file."""
    text = (files("deepdoctor") / "assets" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


ROWS, QUESTIONS = records("rows"), records("questions")


def plain(text: str) -> str:
    """Text without differences of case, spacing and punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def test_rows_cover_enough_of_medicine() -> None:
    """At least 120 rows over at least 12 specialties, none of which is most of it."""
    specialties = Counter(row["specialty"] for row in ROWS)
    assert len(ROWS) >= 120
    assert len(specialties) >= 12
    assert max(specialties.values()) <= len(ROWS) / 6


@pytest.mark.parametrize("field", ["id", "condition", "Question", "Complex_CoT", "Response"])
def test_rows_are_all_different(field: str) -> None:
    """No id, condition or text stands twice."""
    assert [text for text, count in Counter(plain(row[field]) for row in ROWS).items() if count > 1] == []


def test_rows_are_whole_and_of_one_length() -> None:
    """Reasoning has 120 to 250 words, question and answer are there, and no control text stands in them."""
    odd = {row["id"]: len(row["Complex_CoT"].split()) for row in ROWS}
    assert {id: words for id, words in odd.items() if not 120 <= words <= 250} == {}
    for row in ROWS:
        for field in ("Question", "Complex_CoT", "Response"):
            assert row[field].strip() == row[field]
            assert len(row[field].split()) >= 8, (row["id"], field)
            assert not any(mark in row[field] for mark in ("<think", "</think", "<|", "TODO")), row["id"]


def test_questions_have_four_different_options_and_a_key() -> None:
    """At least 60 questions, unique, each with options A to D that all differ and a key that is one of them."""
    assert len(QUESTIONS) >= 60
    assert max(Counter(question["id"] for question in QUESTIONS).values()) == 1
    assert max(Counter(plain(question["question"]) for question in QUESTIONS).values()) == 1
    for question in QUESTIONS:
        assert list(question["options"]) == ["A", "B", "C", "D"]
        assert len({plain(text) for text in question["options"].values()}) == 4, question["id"]
        assert question["answer_text"] == question["options"][question["answer"]]


def test_keys_are_balanced() -> None:
    """No letter is right so often that always giving it pays, and the right option is not the longest one."""
    keys = Counter(question["answer"] for question in QUESTIONS)
    assert max(keys.values()) - min(keys.values()) <= 2
    longest = sum(len(question["answer_text"]) == max(map(len, question["options"].values())) for question in QUESTIONS)
    assert longest / len(QUESTIONS) <= 0.5


def test_no_question_shares_its_condition_with_a_row() -> None:
    """Training on the rows cannot teach the answers of the questions."""
    assert {plain(q["condition"]) for q in QUESTIONS} & {plain(row["condition"]) for row in ROWS} == set()
    assert {plain(q["question"]) for q in QUESTIONS} & {plain(row["Question"]) for row in ROWS} == set()


def test_package_reads_its_own_assets() -> None:
    """The loaders give as many rows and questions as the files hold."""
    from deepdoctor.data.questions import load_questions
    from deepdoctor.data.sources import load_records

    assert len(load_records("embedded:rows", None, None, "train")[0]) == len(ROWS)
    assert len(load_questions("embedded:questions", None, 0)) == len(QUESTIONS)
