"""Every row looked at before training: what was found, what was dropped and why, and proof that the rest is whole.

A row is dropped for the first reason that applies, in this order: empty_field, control_tokens, missing_image,
duplicate, too_long. Nothing is ever cut. Rows that stay are verified token by token: a fault there is a fault of the
template, and stops the run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from deepdoctor.data.pictures import picture_in_reasoning, picture_reference
from deepdoctor.data.rows import Row
from deepdoctor.errors import DataError
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.recipe import DataSection

if TYPE_CHECKING:
    from deepdoctor.data.prompt import EncodedRow, Prompt

__all__ = ["CheckReport", "Finding", "Lengths", "check_rows"]

MEANINGS = {
    "empty_field": "a text is empty",
    "control_tokens": "a text holds a control token or <think> tag",
    "missing_image": "the question needs a picture that is not there",
    "duplicate": "same question, reasoning and answer as an earlier row",
    "too_long": "longer than max_seq_len",
    "picture_in_reasoning": "the reasoning looks at a picture that is not there",
    "duplicate_question": "same question as an earlier row, other reasoning or answer",
}
REMEDIES = {
    "empty_field": "check the column names (`--data.question`, `--data.reasoning`, `--data.answer`)",
    "control_tokens": "take the tokens out of the texts; the template writes them",
    "missing_image": "`--data.missing_image keep` trains on them all the same",
    "duplicate": "`--data.duplicates keep` trains on the copies too",
}
MOST_FINDINGS = 20  # named where no row is left
FIELDS = ("question", "reasoning", "answer")
THINK_TAG = r"</?\s*(?i:think)\s*>"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing noticed about one row. index, place: as in Row. detail: the words or numbers that show it."""

    code: str
    index: int
    place: str
    action: Literal["dropped", "kept"]
    detail: str


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens per row. pN: the smallest length that N % of the rows do not exceed (nearest rank); total: their sum."""

    p50: int
    p90: int
    p95: int
    p99: int
    max: int
    total: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """Summarise at least one length."""
        ordered = sorted(lengths)
        p50, p90, p95, p99 = (ordered[math.ceil(share * len(ordered) / 100) - 1] for share in (50, 90, 95, 99))
        return cls(p50, p90, p95, p99, max=ordered[-1], total=sum(ordered))


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What the check saw.

    findings: in row order. lengths: of the kept rows, under ``row``, ``prompt``, ``reasoning`` (with its tags) and
    ``answer`` (with EOS). label_tokens: tokens of the kept rows that carry loss. longest_row: tokens of the longest row
    that could be encoded, dropped or not: the max_seq_len that would keep every row.
    """

    source: str
    rows_read: int
    rows_kept: int
    max_seq_len: int
    train_on: str
    findings: tuple[Finding, ...]
    lengths: dict[str, Lengths]
    label_tokens: int
    longest_row: int

    def counts(self) -> dict[str, dict[str, int]]:
        """Return, per code that occurred, how many findings were ``dropped`` and how many ``kept``."""
        seen = Counter((finding.code, finding.action) for finding in self.findings)
        return {
            code: {"dropped": seen[code, "dropped"], "kept": seen[code, "kept"]}
            for code in MEANINGS
            if seen[code, "dropped"] or seen[code, "kept"]
        }

    def to_json(self) -> dict[str, Any]:
        """Return the contents of check.json; keys and their order are stable.

        format 1: source, rows_read, rows_kept, rows_dropped, max_seq_len, longest_row, train_on, label_tokens,
        tokens {row | prompt | reasoning | answer: {p50, p90, p95, p99, max, total}}, counts {code: {dropped, kept}},
        findings [{code, index, place, action, detail}].
        """
        return {
            "format": 1,
            "source": self.source,
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "rows_dropped": self.rows_read - self.rows_kept,
            "max_seq_len": self.max_seq_len,
            "longest_row": self.longest_row,
            "train_on": self.train_on,
            "label_tokens": self.label_tokens,
            "tokens": {part: asdict(lengths) for part, lengths in self.lengths.items()},
            "counts": self.counts(),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def summary_lines(self) -> list[str]:
        """Return short plain sentences for the terminal."""
        lines = [f"{self.rows_read:,} rows read, {self.rows_kept:,} kept, {self.rows_read - self.rows_kept:,} dropped."]
        for code, actions in self.counts().items():
            for action, count in actions.items():
                if count:
                    places = [self._spot(f.place) for f in self.findings if (f.code, f.action) == (code, action)]
                    more = f" and {count - 3:,} more" if count > 3 else ""
                    lines.append(f"{count:,} {action}: {MEANINGS[code]} (at {', '.join(places[:3])}{more}).")
        row, reasoning, answer = (self.lengths[part] for part in ("row", "reasoning", "answer"))
        lines.append(
            f"Tokens per row: median {row.p50:,}, 99 % have at most {row.p99:,}, longest {row.max:,} "
            f"(limit {self.max_seq_len:,}); median reasoning {reasoning.p50:,}, answer {answer.p50:,}."
        )
        if self.longest_row > self.max_seq_len:
            lines.append(f"max_seq_len {self.longest_row} would drop no row for its length.")
        lines.append(f"{row.total:,} tokens in all, {self.label_tokens:,} of them carry loss.")
        return lines

    def _spot(self, place: str) -> str:
        return place.removeprefix(self.source).removeprefix(":")


def check_rows(
    rows: Sequence[Row], prompt: Prompt, section: DataSection
) -> tuple[list[tuple[Row, EncodedRow]], CheckReport]:
    """Encode rows, drop those that cannot teach what they should, verify the rest.

    rows: as loaded. prompt: encodes them. section: max_seq_len, too_long, duplicates, missing_image, train_on.
    Returns the kept rows with their tokens, in source order, and the report.
    Raises DataError when no row is left, when a row is too long and ``too_long`` is ``error``, or when a kept row
    breaks a promise of the template: one BOS, the inference prompt as prefix, labels on what trains, a learnt EOS.
    """
    control = _control_pattern(prompt.tokenizer.special_tokens)
    findings: list[Finding] = []
    kept: list[tuple[Row, EncodedRow]] = []
    texts_seen: dict[tuple[str, ...], Row] = {}
    questions_seen: dict[str, Row] = {}
    longest = 0
    for row in rows:
        texts = _normal(row)
        found = list(_text_findings(row, control, section, texts_seen.get(texts)))
        findings += found
        if any(finding.action == "dropped" for finding in found):
            continue
        encoded = prompt.encode_row(row)
        tokens = len(encoded.input_ids)
        longest = max(longest, tokens)
        if tokens > section.max_seq_len:
            finding = Finding("too_long", row.index, row.place, "dropped", _cut(encoded, section.max_seq_len))
            if section.too_long == "error":
                raise DataError(f"{row.place} is too long: {finding.detail}", _longer(tokens))
            findings.append(finding)
            continue
        _verify(row, encoded, prompt, section.train_on)
        if texts[0] in questions_seen and texts not in texts_seen:
            detail = f"first in {questions_seen[texts[0]].place}"
            findings.append(Finding("duplicate_question", row.index, row.place, "kept", detail))
        texts_seen.setdefault(texts, row)
        questions_seen.setdefault(texts[0], row)
        kept.append((row, encoded))
    if not kept:
        raise _nothing_left(len(rows), section, findings, longest)
    encoded_rows = [encoded for _, encoded in kept]
    report = CheckReport(
        source=section.source,
        rows_read=len(rows),
        rows_kept=len(kept),
        max_seq_len=section.max_seq_len,
        train_on=section.train_on,
        findings=tuple(findings),
        lengths={
            "row": Lengths.of([len(e.input_ids) for e in encoded_rows]),
            "prompt": Lengths.of([e.reasoning[0] for e in encoded_rows]),
            "reasoning": Lengths.of([e.reasoning[1] - e.reasoning[0] for e in encoded_rows]),
            "answer": Lengths.of([e.answer[1] - e.answer[0] for e in encoded_rows]),
        },
        label_tokens=sum(len(e.labels) - e.labels.count(IGNORE_INDEX) for e in encoded_rows),
        longest_row=longest,
    )
    return kept, report


def _text_findings(row: Row, control: re.Pattern[str], section: DataSection, copy_of: Row | None) -> Iterator[Finding]:
    """Yield what the texts alone show; nothing follows a finding that drops the row."""

    def finding(code: str, detail: str, action: Literal["drop", "keep"] = "drop") -> Finding:
        return Finding(code, row.index, row.place, "dropped" if action == "drop" else "kept", detail)

    empty = [field for field in FIELDS if not getattr(row, field).strip()]
    if empty:
        yield finding("empty_field", " and ".join(empty))
        return
    for field in FIELDS:
        if match := control.search(getattr(row, field)):
            yield finding("control_tokens", f"{match.group()} in {field}")
            return
    pointer, claim = picture_reference(row.question), picture_in_reasoning(row.reasoning)
    if pointer:
        claimed = f"; reasoning: {_short(claim)!r}" if claim else ""
        yield finding("missing_image", f"question: {_short(pointer)!r}{claimed}", section.missing_image)
        if section.missing_image == "drop":
            return
    elif claim:
        yield finding("picture_in_reasoning", f"{_short(claim)!r}", "keep")
    if copy_of:
        yield finding("duplicate", f"first in {copy_of.place}", section.duplicates)


def _verify(row: Row, encoded: EncodedRow, prompt: Prompt, train_on: str) -> None:
    """Raise DataError unless the encoded row keeps every promise that training and answering rely on."""
    ids, labels = encoded.input_ids, encoded.labels
    (reasoning_start, reasoning_end), (answer_start, answer_end) = encoded.reasoning, encoded.answer

    def trains(start: int, end: int) -> bool:
        return labels[start:end] == ids[start:end]

    def masked(start: int, end: int) -> bool:
        return labels[start:end].count(IGNORE_INDEX) == end - start

    spans = (0, reasoning_start, reasoning_end, answer_start, answer_end)
    promises = {
        "labels do not match its tokens one to one": len(labels) == len(ids),
        "prompt, reasoning and answer do not follow one another to the end": (
            list(spans) == sorted(spans) and reasoning_end == answer_start and answer_end == len(ids)
        ),
        "first tokens are not exactly one BOS": (
            prompt.bos_id is None or (ids[:1] == [prompt.bos_id] and ids[1:2] != [prompt.bos_id])
        ),
        "last token is not a learnt EOS": ids[-1:] == [prompt.eos_id] and labels[-1:] == [prompt.eos_id],
        "first tokens are not the prompt that is asked": ids[:reasoning_start] == prompt.prompt_ids(row.question),
        "prompt is not masked as data.train_on says": (trains if train_on == "all" else masked)(0, reasoning_start),
        "reasoning is not masked as data.train_on says": (masked if train_on == "answer" else trains)(
            reasoning_start, reasoning_end
        ),
        "answer does not train": trains(answer_start, answer_end),
    }
    broken = [text for text, kept in promises.items() if not kept]
    if broken:
        raise DataError(
            f"{row.place}: with this template its {broken[0]}",
            "this is a fault of data.template, not of the row; use `native` or `tutorial`, or mend the Jinja file",
        )


def _control_pattern(special_tokens: frozenset[str]) -> re.Pattern[str]:
    """Match any text that encodes to a special token; tokens of white space alone are ordinary text."""
    texts = sorted((text for text in special_tokens if text.strip()), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, texts), THINK_TAG]))


