"""How alike a training row and an evaluation question are, from their words alone; see overlap.py for the verdict.

A text becomes content words: Unicode NFKC, case folded, function words and single letters (option names) dropped, the
first six letters kept ("jaundiced" = "jaundice"), "6,500" = "6500". Scripts without spaces give pairs of neighbouring
characters. A word's weight is its rarity, 1 - log(df) / log(N), over the row questions, the evaluation questions and
the embedded rows (which keep weights steady where there are few of either): 1 for a word seen once, 0 for one seen
everywhere. Numbers are words.

Matrices are sparse (documents x words or n-grams); scores come as dense blocks of some questions against all rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["GRAM", "Ids", "KeyShares", "Vocabulary", "gram_scores", "plain_text", "rarity", "word_scores"]

GRAM = 4
"""Content words in a row that make an n-gram: about eight words of running text."""
STEM = 6
BLOCK = 5_000_000  # scores at a time, 4 bytes each
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
TOKEN = re.compile(rf"[{UNSPACED}]+|[^\W_{UNSPACED}]+(?:\.\d+)?")
IS_UNSPACED = re.compile(f"[{UNSPACED}]")
WORD = re.compile(r"\w+")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
FUNCTION_WORDS = """
a an the of in is are was were be been and or to with for on by from which at as it its his her he she him they them
their there this that these those what who whom when where how why following has had have does do did not no all any
except most likely than then also after before during one patient patients yes maybe true false none both above
"""
STOP_WORDS = frozenset(FUNCTION_WORDS.split())
WORD_FLOOR = 1.6
"""Weight added to a question's own in the words score: a question of one or two rare words cannot reach the cut."""
GRAM_FLOOR = 4.0
KEY_FLOOR = 0.4
SHORTER = 0.85
"""How much the shorter text decides what counts as all of it (1: it alone; 0.5: a cosine)."""
COMMON = 0.2
"""Words of less weight say nothing and are left out."""
LEAST_FOR_HALF = 8

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def plain_text(text: str) -> str:
    """Return the text without case, punctuation and spacing: what "word for word the same" compares."""
    return " ".join(WORD.findall(_normal(text)))


class Vocabulary:
    """Content words as numbers, in order of first appearance."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._stems: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._stems)

    def encode(self, text: str) -> Ids:
        """Return the ids of a text's content words in order, (n,) int32."""
        text = _normal(text)
        if "," in text:
            text = THOUSANDS.sub("", text)
        found = []
        for token in TOKEN.findall(text):
            if token[0] >= "\u0e00" and IS_UNSPACED.match(token):
                found += [self._id(token[at : at + 2]) for at in range(max(1, len(token) - 1))]
            else:
                found.append(self._id(token))
        ids = np.array(found, np.int32)
        return ids[ids >= 0]

    def _id(self, token: str) -> int:
        id = self._ids.get(token)
        if id is None:
            if token in STOP_WORDS or (len(token) == 1 and token.isascii() and token.isalpha()):
                id = -1
            else:
                stem = token if token[0].isdigit() else token[:STEM]
                id = self._stems.setdefault(stem, len(self._stems))
            self._ids[token] = id
        return id


def _matrix(docs: Sequence[Ids], columns: int) -> Any:
    """Return which word stands in which document, (documents, columns) of 0 and 1."""
    sets = [np.unique(ids) for ids in docs]
    ends = np.cumsum([0] + [len(ids) for ids in sets])
    ids = np.concatenate(sets) if sets else np.zeros(0, np.int32)
    return sp.csr_matrix((np.ones(len(ids), np.float32), ids, ends), shape=(len(docs), columns))


def rarity(row_questions: Sequence[Ids], others: Sequence[Ids], words: int) -> Floats:
    """Return the weight of every word, (words,) in [0, 1]; a word of over half of the row questions has none.

    row_questions, others: documents, each distinct text once.
    """
    in_rows = np.asarray(_matrix(row_questions, words).sum(0)).ravel()
    df = in_rows + np.asarray(_matrix(others, words).sum(0)).ravel()
    weights = 1 - np.log(np.maximum(df, 1)) / np.log(max(len(row_questions) + len(others), 2))
    weights[weights < COMMON] = 0
    if len(row_questions) >= LEAST_FOR_HALF:  # an instruction that opens every row
        weights[in_rows > len(row_questions) / 2] = 0
    return weights.astype(np.float32)


