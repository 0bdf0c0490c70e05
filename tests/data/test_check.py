"""What the check drops, keeps and proves."""

import json
from dataclasses import replace

import pytest
from helpers_prompt import SHARED, byte_prompt, byte_tokenizer, row
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdoctor.data.check import Lengths, check_rows
from deepdoctor.data.prompt import Prompt
from deepdoctor.data.sources import load_rows
from deepdoctor.errors import DataError
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.recipe import DataSection


def check(*rows, prompt=None, **settings):
    """Check rows in R1's format, with other settings where named."""
    return check_rows(rows, prompt or byte_prompt(), DataSection(source="rows.jsonl", **settings))


def found(report):
    """Return (code, index, action) of every finding."""
    return [(f.code, f.index, f.action) for f in report.findings]


def test_whole_rows_pass():
    """Sound rows, CJK and emoji among them, are kept in order with their tokens and nothing is found."""
    rows = [row("发热三天？", "先看血象。\u2028🩺", "流感。"), row("é" * 40, index=1)]
    kept, report = check(*rows)
    assert [r for r, _ in kept] == rows
    assert (report.findings, report.rows_read, report.rows_kept) == ((), 2, 2)


@pytest.mark.parametrize("field", ["question", "reasoning", "answer"])
def test_empty_fields_are_dropped(field):
    """A text of white space alone counts as empty, and the finding names it."""
    kept, report = check(row(), replace(row(index=1), **{field: " \n\t"}))
    assert len(kept) == 1
    assert found(report) == [("empty_field", 1, "dropped")]
    assert report.findings[0].detail == field


@pytest.mark.parametrize(
    "text", ["<｜end▁of▁sentence｜>", "<｜User｜>", "<think>", "</think>", "</ Think>", "</THINK >"]
)
@pytest.mark.parametrize("field", ["question", "reasoning", "answer"])
def test_control_tokens_are_dropped(field, text):
    """Text that would become a control token, or ends the thinking early, drops the row from any of its fields."""
    kept, report = check(row(), replace(row(index=1), **{field: f"before {text} after"}))
    assert len(kept) == 1
    assert report.findings[0].code == "control_tokens"
    assert report.findings[0].detail == f"{text} in {field}"


def test_angle_brackets_are_no_control_tokens():
    """Ordinary comparisons and tags stay."""
    assert len(check(row(answer="Na < 120 and K > 5, <b>think</b> about it"))[0]) == 1


def test_added_tokens_of_white_space_are_ordinary_text():
    """Vocabularies that add runs of spaces as tokens do not lose every row that has two spaces."""
    prompt = Prompt(byte_tokenizer("  ", "<|pause|>"))
    kept, report = check(row(answer="Two  spaces."), row(answer="a <|pause|> b", index=1), prompt=prompt)
    assert [r.index for r, _ in kept] == [0]
    assert report.findings[0].detail == "<|pause|> in answer"


def test_duplicates_are_dropped_and_the_first_stays():
    """Copies that differ in case and white space only are dropped, or kept and named where the recipe says so."""
    rows = row("What is it?"), row(" what  IS\nit?", index=1), row("Another?", index=2)
    kept, report = check(*rows)
    assert [r.index for r, _ in kept] == [0, 2]
    assert found(report) == [("duplicate", 1, "dropped")]
    assert report.findings[0].detail == "first in rows.jsonl:1"
    kept, report = check(*rows, duplicates="keep")
    assert len(kept) == 3
    assert found(report) == [("duplicate", 1, "kept")]


def test_repeated_questions_are_kept_and_named():
    """The same question with another answer is a warning; a copy of either is a duplicate."""
    rows = row(), row(answer="That.", index=1), row(answer="that. ", index=2)
    _, report = check(*rows)
    assert found(report) == [("duplicate_question", 1, "kept"), ("duplicate", 2, "dropped")]


def test_missing_pictures_are_dropped_or_kept():
    """A question that points at a picture goes, unless the recipe keeps it; what the reasoning claims is quoted."""
    pointing = row("What does the ECG shown below suggest?", "Looking at the image, I see ST elevation.", index=1)
    kept, report = check(row(), pointing)
    assert len(kept) == 1
    assert found(report) == [("missing_image", 1, "dropped")]
    assert "Looking at the image" in report.findings[0].detail
    kept, report = check(row(), pointing, missing_image="keep")
    assert len(kept) == 2
    assert found(report) == [("missing_image", 1, "kept")]
    _, report = check(row(reasoning="In this diagram the curve is steep."))
    assert found(report) == [("picture_in_reasoning", 0, "kept")]


