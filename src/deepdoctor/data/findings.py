"""What rows show beside one another: questions asked twice in other words, reasonings that all begin alike.

Near duplicates are compared by content words (see overlap_score.py), each weighing its rarity: the weight of the words
that both texts have over the weight of all words of either (weighted Jaccard, 0 to 1). Only pairs that share one of
their rarest words are compared: a pair at the cut must, so nothing is missed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepdoctor.data.overlap_score import Ids, Vocabulary, plain_text, rarity
from deepdoctor.data.rows import Row
from deepdoctor.data.sources import open_source, read_jsonl

__all__ = ["NearDuplicates", "Opening", "Openings"]

QUESTION_CUT = 0.7
"""Likeness of the questions where answers are short. Below it stand questions about one subject."""
ANSWER_CUT = 0.5
LONG_QUESTION_CUT, LONG_ANSWER_CUT = 0.8, 0.2
"""The same where both answers are texts of their own, which two writers word differently."""
LONG_ANSWER = 12
SHOWN_WORDS, OPENING_WORDS = 3, 5
UNIFORM_SHARE, UNIFORM_ROWS = 0.2, 20
MOST_OPENINGS = 5
OPENING_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+(?:['’][^\W\d_]+)?|\d+")


class _Texts:
    """Content words of texts, by number of the text: rarest first, with their weights."""

    def __init__(self, texts: Sequence[str], background: Sequence[str]):
        vocabulary = Vocabulary()
        known: dict[str, Ids] = {}
        for text in texts:
            if text not in known:
                known[text] = vocabulary.encode(text)
        others = [vocabulary.encode(text) for text in background]
        weights = rarity(list(known.values()), others, len(vocabulary))
        order = {text: self._rarest_first(ids, weights) for text, ids in known.items()}
        self.words = [order[text] for text in texts]
        self._sets = [frozenset(words) for words in self.words]
        self.weight: list[float] = weights.tolist()
        self.size = [sum(self.weight[word] for word in words) for words in self.words]

    @staticmethod
    def _rarest_first(ids: Ids, weights: np.ndarray) -> list[int]:
        ids = np.unique(ids)
        ids = ids[weights[ids] > 0]
        return ids[np.argsort(-weights[ids], kind="stable")].tolist()

    def prefix(self, number: int, cut: float) -> list[int]:
        """Return the rarest words of a text, one of which every text must share that is as alike as ``cut``."""
        rest = self.size[number]
        for count, word in enumerate(self.words[number], 1):
            rest -= self.weight[word]
            if rest < cut * self.size[number]:
                return self.words[number][:count]
        return self.words[number]

    def likeness(self, one: int, other: int) -> float:
        """Return the weighted Jaccard of two texts, in [0, 1]; 0 where neither has words that weigh."""
        both = sum(self.weight[word] for word in self._sets[one] & self._sets[other])
        either = self.size[one] + self.size[other] - both
        return both / either if either > 0 else 0.0


class NearDuplicates:
    """Finds rows whose question and answer are nearly those of an earlier row that was added.

    Rows go by their number in ``rows``. The embedded rows keep the words' weights steady where there are few rows.
    """

    def __init__(self, rows: Sequence[Row]):
        with open_source("embedded:rows") as stream:
            background = [record for _, record in read_jsonl(stream, "embedded:rows")]
        self._rows = rows
        self._questions = _Texts([row.question for row in rows], [record["Question"] for record in background])
        self._answers = _Texts([row.answer for row in rows], [record["Response"] for record in background])
        self._by_word: dict[int, list[int]] = defaultdict(list)

    def earlier(self, number: int) -> tuple[Row, float] | None:
        """Return the added row most like this one, with the likeness of the questions, or None."""
        questions = self._questions
        size = questions.size[number]
        seen: set[int] = set()
        best: tuple[float, int] | None = None
        for word in questions.prefix(number, QUESTION_CUT):
            for other in self._by_word.get(word, ()):
                if other in seen:
                    continue
                seen.add(other)
                if min(size, questions.size[other]) < QUESTION_CUT * max(size, questions.size[other]):
                    continue
                score = questions.likeness(number, other)
                if score >= QUESTION_CUT and (best is None or score > best[0]) and self._same(number, other, score):
                    best = score, other
        return (self._rows[best[1]], best[0]) if best else None

    def add(self, number: int) -> None:
        """Let later rows be compared with this one."""
        for word in self._questions.prefix(number, QUESTION_CUT):
            self._by_word[word].append(number)

    def _same(self, one: int, other: int, questions: float) -> bool:
        if plain_text(self._rows[one].answer) == plain_text(self._rows[other].answer):
            return True
        answers = self._answers.likeness(one, other)
        if min(len(self._answers.words[one]), len(self._answers.words[other])) < LONG_ANSWER:
            return answers >= ANSWER_CUT
        return questions >= LONG_QUESTION_CUT and answers >= LONG_ANSWER_CUT


@dataclass(frozen=True, slots=True)
class Opening:
    """Words that reasonings begin with: how many rows, and their share of all."""

    words: str
    rows: int
    share: float


class Openings:
    """The words with which reasonings begin, case and punctuation aside; a Chinese character counts as a word."""

    def __init__(self, rows: Sequence[Row]):
        begins = [self._words(row) for row in rows]
        self._rows = len(rows)
        self._shown = Counter(" ".join(words[:SHOWN_WORDS]) for words in begins if len(words) >= SHOWN_WORDS)
        self._long = Counter(" ".join(words) for words in begins if len(words) >= OPENING_WORDS)

    @staticmethod
    def _words(row: Row) -> list[str]:
        return OPENING_TOKEN.findall(row.reasoning[:200].casefold().replace("’", "'"))[:OPENING_WORDS]

    def common(self) -> tuple[Opening, ...]:
        """Return the commonest first three words, at most five of them, each of at least two rows."""
        found = [item for item in self._shown.most_common(MOST_OPENINGS) if item[1] > 1]
        return tuple(Opening(words, count, round(count / self._rows, 4)) for words, count in found)

    def uniform(self, row: Row) -> str | None:
        """Say how many reasonings begin with this one's first five words, where a fifth and 20 rows or more do."""
        words = " ".join(self._words(row))
        count = self._long[words]
        if count < max(UNIFORM_ROWS, UNIFORM_SHARE * self._rows):
            return None
        return f"{count:,} of {self._rows:,} reasonings begin with {words!r}"