def _blocks(questions: int, rows: int) -> Iterator[tuple[int, slice]]:
    step = max(BLOCK // max(rows, 1), 1)
    return ((start, slice(start, start + step)) for start in range(0, questions, step))


def word_scores(stems: Sequence[Ids], row_questions: Sequence[Ids], weights: Floats) -> Iterator[tuple[int, Floats]]:
    """Yield (number of the first question, scores (some questions, rows) in [0, 1)).

    The score is the weight of the words that both have, over the weight of the texts: geometric mean with the shorter
    one's share at 0.85, so that a question cut down to its core is still found, while a short general question is not
    found in every long one.
    """
    left = _matrix(stems, len(weights)).multiply(weights).tocsr()
    right = _matrix(row_questions, len(weights)).T.tocsr()
    own = np.asarray(left.sum(1), np.float32)
    theirs = (right.T @ weights).astype(np.float32)[None]
    for start, block in _blocks(len(stems), len(row_questions)):
        size = np.minimum(
            own[block] ** SHORTER * theirs ** (1 - SHORTER), own[block] ** (1 - SHORTER) * theirs**SHORTER
        )
        size += WORD_FLOOR
        yield start, (left[block] @ right).toarray() / size


class KeyShares:
    """How much of a question's correct option stands in a row's answer; words of the question itself do not count."""

    def __init__(self, keys: Sequence[Ids], stems: Sequence[Ids], answers: Sequence[Ids], weights: Floats) -> None:
        wanted = [np.setdiff1d(key, stem) for key, stem in zip(keys, stems, strict=True)]
        self._keys = _matrix(wanted, len(weights)).multiply(weights).tocsr()
        self._size = np.asarray(self._keys.sum(1)).ravel() + KEY_FLOOR
        self._answers = _matrix(answers, len(weights))

    def of(self, question: NDArray[np.int64], row: NDArray[np.int64]) -> Floats:
        """Return the share of the option's weight per pair of places, (pairs,) in [0, 1)."""
        both = self._keys[question].multiply(self._answers[row])
        return (np.asarray(both.sum(1)).ravel() / self._size[question]).astype(np.float32)


def _grams(docs: Iterable[Ids]) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64], Ids]:
    """Return per n-gram its document, hash and first word's place in the flat words, and the flat words."""
    docs = list(docs)
    flat = np.concatenate([*docs, np.zeros(0, np.int32)])
    doc = np.repeat(np.arange(len(docs)), [len(ids) for ids in docs])
    count = max(len(flat) - GRAM + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for step in range(GRAM):
        hashes = (hashes + flat[step : step + count].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    at = np.flatnonzero(doc[:count] == doc[GRAM - 1 : GRAM - 1 + count])
    return doc[at], hashes[at], at, flat


def _gram_matrix(doc: NDArray[np.int64], column: NDArray[np.int64], shape: tuple[int, int]) -> Any:
    matrix = sp.csr_matrix((np.ones(len(doc), np.float32), (doc, column)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def gram_scores(
    stems: Sequence[Ids], wholes: Sequence[Ids], row_texts: Sequence[Ids], weights: Floats
) -> Iterator[tuple[int, Floats]]:
    """Yield (number of the first question, scores (some questions, rows) in [0, 1)).

    The score is the weight of the question's n-grams that stand in the row over the weight of all of them, of the stem
    alone or of the whole (context, stem, options), whichever is more. An n-gram weighs the mean of its words' weights
    times its own rarity.
    """
    doc, hashes, at, flat = _grams(wholes)
    known, first, column = np.unique(hashes, return_index=True, return_inverse=True)
    row_doc, row_hashes, _, _ = _grams(row_texts)
    place = np.searchsorted(known, row_hashes)
    met = place < len(known)
    met[met] = known[place[met]] == row_hashes[met]
    right = _gram_matrix(row_doc[met], place[met], (len(row_texts), len(known)))
    whole = _gram_matrix(doc, column, (len(wholes), len(known)))
    stem_doc, stem_hashes, _, _ = _grams(stems)
    stem = _gram_matrix(stem_doc, np.searchsorted(known, stem_hashes), (len(stems), len(known)))
    df = np.asarray(whole.sum(0) + right.sum(0)).ravel()
    gram_weights = 1 - np.log(np.maximum(df, 1)) / np.log(max(len(wholes) + len(row_texts), 2))
    gram_weights *= sum(weights[flat[at[first] + step]] for step in range(GRAM)) / GRAM
    columns = right.T.tocsr()
    parts = [part.multiply(gram_weights).tocsr() for part in (whole, stem)]
    own = [np.asarray(part.sum(1)) + GRAM_FLOOR for part in parts]
    for start, block in _blocks(len(wholes), len(row_texts)):
        scores = [(part[block] @ columns).toarray() / size[block] for part, size in zip(parts, own, strict=True)]
        yield start, np.maximum(*scores).astype(np.float32)
