"""What the search for overlap finds, what it lets pass, and how often it is wrong on real texts.

Verdicts in overlap_labels.jsonl were given by reading both texts of near pairs: "same" where the row asks the same
question in other words (or the same case with other numbers), "other" where only the subject is shared. The texts
themselves are in the shared data folder.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_prompt import SHARED, row

from deepdoctor.data import overlap
from deepdoctor.data.overlap import find_overlap, words_cut
from deepdoctor.data.overlap_score import GRAM, Vocabulary, plain_text
from deepdoctor.data.questions import load_questions
from deepdoctor.data.rows import Question, Row
from deepdoctor.data.sources import load_rows
from deepdoctor.recipe import DataSection

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
TASKS = (
    "medmcqa-validation",
    "medqa-usmle-4opt-test",
    "medxpertqa-text-test",
    "mmlu-pro-health-test",
    "pubmedqa-pqal-test",
)
MEDMCQA, MEDQA, MEDXPERT, MMLU, PUBMEDQA = TASKS
O1, EXPLANATIONS, ABSTRACTS = (
    "medical-o1-sft-sample",
    "train-derived/medmcqa-explanations",
    "train-derived/pubmedqa-long-answers",
)
LEAKS = {
    ("medmcqa-val-bc8e9ed4-81fd-4c8e-9381-ae6c4d193066", 113),
    ("medmcqa-val-da529e73-61fe-4b52-81b1-8686b6a62ffd", 114),
    ("medmcqa-val-b5135682-e700-4fda-a6b2-39b289c3cc41", 137),
    ("medxpertqa-Text-1214", 0),
    ("medxpertqa-Text-2202", 7),
}
"""The five questions known to stand behind rows of the medical-o1 sample: three word for word, two as rewrites."""
STEM = "A sailor from Murmansk has gingival bleeding and corkscrew hairs; which vitamin is lacking?"
OPTIONS = {"A": "Thiamine", "B": "Ascorbic acid", "C": "Retinol", "D": "Cobalamin"}
SCURVY = Question("q1", "made", STEM, OPTIONS, "B")


@pytest.fixture(scope="module")
def questions() -> dict[str, list[Question]]:
    """Return the shared benchmarks."""
    return {task: load_questions(str(SHARED / "eval" / f"{task}.jsonl"), None, 0) for task in TASKS}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    """Return the shared training rows."""
    return {
        name: load_rows(DataSection(source=str(SHARED / f"{name}.jsonl"))) for name in (O1, EXPLANATIONS, ABSTRACTS)
    }


@pytest.fixture(scope="module")
def sources() -> list[Question]:
    """Return the exam questions from which the rows of the medical-o1 sample were made; id: the row."""
    lines = (SHARED / f"{O1}.verifiable.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for record in map(json.loads, lines):
        texts = record["options"]
        texts = texts if isinstance(texts, dict) else dict(zip("ABCDEFGHIJ", texts, strict=False))
        key = next((letter for letter, text in texts.items() if text == record["answer"]), "")
        found.append(Question(str(record["row"]), "sources", record["mcq_question"], texts, key))
    return found


def as_rows(questions: list[Question]) -> list[Row]:
    """Turn questions into rows, as if they had been trained on."""
    return [
        Row(n, q.id, "\n".join(filter(None, (q.context, q.question))), "", q.options[q.answer])
        for n, q in enumerate(questions)
    ]


def labels(row_source: str, question_source: str) -> dict[tuple[str, str], str]:
    """Return the verdicts whose row and question ids begin so, by (question id, row)."""
    path = Path(__file__).with_name("overlap_labels.jsonl")
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {
        (label["question"], label["row"]): label["verdict"]
        for label in records
        if label["row"].startswith(row_source) and label["question"].startswith(question_source)
    }


def found(report) -> set[tuple[str, int]]:
    """Return (question id, row) of every pair that made a suspect."""
    return {(result.id, row) for result in report.results for row in result.suspect_rows}


def one(*rows: Row, question: Question = SCURVY):
    """Search one question; return its verdict."""
    return find_overlap(rows, [question]).results[0]


def others(count: int) -> list[Row]:
    """Return rows that have nothing to do with the question."""
    return [
        row(f"Is bone {n} of the fish fauna {n * 7} older than layer {n * 3}?", index=100 + n) for n in range(count)
    ]


def test_a_copy_is_exact():
    """Case, punctuation, spacing, Unicode form and options written out do not hide a copy."""
    copies = [
        STEM.upper().replace(";", " -- "),
        STEM.replace("A sailor", "Ａ ｓａｉｌｏｒ\n"),
        STEM + "\n" + "\n".join(f"{letter}. {text}" for letter, text in OPTIONS.items()),
        STEM + " " + "; ".join(OPTIONS.values()),
    ]
    result = one(*others(3), *(row(copy, index=n) for n, copy in enumerate(copies)))
    assert (result.method, result.score, result.suspect, result.suspect_rows) == ("exact", 1.0, True, (0, 1, 2, 3))


def test_a_rewording_is_found_by_its_words():
    """Another order, other forms of the words and a dropped clause leave the rare words."""
    text = "Which vitamin does a sailor lack who has corkscrew hair, bleeds from the gingiva and lives in Murmansk?"
    result = one(*others(3), row(text))
    assert (result.method, result.suspect, result.row) == ("words", True, 0)


@pytest.mark.parametrize("field", ["reasoning", "answer"])
def test_a_copy_inside_another_text_is_found_by_its_ngrams(field):
    """A question quoted in the middle of the reasoning or answer is found, and the report says where."""
    quoted = "Let me see. I was once asked this: " + STEM + " That was long ago."
    report = find_overlap([*others(3), replace(row("Tell me a story."), **{field: quoted})], [SCURVY])
    pair = next(pair for pair in report.near if pair.method == "ngrams")
    assert (pair.row, pair.field, pair.row_text, pair.suspect) == (0, field, quoted, True)
    assert report.results[0].method == "ngrams"


def test_options_and_context_leak_too():
    """Options copied without their question, and an abstract copied without its question, are suspect."""
    long = {letter: f"{text} deficiency of the northern seafaring sort" for letter, text in OPTIONS.items()}
    asked = replace(SCURVY, question="Which is true?", options=long)
    assert one(row("Choose.", reasoning=" or ".join(long.values())), *others(3), question=asked).suspect
    context = " ".join(f"finding{n} of trial{n * 3} was {n}.5" for n in range(30))
    asked = Question("q", "made", "Is it so?", {"A": "yes", "B": "no"}, "A", context=context)
    assert one(row("Summarise: " + context), *others(3), question=asked).suspect


def test_general_questions_are_no_copies():
    """A question without rare words is a copy only with its options; one rare word alone makes no suspect by words."""
    asked = Question("q", "made", "Which of the following is true?", OPTIONS, "B")
    assert not one(row("Which of the following is true?"), *others(5), question=asked).suspect
    assert one(row(asked.question + " ".join(OPTIONS.values())), question=asked).suspect
    single = Question("q", "made", "Kwashiorkor is?", OPTIONS, "B")
    assert not one(row("Describe the children with kwashiorkor in Ghana."), *others(5), question=single).suspect
    assert one(row("Kwashiorkor is"), *others(5), question=single).method == "exact"


def test_the_right_option_in_the_answer_adds_to_the_score():
    """A row that also gives the key is nearer; a key of yes or no says nothing."""
    text = "Which vitamin does a sailor from Norway lack?"
    plain, told = (one(*others(3), row(text, answer=answer)).score for answer in ("Fish.", "It is ascorbic acid."))
    assert told == pytest.approx(plain + overlap.KEY_BONUS, abs=1e-3)
    asked = replace(SCURVY, options={"A": "yes", "B": "no"}, answer="A")
    assert one(*others(3), row(text, answer="Yes."), question=asked).score == plain


def test_chinese_is_compared_by_characters():
    """Text without spaces is found as a copy, reworded and quoted; an unrelated question is not."""
    stem = "患者男性，45岁，突发胸痛伴大汗两小时，心电图示下壁导联抬高，最可能的诊断是什么？"
    asked = Question("q", "made", stem, {"A": "心肌梗死", "B": "肺栓塞"}, "A")
    assert one(row(stem.replace("，", ",")), question=asked).method == "exact"
    reworded = "45岁男性患者，大汗、突发胸痛两小时，下壁导联抬高见于心电图，诊断是什么？"
    assert one(row(reworded), *others(3), question=asked).suspect
    assert one(row("讲故事", reasoning="他说：" + stem), *others(3), question=asked).suspect
    assert not one(row("小儿发热三天，咽部充血，应首选哪种药物治疗？"), *others(3), question=asked).suspect


def test_an_instruction_that_opens_every_row_says_nothing():
    """Boilerplate shared by all rows makes no suspect and hides no leak."""
    opening = "You are a medical expert with advanced knowledge in clinical reasoning. Please answer: "
    asked = Question("q", "made", "Is a medical expert with advanced knowledge of reasoning a clinician?", OPTIONS, "B")
    boiler = [replace(other, question=opening + other.question) for other in others(20)]
    assert not one(*boiler, question=asked).suspect
    assert one(*boiler, row(opening + STEM)).suspect_rows == (0,)


def test_every_copy_among_the_rows_is_named():
    """Repeated rows are all suspect, and repetition does not make their words common."""
    copies = [
        row("Sailors of Murmansk with gingival bleeding, corkscrew hair: what vitamin?", index=n) for n in range(30)
    ]
    report = find_overlap([*copies, *others(5)], [SCURVY])
    assert report.suspect_rows() == set(range(30))
    assert report.results[0].row == 0


def test_empty_sets_and_texts_give_empty_verdicts():
    """No rows, no questions, and texts without a word are not errors and not suspect."""
    assert find_overlap([], []).results == ()
    assert find_overlap([row()], []).suspects() == set()
    nothing = one()
    assert (nothing.row, nothing.method, nothing.score, nothing.suspect) == (None, None, 0.0, False)
    empty = Question("q", "made", " ", {}, "")
    assert not any(r.suspect for r in find_overlap([row("", "", ""), row("?!", "", "")], [empty, SCURVY]).results)


def test_the_report_is_plain_json():
    """to_json survives a round trip and agrees with the report's own counts."""
    asked = [SCURVY, replace(SCURVY, id="q2", question="How old is layer 9 of the moon?")]
    report = find_overlap([row(STEM), *others(3)], asked)
    told = json.loads(json.dumps(report.to_json()))
    assert (told["format"], told["version"], told["rows"], told["questions"], told["suspects"]) == (
        1,
        overlap.RULE_VERSION,
        4,
        2,
        1,
    )
    assert report.suspects() == {("made", "q1")}
    assert told["totals"] == {"made": {"questions": 2, "suspect": 1, "exact": 1, "words": 1, "ngrams": 1}}
    assert set(told["blind"]) == {*report.cuts, "meaning"}
    assert {pair["method"] for pair in told["near"]} == set(report.cuts)


