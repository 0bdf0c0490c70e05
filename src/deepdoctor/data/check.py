"""Every row looked at before training: what was found, what was dropped and why, and proof that the rest is whole.

A row is dropped for the first reason that applies, in the order of MEANINGS, and nothing else is then said of it.
Nothing is ever cut. Rows that stay are verified token by token: a fault there is a fault of the template, and stops the
run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from deepdoctor.data.findings import NearDuplicates, Opening, Openings
from deepdoctor.data.findings_text import FIELDS, short, text_findings
from deepdoctor.data.pictures import picture_in_reasoning, picture_reference
from deepdoctor.data.rows import Row
from deepdoctor.errors import DataError
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.recipe import DataSection, Doubt

if TYPE_CHECKING:
    from deepdoctor.data.prompt import EncodedRow, Prompt

__all__ = ["MEANINGS", "CheckReport", "Finding", "Lengths", "check_rows"]

MEANINGS = {
    "empty_field": "a text is empty",
    "control_tokens": "a text holds a control token or <think> tag",
    "missing_image": "the question needs a picture that is not there",
    "picture_in_reasoning": "the reasoning looks at a picture that is not there",
    "duplicate": "same question, reasoning and answer as an earlier row",
    "chat_markers": "a text holds marks of another chat or reasoning format",
    "injection": "a text gives orders to a model (prompt injection)",
    "markup": "a text holds HTML or a stray code fence",
    "personal_data": "a text seems to hold personal data",
    "language_mix": "the texts are in different scripts",
    "answer_in_question": "the question gives its answer away",
    "unsupported_answer": "the answer does not follow from the reasoning",
    "uniform_opening": "the reasoning begins as many others do",
    "too_long": "longer than max_seq_len",
    "duplicate_question": "same question as an earlier row, other reasoning or answer",
    "near_duplicate": "nearly the question and answer of an earlier row",
}
REMEDIES = {
    "empty_field": "check the column names (`--data.question`, `--data.reasoning`, `--data.answer`)",
    "control_tokens": "take the tokens out of the texts; the template writes them",
    "missing_image": "`--data.missing_image keep` trains on them all the same",
    "duplicate": "`--data.duplicates keep` trains on the copies too",
}
DOUBTS: tuple[str, ...] = get_args(Doubt)
MOST_FINDINGS = 20  # named where no row is left
OPENING_SHARE, OPENING_ROWS = 0.1, 20  # from which the summary names the commonest first words
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
    that could be encoded, dropped or not: the max_seq_len that would keep every row. openings: the commonest first
    words of the reasonings read.
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
    openings: tuple[Opening, ...] = ()

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
        findings [{code, index, place, action, detail}], openings [{words, rows, share}].
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
            "openings": [asdict(opening) for opening in self.openings],
        }

    def summary_lines(self) -> list[str]:
        """Return short plain sentences for the terminal."""
        lines = [f"{self.rows_read:,} rows read, {self.rows_kept:,} kept, {self.rows_read - self.rows_kept:,} dropped."]
        for code, actions in self.counts().items():
            for action, count in actions.items():
                if count:
                    places = [self._spot(f.place) for f in self.findings if (f.code, f.action) == (code, action)]
                    more = f" and {count - 3:,} more" if count > 3 else ""
                    named = f", `{code}`" if code in DOUBTS else ""
                    lines.append(f"{count:,} {action}{named}: {MEANINGS[code]} (at {', '.join(places[:3])}{more}).")
        if any(code in DOUBTS and actions["kept"] for code, actions in self.counts().items()):
            lines.append("`--data.drop NAME ...` leaves rows of a named finding out.")
        if self.rows_read >= OPENING_ROWS and self.openings and self.openings[0].share >= OPENING_SHARE:
            lines.append(f"{self.openings[0].share:.0%} of the reasonings begin with {self.openings[0].words!r}.")
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

    rows: as loaded. prompt: encodes them. section: max_seq_len, too_long, duplicates, missing_image, drop, train_on.
    Returns the kept rows with their tokens, in source order, and the report.
    Raises DataError when no row is left, when a row is too long and ``too_long`` is ``error``, or when a kept row
    breaks a promise of the template: one BOS, the inference prompt as prefix, labels on what trains, a learnt EOS.
    """
    control = _control_pattern(prompt.tokenizer.special_tokens)
    openings = Openings(rows)
    earlier = _Earlier(rows)
    findings: list[Finding] = []
    kept: list[tuple[Row, EncodedRow]] = []
    longest = 0
    for number, row in enumerate(rows):
        found = _text_findings(row, control, section, openings, earlier.copy_of(number))
        encoded = None
        if not _dropped(found):
            encoded = prompt.encode_row(row)
            tokens = len(encoded.input_ids)
            longest = max(longest, tokens)
            if tokens > section.max_seq_len:
                finding = Finding("too_long", row.index, row.place, "dropped", _cut(encoded, section.max_seq_len))
                if section.too_long == "error":
                    raise DataError(f"{row.place} is too long: {finding.detail}", _longer(tokens))
                found.append(finding)
            else:
                _verify(row, encoded, prompt, section.train_on)
                found += earlier.findings(number, section)
        if dropped := _dropped(found):
            findings.append(dropped)
        elif encoded is not None:
            findings += found
            kept.append((row, encoded))
            earlier.add(number, found)
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
        openings=openings.common(),
    )
    return kept, report


