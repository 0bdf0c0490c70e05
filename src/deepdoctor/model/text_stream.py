"""An answer as it is written: text from tokens, thinking and answer told apart before the end is known."""

from __future__ import annotations

import re
from typing import Literal

from deepdoctor.model.tokenizer import StreamDecoder

__all__ = ["Kind", "TextStream"]

Kind = Literal["thinking", "answer"]

_OPEN, _CLOSE = "<think>", "</think>"
_TAGS = re.compile(f"{_OPEN}|{_CLOSE}")
_PARTS = sorted({tag[:n] for tag in (_OPEN, _CLOSE) for n in range(1, len(tag))}, key=len, reverse=True)
_TAG_BEGUN = re.compile(f"(?:{'|'.join(_PARTS)})\\Z")


class TextStream:
    """Turns tokens into pieces of thinking and answer, in time that does not grow with the answer.

    decode: a fresh decoder of the model's tokenizer. opens_think: the prompt already ended in ``<think>``.

    Held back until it is certain: half a character, what may become a tag, blanks that may be the end of a part. Tags
    are not handed out, nor the blanks around a part. The pieces of a well-formed output, joined by kind, are what
    ``split_thinking`` reads in the whole text. Of others they are what was known at the time: text before a
    ``</think>`` that nobody opened stays answer, and each block counts as thinking.
    """

    def __init__(self, decode: StreamDecoder, opens_think: bool):
        self.kind: Kind = "thinking" if opens_think else "answer"
        """Of the text that comes next."""
        self._decode = decode
        self._held = ""
        self._blanks: dict[Kind, list[str]] = {"thinking": [], "answer": []}
        self._begun: set[Kind] = set()

    def feed(self, token: int) -> list[tuple[Kind, str]]:
        """Take one token; return the pieces it makes certain, possibly none."""
        return self._split(self._decode.push(token))

    def finish(self) -> list[tuple[Kind, str]]:
        """Return what was held back and turns out to be text; nothing may be fed afterwards."""
        pieces = self._split(self._decode.flush())
        pieces += self._piece(self._held)
        self._held = ""
        return pieces

    def _split(self, text: str) -> list[tuple[Kind, str]]:
        if not text:
            return []
        text = self._held + text
        pieces: list[tuple[Kind, str]] = []
        done = 0
        for tag in _TAGS.finditer(text):
            pieces += self._piece(text[done : tag.start()])
            self.kind = "thinking" if tag.group() == _OPEN else "answer"
            done = tag.end()
        begun = _TAG_BEGUN.search(text, max(done, len(text) - len(_CLOSE)))
        end = begun.start() if begun else len(text)
        pieces += self._piece(text[done:end])
        self._held = text[end:]
        return pieces

    def _piece(self, text: str) -> list[tuple[Kind, str]]:
        """Text of the present kind, without blanks at its very begin; blanks at its end wait for what follows."""
        blanks = self._blanks[self.kind]
        if self.kind not in self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        if shown:
            shown, text = "".join((*blanks, shown)), text[len(shown) :]
            blanks.clear()
            self._begun.add(self.kind)
        if text:
            blanks.append(text)
        return [(self.kind, shown)] if shown else []
