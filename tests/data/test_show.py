"""Rows on the screen: every character once, trained text set apart, whatever the terminal."""

import io
import re

import pytest
from helpers_prompt import BOS, EOS, byte_prompt, row
from rich.console import Console

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.data.show import show_rows
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX


def shown(rows, prompt, n=3, **settings):
    """Return what is printed for rows, already encoded where they are pairs."""
    out = io.StringIO()
    pairs = [r if isinstance(r, tuple) else (r, prompt.encode_row(r)) for r in rows]
    show_rows(pairs, prompt, Console(file=out, width=40, **settings), n)
    return out.getvalue()


def test_without_colour_brackets_mark_what_trains():
    """In a file, the row stands exactly once, unwrapped, with the trained part in brackets and BOS and EOS readable."""
    text = shown([row("What is it?", "It is this, " * 10, "This.")], byte_prompt())
    reasoning = ("It is this, " * 10).strip()
    assert (
        f"{BOS}<｜User｜>What is it?<｜Assistant｜><think>\n[train]{reasoning}\n</think>\n\nThis.{EOS}[/train]\n"
        in text
    )
    assert "\x1b" not in text
    assert text.startswith("[train]trained[/train] is what the model learns to write")


def test_with_colour_trained_is_green_and_the_rest_dim():
    """On a terminal, green and dim set the parts apart and no bracket is added."""
    text = shown([row()], byte_prompt(), force_terminal=True, color_system="standard")
    body = text.split("trained\x1b[0m\n", 1)[1]
    # rich closes and reopens its styles around every line break
    assert "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", body)) == f"It is this.</think>This.{EOS}"
    assert "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", body)) == f"{BOS}<｜User｜>What is it?<｜Assistant｜><think>"
    assert "[train]" not in text


def test_no_color_is_honoured(monkeypatch):
    """NO_COLOR on a terminal gives brackets."""
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown([row()], byte_prompt(), force_terminal=True)
    assert "[train]It is this." in text
    assert "\x1b[32m" not in text


@pytest.mark.parametrize("shift", [-3, -2, -1, 0, 1, 2, 3])
def test_characters_split_over_tokens_stay_whole(shift):
    """A mask edge inside a four-byte character prints it once and whole, in the later part."""
    prompt = byte_prompt()
    tokens = prompt.encode_row(row("发热", "🩺🩺 三天", "流感"))
    edge = tokens.reasoning[0] + 4 + shift
    labels = [IGNORE_INDEX] * edge + tokens.input_ids[edge:]
    text = shown([(row(), EncodedRow(tokens.input_ids, labels, tokens.reasoning, tokens.answer))], prompt)
    body = text.split("\n", 3)[3]
    start = prompt.text("发热")
    given = (start.encode() + "🩺🩺".encode())[: len(start.encode()) + 4 + shift].decode(errors="ignore")
    rest = prompt.tokenizer.decode(tokens.input_ids).removeprefix(given)
    assert body == f"{given}[train]{rest}[/train]\n"


def test_markup_and_escapes_in_the_data_are_inert():
    """Square brackets are printed as they are; an escape that would clear the screen is made visible."""
    text = shown([row("[bold]x[/bold] [red]", "a\x1b[2Jb\x07c\x9bd", ":smile:")], byte_prompt())
    assert "[bold]x[/bold] [red]" in text
    assert ":smile:" in text
    assert "a␛[2Jb␇c\ufffdd" in text
    assert "\x1b" not in text and "\x07" not in text and "\x9b" not in text


def test_the_first_n_rows_are_shown():
    """n rows at most, each under its place and lengths."""
    rows = [row(answer=f"answer {n}", index=n) for n in range(5)]
    text = shown(rows, byte_prompt(), n=2)
    assert [f"rows.jsonl:{n}: " in text for n in (1, 2, 3)] == [True, True, False]
    assert "answer 1" in text and "answer 2" not in text


def test_bytes_that_are_no_text_do_not_fail():
    """Ids that decode to broken UTF-8 on both sides of the edge are still shown."""
    prompt = byte_prompt()
    head = prompt.tokenizer.encode("é")
    ids = [head[0], head[0], head[0], head[1], prompt.eos_id]
    text = shown([(row(), EncodedRow(ids, [IGNORE_INDEX] * 3 + ids[3:], (3, 4), (4, 5)))], prompt)
    assert "é" in text and EOS in text