def length(**texts):
    """Return the token spans of one row in R1's format."""
    return byte_prompt().encode_row(row(**texts))


def test_long_rows_are_dropped_at_the_exact_limit():
    """A row of N tokens passes at max_seq_len N and is dropped at N - 1, never cut."""
    tokens = len(length().input_ids)
    kept, report = check(row(), max_seq_len=tokens)
    assert len(kept[0][1].input_ids) == tokens
    assert report.longest_row == tokens
    _, report = check(row(answer="x"), row(index=1), max_seq_len=tokens - 1)
    assert found(report) == [("too_long", 1, "dropped")]
    assert report.longest_row == tokens
    assert f"max_seq_len {tokens} would drop no row" in " ".join(report.summary_lines())


@pytest.mark.parametrize(
    ("limit_of", "where"),
    [
        (lambda e: e.reasoning[0], "in the question, and lose reasoning and answer"),
        (lambda e: e.reasoning[0] + 1, "in the reasoning, and lose the whole answer"),
        (lambda e: e.answer[0], "after the reasoning, and lose the whole answer"),
        (lambda e: e.answer[0] + 1, "in the answer, and lose EOS"),
        (lambda e: len(e.input_ids) - 1, "after the answer, and lose EOS"),
    ],
)
def test_the_report_says_what_a_cut_would_cost(limit_of, where):
    """Tokens over the limit and the place of the cut are given, for every part it can fall in."""
    long = {"question": "q" * 50, "reasoning": "r" * 50, "answer": "a" * 50}
    encoded = length(**long)
    limit, tokens = limit_of(encoded), len(encoded.input_ids)
    _, report = check(row("q", "r", "a"), row(**long, index=1), max_seq_len=limit)
    assert report.findings[0].detail == (
        f"{tokens} tokens, {tokens - limit} over max_seq_len {limit}; a cut would fall {where}"
    )


def test_too_long_can_stop_the_run():
    """With too_long: error the first long row is named with the length that would do."""
    tokens = len(length().input_ids)
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is too long") as caught:
        check(row(answer="x"), row(index=1), max_seq_len=tokens - 1, too_long="error")
    assert f"--data.max_seq_len {tokens}" in str(caught.value)


def test_nothing_left_says_why():
    """When every row is dropped, the counts by reason and the remedy of the commonest stand in the message."""
    rows = row(answer=""), row(answer=" ", index=1), row("<think>", index=2)
    with pytest.raises(DataError) as caught:
        check(*rows)
    said = "none of the 3 rows of rows.jsonl can be used: 2 empty_field (a text is empty), 1 control_tokens"
    assert said in str(caught.value)
    assert "--data.answer" in str(caught.value)
    with pytest.raises(DataError, match=f"max_seq_len {len(length().input_ids)}"):
        check(row(), max_seq_len=5)
    with pytest.raises(DataError, match="none of the 0 rows"):
        check()


@pytest.mark.parametrize("train_on", ["reasoning_and_answer", "answer", "all"])
@pytest.mark.parametrize("template", ["native", "tutorial"])
def test_built_in_templates_keep_their_promises(template, train_on):
    """Every mask rule of every template passes the verification, and label_tokens counts what trains."""
    rows = [row(), row("发热?", "先\n看。", "流感🩺", index=1)]
    kept, report = check(*rows, prompt=byte_prompt(template=template, train_on=train_on), train_on=train_on)
    assert report.label_tokens == sum(label != IGNORE_INDEX for _, e in kept for label in e.labels) > 0
    parts = report.lengths
    assert parts["row"].total == parts["prompt"].total + parts["reasoning"].total + parts["answer"].total
    expected = {
        "all": parts["row"].total,
        "reasoning_and_answer": parts["reasoning"].total + parts["answer"].total,
        "answer": parts["answer"].total,
    }
    assert report.label_tokens == expected[train_on]


class Faulty:
    """A real prompt whose encoding is damaged on purpose."""

    def __init__(self, damage):
        self.inner, self.damage = byte_prompt(), damage
        self.tokenizer, self.bos_id, self.eos_id = self.inner.tokenizer, self.inner.bos_id, self.inner.eos_id
        self.prompt_ids = self.inner.prompt_ids

    def encode_row(self, row):
        """Encode, then damage."""
        encoded = self.inner.encode_row(row)
        return self.damage(encoded) or encoded