def _dropped(found: Sequence[Finding]) -> Finding | None:
    return next((finding for finding in found if finding.action == "dropped"), None)


class _Earlier:
    """The kept rows so far, to compare the next one with; rows go by their number in ``rows``."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = rows
        self._normal = [_normal(row) for row in rows]
        self._near = NearDuplicates(rows)
        self._texts: dict[tuple[str, ...], Row] = {}
        self._questions: dict[str, Row] = {}

    def copy_of(self, number: int) -> Row | None:
        """The kept row with the same three texts."""
        return self._texts.get(self._normal[number])

    def findings(self, number: int, section: DataSection) -> list[Finding]:
        """What another kept row says about this one: the same question, or nearly the same row. A copy has neither."""
        row, texts = self._rows[number], self._normal[number]
        if texts in self._texts:
            return []
        if same := self._questions.get(texts[0]):
            return [_doubt("duplicate_question", row, f"first in {same.place}", section)]
        if near := self._near.earlier(number):
            detail = f"like {near[0].place}, likeness of the questions {near[1]:.2f}"
            return [_doubt("near_duplicate", row, detail, section)]
        return []

    def add(self, number: int, found: Sequence[Finding]) -> None:
        """Count a row as kept. Rows like an earlier one are not compared with: the first of a kind stands for all."""
        row, texts = self._rows[number], self._normal[number]
        if texts[0] not in self._questions and not any(finding.code == "near_duplicate" for finding in found):
            self._near.add(number)
        self._texts.setdefault(texts, row)
        self._questions.setdefault(texts[0], row)


def _doubt(code: str, row: Row, detail: str, section: DataSection) -> Finding:
    """A finding that keeps its row unless ``drop`` names it."""
    return Finding(code, row.index, row.place, "dropped" if code in section.drop else "kept", detail)


def _text_findings(
    row: Row, control: re.Pattern[str], section: DataSection, openings: Openings, copy_of: Row | None
) -> list[Finding]:
    """Return what the texts alone show, in the order of MEANINGS; the last one drops the row where any does."""
    found = []
    for finding in _texts_in_order(row, control, section, openings, copy_of):
        found.append(finding)
        if finding.action == "dropped":
            break
    return found


def _texts_in_order(
    row: Row, control: re.Pattern[str], section: DataSection, openings: Openings, copy_of: Row | None
) -> Iterator[Finding]:
    def finding(code: str, detail: str, action: Literal["drop", "keep"] = "drop") -> Finding:
        return Finding(code, row.index, row.place, "dropped" if action == "drop" else "kept", detail)

    if empty := [field for field in FIELDS if not getattr(row, field).strip()]:
        yield finding("empty_field", " and ".join(empty))
    for field in FIELDS:
        if match := control.search(getattr(row, field)):
            yield finding("control_tokens", f"{match.group()} in {field}")
    pointer, claim = picture_reference(row.question), picture_in_reasoning(row.reasoning)
    if pointer:
        claimed = f"; reasoning: {short(claim)!r}" if claim else ""
        yield finding("missing_image", f"question: {short(pointer)!r}{claimed}", section.missing_image)
    elif claim:
        yield _doubt("picture_in_reasoning", row, f"{short(claim)!r}", section)
    if copy_of:
        yield finding("duplicate", f"first in {copy_of.place}", section.duplicates)
    for code, detail in text_findings(row):
        yield _doubt(code, row, detail, section)
    if alike := openings.uniform(row):
        yield _doubt("uniform_opening", row, alike, section)


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
    if first in DOUBTS:
        remedy = f"take `{first}` out of data.drop: such rows are then kept and named"
    return DataError(
        f"none of the {rows:,} rows of {section.source} can be used: {said or 'there are none'}" + "".join(shown),
        remedy,
    )
