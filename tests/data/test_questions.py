"""Questions: read, refused with file and line, drawn by seed, put into words."""

import logging
from collections import Counter
from itertools import pairwise

import pytest
from helpers_prompt import SHARED, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdoctor.data.questions import load_questions, option_prompt
from deepdoctor.data.rows import Question
from deepdoctor.errors import DataError

GOOD = {"id": "q1", "question": "Which vitamin?", "options": {"B": "B12", "A": "C"}, "answer": "B"}


def many(count, letters="AAAABBCD"):
    """Return ``count`` questions whose keys repeat ``letters``."""
    options = {letter: f"option {letter}" for letter in "ABCD"}
    return [
        {"id": f"q{n}", "question": f"Question {n}?", "options": options, "answer": letters[n % len(letters)]}
        for n in range(count)
    ]


def ids(path, count, seed=0):
    """Return the ids of a draw, in the order returned."""
    return [question.id for question in load_questions(path, count, seed)]


def test_fields_are_read(tmp_path):
    """Known fields arrive, options in letter order, further fields are ignored, task is the file's name."""
    record = {**GOOD, "context": "Text.", "subject": "Diet", "dup_group": "g", "image_ref": True, "license": "MIT"}
    (question,) = load_questions(write_jsonl(tmp_path / "vitamins.jsonl", [record]), None, 0)
    assert question == Question(
        "q1", "vitamins", "Which vitamin?", {"A": "C", "B": "B12"}, "B", "Text.", "Diet", "g", True
    )
    assert list(question.options) == ["A", "B"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": None}, "id is None, expected text"),
        ({"id": 7}, "id is 7, expected text"),
        ({"question": " "}, "question is ' ', expected text"),
        ({"answer": "C"}, "the answer 'C' is not one of the options A, B"),
        ({"answer": "b"}, "the answer 'b' is not one of the options A, B"),
        ({"options": ["a", "b"]}, "options is ['a', 'b'], expected letters with texts"),
        ({"options": {"A": "x", "B": ""}}, "expected letters with texts"),
        ({"options": {"A": "x", "B": 2}}, "expected letters with texts"),
        ({"options": {"A": "x", "b": "y"}}, "the option 'b' is not a capital letter"),
        ({"options": {"A": "x", "BB": "y"}}, "the option 'BB' is not a capital letter"),
        ({"options": {"B": "x"}}, "has 1 option, expected at least 2"),
        ({"options": {}}, "has 0 option"),
        ({"context": 3}, "context is 3, expected text or null"),
        ({"image_ref": "no"}, "image_ref is 'no', expected true or false"),
        ({"id": "q0"}, "repeats the id 'q0'"),
    ],
)
def test_faults_are_named_with_file_and_line(tmp_path, change, said):
    """Every fault of a question stops with its line."""
    path = write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "id": "q0"}, {**GOOD, **change}])
    with pytest.raises(DataError) as caught:
        load_questions(path, None, 0)
    assert f"{path}:2" in str(caught.value) and said in str(caught.value)


def test_missing_fields_files_and_questions(tmp_path):
    """A missing field lists those there are; a missing or empty file is a DataError."""
    with pytest.raises(DataError, match=r"a\.jsonl:1: id is missing") as caught:
        load_questions(write_jsonl(tmp_path / "a.jsonl", [{"question": "x", "key": "y"}]), None, 0)
    assert "it has the fields question, key" in str(caught.value)
    with pytest.raises(DataError, match="holds no questions"):
        load_questions(write_jsonl(tmp_path / "b.jsonl", []), None, 0)
    with pytest.raises(DataError, match=r"did you mean a\.jsonl"):
        load_questions(str(tmp_path / "aa.jsonl"), None, 0)
    with pytest.raises(DataError, match="`embedded:questions`"):
        load_questions("embedded:rows", None, 0)
    (tmp_path / "c.csv").write_text("id\n")
    with pytest.raises(DataError, match=r"expected \.jsonl"):
        load_questions(str(tmp_path / "c.csv"), None, 0)


def test_a_question_without_a_choice_is_left_out_and_said(tmp_path, caplog):
    """Options that all read the same cannot be told apart: left out with a warning that names the line."""
    same = {**GOOD, "id": "q2", "options": {"A": "x  y", "B": "x y"}}
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, same])
    with caplog.at_level(logging.WARNING):
        assert ids(path, None) == ["q1"]
    assert f"{path}:2 is left out" in caplog.text