def set_labels(encoded, start, end, value):
    """Give positions start to end the label ``value``, or their token where it is None."""
    for n in range(*slice(start, end).indices(len(encoded.labels))):
        encoded.labels[n] = encoded.input_ids[n] if value is None else value


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda e: set_labels(e, -1, None, IGNORE_INDEX), "last token is not a learnt EOS"),
        (lambda e: replace(e, input_ids=[*e.input_ids[:-1], 5], labels=[*e.labels[:-1], 5]), "not a learnt EOS"),
        (lambda e: e.input_ids.__setitem__(1, e.input_ids[0]), "not exactly one BOS"),
        (lambda e: e.input_ids.__setitem__(0, 5), "not exactly one BOS"),
        (lambda e: e.input_ids.__setitem__(4, 5), "not the prompt that is asked"),
        (lambda e: set_labels(e, 3, 4, None), "prompt is not masked"),
        (lambda e: set_labels(e, e.reasoning[0], e.reasoning[0] + 1, IGNORE_INDEX), "reasoning is not masked as"),
        (lambda e: set_labels(e, e.answer[0], e.answer[0] + 1, IGNORE_INDEX), "answer does not train"),
        (lambda e: set_labels(e, e.answer[0], e.answer[0] + 1, 3), "answer does not train"),
        (lambda e: replace(e, labels=e.labels[1:]), "labels do not match"),
        (lambda e: replace(e, answer=(e.answer[0], e.answer[1] - 1)), "do not follow one another"),
        (lambda e: replace(e, reasoning=(e.reasoning[0], e.answer[0] - 1)), "do not follow one another"),
    ],
)
def test_broken_promises_stop_the_run(damage, said):
    """Each promise of the template, broken alone, is named with the row."""
    with pytest.raises(DataError, match=r"rows\.jsonl:1: with this template") as caught:
        check(row(), prompt=Faulty(damage))
    assert said in str(caught.value)


def test_a_template_that_writes_bos_twice_is_refused(tmp_path):
    """The classic double BOS of a chat template, from a user's own Jinja file."""
    path = tmp_path / "twice.jinja"
    path.write_text("{{ bos_token }}{{ bos_token }}{{ messages[-1].content }}<think>\n")
    with pytest.raises(DataError, match="not exactly one BOS"):
        check(row(), prompt=byte_prompt(template=str(path)))


def test_report_is_stable_json():
    """check.json has the documented keys, survives a round trip, and its counts agree with its findings."""
    _, report = check(row(), row(index=1), row(answer="", index=2), row(answer="Other.", index=3))
    written = json.loads(json.dumps(report.to_json()))
    assert list(written) == [
        "format", "source", "rows_read", "rows_kept", "rows_dropped", "max_seq_len", "longest_row", "train_on",
        "label_tokens", "tokens", "counts", "findings", "openings",
    ]  # fmt: skip
    assert written["counts"] == {
        "empty_field": {"dropped": 1, "kept": 0},
        "duplicate": {"dropped": 1, "kept": 0},
        "duplicate_question": {"dropped": 0, "kept": 1},
    }
    assert (written["rows_read"], written["rows_kept"], written["rows_dropped"]) == (4, 2, 2)
    assert list(written["tokens"]["row"]) == ["p50", "p90", "p95", "p99", "max", "total"]
    assert written["findings"][0] == {
        "code": "duplicate",
        "index": 1,
        "place": "rows.jsonl:2",
        "action": "dropped",
        "detail": "first in rows.jsonl:1",
    }


def test_summary_is_short_and_plain():
    """One sentence a fact, at most three places each."""
    _, report = check(row(), *(row(answer="", index=n) for n in range(1, 6)))
    lines = report.summary_lines()
    assert lines[0] == "6 rows read, 1 kept, 5 dropped."
    assert lines[1] == "5 dropped: a text is empty (at 2, 3, 4 and 2 more)."
    assert len(lines) == 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_percentiles_are_nearest_ranks(lengths):
    """pN is a length that occurs, reached by at least N % of the rows, and no smaller one is."""
    summary = Lengths.of(lengths)
    for share, value in ((50, summary.p50), (90, summary.p90), (95, summary.p95), (99, summary.p99)):
        assert value in lengths
        assert 100 * sum(n <= value for n in lengths) >= share * len(lengths)
        assert 100 * sum(n < value for n in lengths) < share * len(lengths)
    assert (summary.max, summary.total) == (max(lengths), sum(lengths))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.text(max_size=12)] * 3), min_size=1, max_size=8))
def test_any_text_is_either_kept_whole_or_reported(texts):
    """Whatever the texts, each row is kept or has exactly one finding that dropped it, and kept text decodes back."""
    rows = [row(q, r, a, index=n) for n, (q, r, a) in enumerate([("x", "y", "z"), *texts])]
    prompt = byte_prompt()
    kept, report = check(*rows, prompt=prompt)
    dropped = [f.index for f in report.findings if f.action == "dropped"]
    assert sorted([r.index for r, _ in kept] + dropped) == list(range(len(rows)))
    for kept_row, encoded in kept:
        assert prompt.tokenizer.decode(encoded.input_ids[slice(*encoded.answer)], True) == kept_row.answer.strip()