def test_words_lose_form_and_function():
    """Endings, function words, option letters and thousands separators are no difference."""
    vocabulary = Vocabulary()
    one, two = vocabulary.encode("The sailors of 6,500 patients: A. 37.8 °C"), vocabulary.encode("sailor 6500 37.8")
    assert one.tolist() == two.tolist() == [0, 1, 2]
    assert plain_text("  ﬁne — “Text”\n") == "fine text"
    assert len(vocabulary.encode("肺炎球菌")) == 3 and len(vocabulary.encode("")) == 0


def test_the_cut_rises_with_the_rows():
    """0.42 up to 2,000 rows, then 0.03 more with each doubling."""
    assert [words_cut(count) for count in (0, 138, 2000, 4000, 8000, 20_000)] == [0.42, 0.42, 0.42, 0.45, 0.48, 0.52]


@needs_shared
def test_the_known_leaks_of_medical_o1_are_found(rows, questions):
    """All five from the released texts among 5,306 questions; false suspects are at most 0.2 %."""
    every = [question for task in TASKS for question in questions[task]]
    report = find_overlap(rows[O1], every)
    assert found(report) >= LEAKS
    assert len(report.suspects()) <= 5 + 0.002 * len(every)


@needs_shared
def test_the_known_leaks_are_plain_in_the_source_questions(rows, questions, sources):
    """With the exam questions behind the rows three leaks are exact, all five are far above the cut."""
    every = [question for task in TASKS for question in questions[task]]
    exams = [replace(row, question=source.question) for row, source in zip(rows[O1], sources, strict=True)]
    report = find_overlap(exams, every)
    best = {(result.id, result.row): result for result in report.results}
    assert [best[leak].method for leak in sorted(LEAKS)] == ["exact"] * 3 + ["words"] * 2
    assert all(best[leak].score > 0.65 for leak in LEAKS)


