"""Text as it is written: whatever the cut into tokens, the pieces are what the whole text reads as."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdoctor.compare.extract import split_thinking
from deepdoctor.model.text_stream import TextStream
from deepdoctor.model.tokenizer import StreamDecoder, Tokenizer
from helpers_tokenizer import build_r1_tokenizer

OPEN, CLOSE = "<think>", "</think>"


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The R1-like tokenizer: each byte and each tag is a token of its own, and tags can also be spelt in pieces."""
    return Tokenizer.from_folder(build_r1_tokenizer(tmp_path_factory.mktemp("r1")))


@pytest.fixture(scope="module")
def byte_ids(r1: Tokenizer) -> dict[int, int]:
    """The token of each byte."""
    return {r1.token_bytes(id)[0]: id for id in range(r1.vocab_size) if len(r1.token_bytes(id)) == 1}


def stream(tokenizer: Tokenizer, opens_think: bool) -> TextStream:
    """A fresh stream."""
    return TextStream(StreamDecoder(tokenizer), opens_think)


def read(tokenizer: Tokenizer, ids: list[int], opens_think: bool) -> dict[str, str]:
    """The pieces of all tokens, joined by kind; no piece is empty."""
    written = stream(tokenizer, opens_think)
    pieces = [piece for id in ids for piece in written.feed(id)] + written.finish()
    assert all(text for _, text in pieces)
    return {kind: "".join(text for k, text in pieces if k == kind) for kind in ("thinking", "answer")}


# What is hard: characters of several bytes, beginnings of tags, blanks of every sort, what one token holds.
words = st.sampled_from(
    [
        "发热",
        "🩺",
        "👩‍⚕️",
        "é",
        "<",
        "</",
        "</thin",
        "<think",
        "k>",
        " ",
        "\n\n",
        "\t",
        "\x85",
        "\u3000",
        "pain",
        "a < b",
        "\ufffd",
    ]
)
parts = st.lists(words | st.characters(codec="utf-8"), max_size=12).map("".join)


@st.composite
def cuts(draw: st.DrawFn, text: str, tokenizer: Tokenizer, bytes_: dict[int, int]) -> list[int]:
    """Tokens of a text that is cut at random bytes; pieces that are no whole text become one token a byte."""
    whole = text.encode()
    places = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    ids: list[int] = []
    for begin, end in zip([0, *places], [*places, len(whole)], strict=True):
        piece = whole[begin:end]
        try:
            ids += tokenizer.encode(piece.decode()) if draw(st.booleans()) else [bytes_[byte] for byte in piece]
        except UnicodeDecodeError:
            ids += [bytes_[byte] for byte in piece]
    return ids


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_well_formed_outputs_read_as_a_whole(r1: Tokenizer, byte_ids: dict[int, int], data: st.DataObject) -> None:
    """However a well-formed output is cut into tokens, its pieces are what split_thinking reads in the whole text."""
    opened = data.draw(st.booleans())
    lead = "" if opened else data.draw(st.sampled_from(["", "\n", " \n"])) + OPEN
    text = lead + data.draw(parts) + CLOSE + data.draw(parts)
    reading = split_thinking(text, opened)
    pieces = read(r1, data.draw(cuts(text, r1, byte_ids)), opened)
    if reading.well_formed:
        assert (pieces["thinking"], pieces["answer"]) == (reading.thinking, reading.answer)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_unfinished_outputs_read_as_a_whole(r1: Tokenizer, byte_ids: dict[int, int], data: st.DataObject) -> None:
    """An output that was cut off anywhere, inside a character or a tag even, reads as it would as a whole."""
    text = data.draw(parts) + CLOSE + data.draw(parts)
    ids = data.draw(cuts(text, r1, byte_ids))
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    text = r1.decode(ids)
    reading = split_thinking(text, True)
    pieces = read(r1, ids, True)
    if OPEN not in text and text.count(CLOSE) <= 1:
        assert (pieces["thinking"], pieces["answer"]) == (reading.thinking, reading.answer)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_text_is_lost_and_no_tag_is_shown(r1: Tokenizer, byte_ids: dict[int, int], data: st.DataObject) -> None:
    """With tags anywhere, every character but tags and blanks is handed out once, in its order."""
    text = "".join(data.draw(st.lists(parts | st.sampled_from([OPEN, CLOSE]), max_size=8)))
    written = stream(r1, data.draw(st.booleans()))
    ids = data.draw(cuts(text, r1, byte_ids))
    pieces = [text for id in ids for _, text in written.feed(id)]
    shown = "".join(pieces + [text for _, text in written.finish()])
    assert OPEN not in "|".join(pieces) and CLOSE not in "|".join(pieces)
    assert "".join(shown.split()) == "".join(text.replace(CLOSE, OPEN).replace(OPEN, "").split())


def test_pieces_come_as_soon_as_they_are_certain(r1: Tokenizer, byte_ids: dict[int, int]) -> None:
    """Half a character, the beginning of a tag and blanks wait; what turns out to be no tag comes then."""
    written = stream(r1, True)
    first, *rest = "热".encode()
    assert written.feed(byte_ids[first]) == []
    assert [piece for byte in rest for piece in written.feed(byte_ids[byte])] == [("thinking", "热")]
    said = [(char, written.feed(byte_ids[ord(char)])) for char in "a </thx </think>\n b"]
    assert [(char, pieces) for char, pieces in said if pieces] == [
        ("a", [("thinking", "a")]),
        ("x", [("thinking", " </thx")]),
        ("b", [("answer", "b")]),
    ]
    assert [written.feed(byte_ids[ord(char)]) for char in " <"] == [[], []]
    assert written.finish() == [("answer", " <")]


def test_several_parts_in_one_token() -> None:
    """One token may end the thinking and begin the answer."""

    class Whole(StreamDecoder):
        def __init__(self) -> None:
            pass

        def push(self, id: int) -> str:
            return "<think>\nWhy?\n</think>\n\nSo."

        def flush(self) -> str:
            return ""

    written = TextStream(Whole(), False)
    assert written.feed(0) == [("thinking", "Why?"), ("answer", "So.")]
    assert written.kind == "answer"
    assert written.finish() == []


@pytest.mark.parametrize("word", ["pain ", "\n", "热", "</thin"])
def test_cost_does_not_grow(r1: Tokenizer, word: str) -> None:
    """100,000 tokens stream in seconds, blanks without end and broken tags among them."""
    ids = r1.encode(word) * (100_000 // len(r1.encode(word)))
    started = time.perf_counter()
    pieces = read(r1, ids, True)
    assert time.perf_counter() - started < 10
    assert pieces["thinking"] == r1.decode(ids).strip()
