"""Where a question's options stand: the order both sides see, letters mapped back, and positions a side favours.

A letter as shown names a position; a letter of the key names an option, in the order of the questions file. ``order``
holds the key's letters as they stand on the page: with (C, A, B) the text of C is shown as A.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scipy import special

from deepdoctor.data.rows import Question

__all__ = ["draw_order", "fixed_order", "key_letter", "position_bias", "reorder", "shown_letter"]

FEW = 5
"""Expected answers below which positions are counted together; the chi-square approximation wants as many."""
_ONE = r"(?<![\w'-])(?-i:[A-J]|[a-e])(?![\w'-])"
_REFERS = re.compile(
    r"\bof\s+(?:the\s+)?(?:above|below)\b|\babove[\s-]*(?:mentioned|options|all)\b"
    r"|^\W*(?:all|any|both|neither|none)\b(?:.{0,30}\b(?:above|below)\b|"
    r"(?:\s+of)?(?:\s+the)?(?:\s+(?:these|those|them|others?|options|answers))?(?:\s+are\s+\w+)?\W*$)"
    rf"|{_ONE}(?:\s*[,/&+]\s*(?:and\s+|or\s+)?|\s+(?:and|or)\s+){_ONE}"
    rf"|\b(?:both|only|options?|choices?|answers?|statements?)\s+[(]?(?:{_ONE}|(?-i:[A-E]{{2,4}})\b)",
    re.IGNORECASE,
)
"""An option that speaks of others by place or letter: "all of the above", "both A and C"."""


def fixed_order(options: Mapping[str, str]) -> bool:
    """Whether the options (letter -> text) keep their order: one speaks of others, as "all of the above" does."""
    return any(_REFERS.search(text) for text in options.values())


def draw_order(question: Question, seed: int, sample: int = 0) -> tuple[str, ...]:
    """Return the key's letters in the order to show, by a hash of seed, task, id and sample.

    Where ``fixed_order`` holds it is the order of the file.
    """
    letters = tuple(sorted(question.options))
    if fixed_order(question.options):
        return letters

    def place(letter: str) -> bytes:
        words = ("order", str(seed), question.task, question.id, str(sample), letter)
        return hashlib.sha256("\x1f".join(words).encode("utf-8", "surrogatepass")).digest()

    return tuple(sorted(letters, key=place))


def reorder(question: Question, order: Sequence[str]) -> Question:
    """Return the question as shown: texts in the new order under the letters from the first on, the key with them."""
    options = {shown: question.options[letter] for shown, letter in zip(sorted(order), order, strict=True)}
    return replace(question, options=options, answer=shown_letter(question.answer, order))


def shown_letter(letter: str, order: Sequence[str]) -> str:
    """Return the letter under which the option ``letter`` is shown."""
    return sorted(order)[list(order).index(letter)]


def key_letter(shown: str, order: Sequence[str]) -> str:
    """Return the letter of the option that is shown as ``shown``."""
    return order[sorted(order).index(shown)]


def position_bias(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Hold the positions one side chose against the positions of the right answers.

    records: answers of one side to one task (see ``report``). Returns n (answers with a letter), chosen (letter as
    shown -> answers), correct (letter as shown -> share of the asked questions it was right for), p_value; None where
    the options are not known. p_value: chi-square goodness of fit of chosen to correct. Positions with fewer than 5
    expected answers are counted together; None where fewer than two remain. Samples and copies of a question count
    as one answer in it, so it errs upwards where their orders differ.
    """
    chosen: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for record in records:
        order = record.get("order") or sorted(record.get("options") or ())
        if record["key"] not in order:
            return None
        chosen.update({letter: 0 for letter in order})
        correct[shown_letter(record["key"], order)] += 1
        shown = record.get("shown", record["letter"])
        if shown is not None:
            chosen[shown] += 1
    if not records:
        return None
    n = chosen.total()
    units = len({(record.get("group") is None, record.get("group") or record["id"]) for record in records})
    weight = units / len(records)
    cells = [(n * weight * correct[letter] / len(records), weight * chosen[letter]) for letter in sorted(chosen)]
    return {
        "n": n,
        "chosen": {letter: chosen[letter] for letter in sorted(chosen)},
        "correct": {letter: correct[letter] / len(records) for letter in sorted(chosen)},
        "p_value": _fit(cells),
    }


def _fit(cells: Sequence[tuple[float, float]]) -> float | None:
    """P value of (expected, observed) counts; rare cells joined, with the rarest other one where still rare."""
    kept = sorted(cell for cell in cells if cell[0] >= FEW)
    rare = [cell for cell in cells if cell[0] < FEW]
    if rare:
        joined = sum(expected for expected, _ in rare), sum(observed for _, observed in rare)
        if joined[0] < FEW and kept:
            joined = joined[0] + kept[0][0], joined[1] + kept[0][1]
            kept = kept[1:]
        kept = [*kept, joined]
    if len(kept) < 2:
        return None
    # scipy.stats has these distributions too, and takes half a second to import.
    distance = sum((observed - expected) ** 2 / expected for expected, observed in kept)
    return float(special.chdtrc(len(kept) - 1, distance))