@needs_shared
@pytest.mark.parametrize(("cut", "least"), [(None, 0.92), (0.52, 0.87)])
def test_open_forms_of_exam_questions_are_found(rows, sources, monkeypatch, cut, least):
    """Of 138 exam questions 92 % are found in the open questions made from them, 87 % at the cut for 20,000 rows."""
    if cut:
        monkeypatch.setattr(overlap, "words_cut", lambda count: cut)
    report = find_overlap([*rows[O1], *(replace(r, index=-1) for r in rows[EXPLANATIONS] + rows[ABSTRACTS])], sources)
    own = {(source.id, int(source.id)) for source in sources}
    assert len(found(report) & own) >= least * len(own)


@needs_shared
def test_rewritten_vignettes_are_found(questions):
    """MedXpertQA against MedQA's test set: of 30 suspects 26 are rewrites, as read by eye, and stay suspect."""
    verdicts = labels("medqa", "medxpertqa")
    exams = as_rows(questions[MEDQA])
    pairs = {(id, exams[row].place) for id, row in found(find_overlap(exams, questions[MEDXPERT]))}
    assert {pair for pair, verdict in verdicts.items() if verdict == "same"} <= pairs
    assert Counter(verdicts.get(pair, "unread") for pair in pairs)["same"] >= 26
    assert len(pairs) <= 31