def test_a_huge_row_is_dropped_not_fatal():
    """A row of 200,000 tokens among others is named and left out."""
    kept, report = check(row(), row(reasoning="very long " * 20_000, index=1))
    assert len(kept) == 1
    assert report.findings[0].detail.startswith("200,0")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
def test_real_rows():
    """138 real rows: two lean on a missing diagram, one is asked twice, the rest pass every verification."""
    source = str(SHARED / "medical-o1-sft-sample.jsonl")
    section = DataSection(source=source, max_seq_len=8192)
    kept, report = check_rows(load_rows(section), byte_prompt(), section)
    assert len(kept) == 136
    assert found(report) == [
        ("missing_image", 47, "dropped"),
        ("missing_image", 72, "dropped"),
        ("near_duplicate", 133, "kept"),
    ]


def test_embedded_rows_pass():
    """Nothing is dropped from the rows that ship with the package."""
    section = DataSection(source="embedded:rows", max_seq_len=8192)
    rows = load_rows(section)
    kept, report = check_rows(rows, byte_prompt(), section)
    assert len(kept) == len(rows)
    assert report.findings == ()


DOUBTFUL = {"answer": "It is <br> this."}


def test_doubtful_rows_are_kept_unless_the_recipe_drops_them():
    """A finding in the texts keeps its row and is named; ``drop`` takes the row out for that reason alone."""
    rows = row(), replace(row("Another?", index=1), **DOUBTFUL)
    kept, report = check(*rows)
    assert (len(kept), found(report)) == (2, [("markup", 1, "kept")])
    assert "1 kept, `markup`: a text holds HTML or a stray code fence (at 2)." in report.summary_lines()
    kept, report = check(*rows, drop=("markup", "injection"))
    assert (len(kept), found(report)) == (1, [("markup", 1, "dropped")])


def test_a_dropped_row_is_named_once():
    """A row that goes for one reason is not counted as kept for another."""
    rows = row(), replace(row("Another?", index=1), reasoning="r" * 500, **DOUBTFUL)
    _, report = check(*rows, max_seq_len=200)
    assert found(report) == [("too_long", 1, "dropped")]


ASKED = "A 61-year-old woman with involuntary urine loss during coughing has a positive Q-tip test. What is it?"


def test_near_duplicates_are_kept_or_dropped():
    """The second of two rows that ask nearly the same is named with the first; a dropped row stands for none."""
    rows = row(ASKED), row(f"{ASKED} Explain.", index=1), row(f"{ASKED} Think.", index=2)
    kept, report = check(*rows)
    assert (len(kept), found(report)) == (3, [("near_duplicate", 1, "kept"), ("near_duplicate", 2, "kept")])
    assert report.findings[1].detail.startswith("like rows.jsonl:1, likeness of the questions 0.")
    kept, report = check(*rows, drop=("near_duplicate",))
    assert [r.index for r, _ in kept] == [0]
    empty_first = replace(rows[0], answer=""), *rows[1:]
    _, report = check(*empty_first)
    assert found(report) == [("empty_field", 0, "dropped"), ("near_duplicate", 2, "kept")]


def test_repeated_questions_can_be_dropped():
    """``drop`` works on what was only reported before, and a copy is still a duplicate first."""
    rows = row(), row(answer="That.", index=1), row(answer="that. ", index=2), row(index=3)
    kept, report = check(*rows, drop=("duplicate_question", "near_duplicate"))
    assert len(kept) == 1
    assert [code for code, _, _ in found(report)] == ["duplicate_question", "duplicate_question", "duplicate"]


def test_nothing_left_by_drop_says_so():
    """Where ``drop`` takes the last row, the message names the finding to take out of it."""
    with pytest.raises(DataError, match="1 markup") as caught:
        check(row(**DOUBTFUL), drop=("markup",))
    assert "take `markup` out of data.drop" in str(caught.value)


def test_uniform_openings_are_reported():
    """Reasonings that all begin alike are a finding, and the summary names the commonest first words."""
    rows = [row(f"Question {n}?", "Okay, let us think about this one.", index=n) for n in range(24)]
    _, report = check(*rows)
    assert report.counts()["uniform_opening"] == {"dropped": 0, "kept": 24}
    assert "100% of the reasonings begin with 'okay let us'." in report.summary_lines()
    assert report.to_json()["openings"] == [{"words": "okay let us", "rows": 24, "share": 1.0}]
