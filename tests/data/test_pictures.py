"""Questions that need a picture are found; findings told in words are left alone. Real questions were read by eye."""

import json
import time

import pytest
from helpers_prompt import SHARED

from deepdoctor.data.pictures import picture_in_reasoning, picture_reference

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")

POINTING = [
    "When the tooth represented by [img=~/QImg/2011-10-12-16-46-44/image068.jpg] is tilted, why no bridge?",
    "Based on the CT imaging provided, what is the most likely diagnosis?",
    "Definitive treatment for the condition shown in radiograph below is?",
    "The instrument shown in fig is used for",
    "A photograph of the rash is shown. Which drug caused it?",
    "His chest X-ray is normal and ECG is shown in the picture. What is the optimal therapy?",
    "An MRI of the brain with contrast is shown in the exhibit (see image).",
    "X - ray bilateral knee was done and is shown below. Which is most likely?",
    "What does the following ECG show?",
    "Identify the structure labeled in the diagram.",
    "Name the structure marked with arrow",
    "What is the name of the given instrument, used for harvesting the graft?",
    "A CT scan of the abdomen of a patient with the same condition is shown. What is the next step?",
    "What is the best management of the case shown?",
    "Based on the image, what is the diagnosis?",
    "Refer to the accompanying photograph. What is seen?",
    "如图所示，最可能的诊断是什么？",
]
TOLD = [
    "An x-ray shows a fracture of the distal radius. What is the next step?",
    "Imaging reveals a 3 cm mass. What is the most likely diagnosis?",
    "A chest X-ray shown to have bilateral infiltrates was followed by a CT scan. Which drug is given?",
    "What is the most likely explanation for the acid-base imbalance shown in the arterial blood gas analysis?",
    "Which of the following ECG findings are most likely in this patient?",
    "Laboratory values are shown below. Na+ 128 mEq/L, K+ 5.9 mEq/L. What is the diagnosis?",
    "Laboratory studies are shown. Hemoglobin 9 g/dL. What is next?",
    "She exhibits a fine tremor and photophobia. The liver is palpable 3 cm below the costal margin.",
    "Which of the following images best treats anxiety about body image?",
    "Which drug has been shown to reduce mortality in heart failure?",
    "Does this clinical picture fit sarcoidosis? The biopsy demonstrated mitotic figures.",
    "Which imaging modality provided the best yield? Is imaging provided by the state?",
    "A figure-of-eight bandage was applied. Which nerve is at risk?",
    "Which of the following groups of fibres are not attached to alveolar bone?",
    "At what angle is the central ray directed when taking a bitewing film for a clear image?",
    "患者心电图示ST段抬高，最可能的诊断是什么？",
]


@pytest.mark.parametrize("question", POINTING)
def test_pointing_is_found(question):
    """Each of these cannot be answered without its picture; the words returned stand in the question."""
    assert picture_reference(question) in question


@pytest.mark.parametrize("question", TOLD)
def test_told_in_words_passes(question):
    """Each of these can be answered from its words."""
    assert picture_reference(question) is None


def test_reasoning_that_looks():
    """A chain of thought that claims to see the picture is quoted; figures of speech are not."""
    assert picture_in_reasoning("Let's start by taking a good look at the CT images. I've spotted a mass.")
    assert picture_in_reasoning("So which box in this diagram shows polycythemia?")
    for idle in ("Let me figure this out from the bigger picture.", "The X-ray shows fluid, as I can picture it."):
        assert picture_in_reasoning(idle) is None


def read(name, field):
    """Return one field of every record of a shared file."""
    return [json.loads(line)[field] for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]


@needs_shared
def test_withdrawn_rows_are_all_found():
    """Both rows that upstream withdrew for their missing picture are flagged."""
    assert all(map(picture_reference, read("medical-o1-sft-upstream-removed.jsonl", "Question")))


@needs_shared
def test_real_rows_are_flagged_only_where_a_diagram_is_missing():
    """Of 138 medical-o1 questions two lean on a diagram (read by eye): the labeled box, the lung volume graph."""
    questions = read("medical-o1-sft-sample.jsonl", "Question")
    assert [n for n, question in enumerate(questions) if picture_reference(question)] == [47, 72]
    thoughts = read("medical-o1-sft-sample.jsonl", "Complex_CoT")
    assert [n for n, thought in enumerate(thoughts) if picture_in_reasoning(thought)] == [47]


@needs_shared
def test_benchmarks_without_pictures_stay_clean():
    """MMLU-Pro health has no pictures: no flag. MedXpertQA Text has one question about a video: one flag."""
    assert not any(map(picture_reference, read("eval/mmlu-pro-health-test.jsonl", "question")))
    assert sum(map(bool, map(picture_reference, read("eval/medxpertqa-text-test.jsonl", "question")))) == 1


@needs_shared
def test_medqa_pictures_are_found():
    """Every MedQA question that shows or names a photograph or image is flagged; 95 flags, all right by eye."""
    questions = read("eval/medqa-usmle-4opt-test.jsonl", "question")
    plain = [
        q
        for q in questions
        if "(see image)" in q or "shown in the image" in q or ("photograph" in q and "is shown" in q)
    ]
    assert len(plain) > 15
    assert all(map(picture_reference, plain))
    assert sum(map(bool, map(picture_reference, questions))) == 95


@pytest.mark.parametrize("text", ["a-" * 500_000, "see" + " " * 1_000_000, "image is " * 100_000, "(" * 1_000_000])
def test_huge_texts_stay_quick(text):
    """Texts made to defeat backtracking take less than two seconds."""
    start = time.perf_counter()
    picture_reference(text)
    picture_in_reasoning(text)
    assert time.perf_counter() - start < 2