def test_repeated_questions_share_a_group(tmp_path):
    """The same text twice (another context is another text) gets one dup_group; a given group is kept and shared."""
    texts = [("a?", None), ("A? ", None), ("b?", "one"), ("b?", "two"), ("c?", None), ("c?", None)]
    records = [{**GOOD, "id": f"q{n}", "question": q, "context": c} for n, (q, c) in enumerate(texts)]
    records[5]["dup_group"] = "given"
    groups = [q.dup_group for q in load_questions(write_jsonl(tmp_path / "a.jsonl", records), None, 0)]
    assert groups == ["same:q0", "same:q0", None, None, "given", "given"]


def test_draws_are_nested_and_in_file_order(tmp_path):
    """Each draw is part of every larger one, has the size asked for and keeps the file's order."""
    path = write_jsonl(tmp_path / "a.jsonl", many(60))
    draws = [ids(path, n) for n in range(1, 61)]
    assert [len(draw) for draw in draws] == list(range(1, 61))
    for smaller, larger in pairwise(draws):
        assert set(smaller) < set(larger)
    assert draws[-1] == ids(path, None) == ids(path, 999) == [f"q{n}" for n in range(60)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 79), st.integers(0, 2**32))
def test_draws_keep_the_letters_in_proportion(tmp_path_factory, count, seed):
    """Each answer letter has its share of every draw, to within one question."""
    path = write_jsonl(tmp_path_factory.mktemp("q") / "a.jsonl", many(80))
    drawn = Counter(question.answer for question in load_questions(path, count, seed))
    for letter, share in {"A": 0.5, "B": 0.25, "C": 0.125, "D": 0.125}.items():
        assert abs(drawn[letter] - share * count) <= 1


def test_draws_depend_on_seed_and_not_on_order(tmp_path):
    """Another order gives the same questions, another seed others, and neither is simply the first ones."""
    records = many(80)
    path, turned = write_jsonl(tmp_path / "a.jsonl", records), write_jsonl(tmp_path / "b.jsonl", records[::-1])
    assert set(ids(path, 16, 5)) == set(ids(turned, 16, 5))
    assert set(ids(path, 16, 5)) != set(ids(path, 16, 6))
    assert set(ids(path, 16, 5)) != {f"q{n}" for n in range(16)}


def test_the_draw_is_pinned_across_versions(tmp_path):
    """The rule itself is frozen: a rerun after an update must ask the same questions."""
    assert ids(write_jsonl(tmp_path / "a.jsonl", many(40)), 4, 3407) == ["q33", "q35", "q36", "q39"]


def test_option_prompt_words():
    """Context, question, one line an option, and the one instruction, blank lines between."""
    question = Question("q", "t", "Which?", {"A": "one", "B": "two"}, "A", context="Abstract.\n\nMore.")
    assert option_prompt(question) == (
        "Abstract.\n\nMore.\n\nWhich?\n\nA. one\nB. two\n\nAnswer with the letter of the correct option."
    )
    plain = Question("q", "t", "Which?", {"A": "one", "B": "two"}, "A")
    assert option_prompt(plain).startswith("Which?\n\nA. one\n")


def test_embedded_questions_are_there():
    """The questions that ship with the package load; no pictures, no repeats, all four letters."""
    questions = load_questions("embedded:questions", None, 0)
    assert len(questions) > 30
    assert {q.task for q in questions} == {"questions"}
    assert {q.answer for q in questions} == set("ABCD")
    assert not any(q.dup_group or q.image_ref for q in questions)


@pytest.mark.parametrize(
    ("name", "count", "grouped"),
    [
        ("medqa-usmle-4opt-test", 1073, 0),
        ("medmcqa-validation", 2265, 41),
        ("pubmedqa-pqal-test", 425, 0),
        ("mmlu-pro-health-test", 743, 268),
        ("medxpertqa-text-test", 800, 0),
    ],
)
def test_real_benchmarks(name, count, grouped):
    """Every shared benchmark loads; MedMCQA loses one question whose four options are one text."""
    path = SHARED / "eval" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the shared data folder is not here")
    questions = load_questions(str(path), None, 0)
    assert len(questions) == count
    assert sum(q.dup_group is not None for q in questions) == grouped
    assert all(option_prompt(q).endswith("Answer with the letter of the correct option.") for q in questions)