@needs_shared
def test_unrelated_texts_are_seldom_suspect(rows, questions):
    """Questions against rows and questions of other origin (3,600 to 6,900 texts): under 0.7 % are suspect."""
    same_origin = {
        MEDMCQA: {MEDMCQA, EXPLANATIONS},
        MEDQA: {MEDQA, MEDXPERT},
        MEDXPERT: {MEDQA, MEDXPERT},
        MMLU: {MMLU},
        PUBMEDQA: {PUBMEDQA, ABSTRACTS},
    }
    texts = rows | {task: as_rows(questions[task]) for task in TASKS}
    suspects = {
        id
        for task in TASKS
        for _, id in find_overlap(
            [row for name, source in texts.items() if name not in same_origin[task] for row in source], questions[task]
        ).suspects()
    }
    total = sum(map(len, questions.values()))
    assert len(suspects - {id for id, _ in LEAKS}) < 0.007 * total


@needs_shared
def test_short_questions_of_one_origin_are_half_right(rows, questions):
    """MedMCQA explanations against MedMCQA questions: of 81 suspects nearly half ask the same, as read by eye."""
    verdicts = labels(EXPLANATIONS, "medmcqa")
    report = find_overlap(rows[EXPLANATIONS], questions[MEDMCQA])
    pairs = {(id, f"{EXPLANATIONS}:{row}") for id, row in found(report)}
    same = {pair for pair, verdict in verdicts.items() if verdict == "same"}
    assert len(same & pairs) >= 36
    assert len({id for id, _ in same & pairs}) >= 0.4 * len(report.suspects())
    assert GRAM == 4 and report.cuts["ngrams"] == 0.20, "measured with these"
