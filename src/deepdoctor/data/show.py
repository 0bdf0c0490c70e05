"""Rows as the model will see them: trained tokens set apart from masked ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from deepdoctor.data.rows import Row
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX

if TYPE_CHECKING:
    from deepdoctor.data.prompt import EncodedRow, Prompt

__all__ = ["show_rows"]

TRAINED, MASKED = "green", "dim"
# Data must not steer the terminal: control characters are shown as their Unicode pictures.
VISIBLE = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | {code: 0xFFFD for code in range(0x80, 0xA0)}
)


def show_rows(encoded: Sequence[tuple[Row, EncodedRow]], prompt: Prompt, console: Console, n: int = 3) -> None:
    """Print the first n rows to ``console``, token for token.

    encoded: rows with their tokens, as ``check_rows`` returns them. BOS, EOS and every other special token appear as
    their text. With colour, trained text is green and masked text dim; without (NO_COLOR, a file, a pipe) trained text
    stands between [train] and [/train].
    """
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    legend = Text("trained", TRAINED) if coloured else Text("[train]trained[/train]")
    legend.append(" is what the model learns to write; ").append("the rest", MASKED if coloured else "")
    console.print(legend.append(" is given to it."), soft_wrap=True)
    for row, tokens in encoded[:n]:
        trained = len(tokens.labels) - tokens.labels.count(IGNORE_INDEX)
        console.print(
            Text(f"\n{row.place}: {len(tokens.input_ids):,} tokens, {trained:,} trained", "bold" if coloured else ""),
            soft_wrap=True,
        )
        shown = Text()
        for text, trains in _spans(tokens, prompt):
            visible = text.translate(VISIBLE)
            if coloured:
                shown.append(visible, TRAINED if trains else MASKED)
            else:
                shown.append(f"[train]{visible}[/train]" if trains else visible)
        console.print(shown, soft_wrap=True)


def _spans(tokens: EncodedRow, prompt: Prompt) -> Iterator[tuple[str, bool]]:
    """Yield (text, trained) pieces whose texts joined are the decoded row.

    Pieces are cut out of the whole text, so a character whose bytes lie in several tokens stays whole: where a mask
    edge splits one, it goes to the later piece.
    """
    ids = tokens.input_ids
    whole = prompt.tokenizer.decode(ids)
    start = end = 0
    for masked, run in groupby(label == IGNORE_INDEX for label in tokens.labels):
        end += len(list(run))
        edge = end
        before = prompt.tokenizer.decode(ids[:edge])
        while edge > 0 and not whole.startswith(before):
            edge -= 1
            before = prompt.tokenizer.decode(ids[:edge])
        stop = len(whole) if end == len(ids) else max(len(before), start)
        if stop > start:
            yield whole[start:stop], not masked
        start = stop