def _normal(row: Row) -> tuple[str, ...]:
    """Return the three texts without differences of case and white space."""
    return tuple(" ".join(getattr(row, field).split()).casefold() for field in FIELDS)


def _cut(encoded: EncodedRow, limit: int) -> str:
    tokens = len(encoded.input_ids)
    if limit <= encoded.reasoning[0]:
        lost = "in the question, and lose reasoning and answer"
    elif limit < encoded.answer[0]:
        lost = "in the reasoning, and lose the whole answer"
    elif limit == encoded.answer[0]:
        lost = "after the reasoning, and lose the whole answer"
    elif limit < tokens - 1:
        lost = "in the answer, and lose EOS"
    else:
        lost = "after the answer, and lose EOS"
    return f"{tokens:,} tokens, {tokens - limit:,} over max_seq_len {limit:,}; a cut would fall {lost}"


def _longer(tokens: int) -> str:
    return f"set `--data.max_seq_len {tokens}` or more, or `--data.too_long drop`"


def _nothing_left(rows: int, section: DataSection, findings: Sequence[Finding], longest: int) -> DataError:
    reasons = Counter(finding.code for finding in findings if finding.action == "dropped").most_common()
    said = ", ".join(f"{count:,} {code} ({MEANINGS[code]})" for code, count in reasons)
    shown = [f"\n  {f.place}: {f.code}: {f.detail}" for f in findings[:MOST_FINDINGS]]
    if len(findings) > MOST_FINDINGS:
        shown.append(f"\n  and {len(findings) - MOST_FINDINGS:,} more")
    first = reasons[0][0] if reasons else ""
    remedy = f"set `--data.max_seq_len {longest}`" if first == "too_long" else REMEDIES.get(first)
    return DataError(
        f"none of the {rows:,} rows of {section.source} can be used: {said or 'there are none'}" + "".join(shown),
        remedy,
    )


def _short(text: str, limit: int = 80) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else joined[:limit] + "..."
