"""The two things every stage speaks of: rows (training examples) and questions (evaluation items)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

__all__ = ["Question", "Row"]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Row:
    """One training example as read: index (0-based place in the source), place ("file:line"), and its three texts."""

    index: int
    place: str
    question: str
    reasoning: str
    answer: str

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the three texts, independent of the row's place."""
        return _sha256("\x1f".join((self.question.strip(), self.reasoning.strip(), self.answer.strip())))

    @property
    def question_hash(self) -> str:
        """SHA-256 (hex) of the question, case and spacing aside; decides the split: no question is on both sides."""
        return _sha256(" ".join(self.question.casefold().split()))


@dataclass(frozen=True, slots=True)
class Question:
    """One four-option (or n-option) evaluation item with its key; dup_group joins repeated questions."""

    id: str
    task: str
    question: str
    options: dict[str, str] = field(default_factory=dict)
    answer: str = ""
    context: str | None = None
    subject: str | None = None
    dup_group: str | None = None
    image_ref: bool = False
