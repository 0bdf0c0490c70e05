"""Questions for people to read: base and tuned next to each other, thinking and answer told apart."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deepdoctor.compare.answers import Item, answer_items
from deepdoctor.data.prompt import Prompt
from deepdoctor.model.generate import Generator
from deepdoctor.model.text_stream import Kind, TextStream
from deepdoctor.model.tokenizer import StreamDecoder
from deepdoctor.run_folder import RunFolder
from deepdoctor.session import Session

__all__ = ["ask", "ask_and_keep", "print_answers"]

FRAMES_PER_S = 8
"""Most often the screen is drawn anew while answers are written."""
DRAWING_SHARE = 0.1
"""Of the time, at most, goes into drawing: the same thread writes the answers (10 to 20 ms a frame of 180 x 55)."""


def ask(
    session: Session,
    questions: Sequence[str],
    sides: Sequence[str],
    console: Console | None = None,
    stoppable: bool = False,
) -> list[dict[str, Any]]:
    """Ask every question of every side with the recipe's ``ask`` settings; return the answer records.

    console: where it is a terminal, a single question's answers are shown there while they are written; they are erased
    at the end, and their records have ``tokens_per_s``. stoppable: the first Ctrl-C ends the answers with what they
    have, and their records have ``stopped`` set; a second one acts at once.
    """
    section = session.recipe.ask
    adapter = session.adapter if "tuned" in sides else None
    sampling = session.sampling(section, session.recipe.seed)
    generator = Generator(
        session.decoder,
        adapter,
        session.prompt.stop_ids,
        section.batch_size,
        session.reduced,
        session.words,
        kv_format=section.kv_cache,
    )
    items = [Item("ask", f"q{number}", question) for number, question in enumerate(questions, 1)]
    keys = [(number, side) for number in range(len(items)) for side in sides]
    screen = meter = None
    with ExitStack() as stack:
        if console and console.is_terminal and not console.is_dumb_terminal and len(items) == 1:
            screen = stack.enter_context(_Screen(console, questions[0], sides, session.prompt))
        else:
            total = len(keys) * sampling.max_new_tokens
            meter = stack.enter_context(session.reporter.meter("ask", total, "tokens at most"))
        stop = stack.enter_context(_first_ctrl_c()) if stoppable else threading.Event()

        def on_token(number: int, side: str, token: int) -> None:
            if screen:
                screen.take(side, token)
            elif meter:
                meter.advance()
            if stop.is_set():
                for key in keys:
                    generator.cancel(key)

        def on_record(record: dict[str, Any]) -> None:
            if stop.is_set() and not record["cut_off"]:
                record["stopped"] = True
            if screen:
                screen.end(record)

        return answer_items(items, generator, session.prompt, sampling, sides, on_record, on_token)


@contextmanager
def _first_ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag; a second one raises KeyboardInterrupt."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def note(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def ask_and_keep(session: Session, run: RunFolder, name: str, sides: Sequence[str]) -> list[dict[str, Any]]:
    """Ask the recipe's questions once and keep the answers in ``ask/<name>.jsonl``."""
    path = run.path / "ask" / f"{name}.jsonl"
    if path.exists():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    records = ask(session, session.recipe.ask.questions, sides)
    _write_lines(path, records)
    return records


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    partial.replace(path)


def print_answers(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print each question with its sides in columns, thinking dimmed."""
    by_question: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_question.setdefault(record["question"], []).append(record)
    for question, sides in by_question.items():
        console.print(Text(question, style="bold"))
        table = Table(expand=True, show_lines=False)
        for record in sides:
            table.add_column(record["side"], ratio=1, overflow="fold")
        table.add_row(*(_cell(record) for record in sides))
        console.print(table)


def _cell(record: dict[str, Any]) -> Text:
    stopped = record.get("stopped", False)
    cell = _text(record["thinking"] or "", record["answer"])
    if not record["answer"]:
        cell.append("\n\n" if record["thinking"] else "")
        cell.append("(stopped)" if stopped else "(no answer)", style="italic")
    elif stopped:
        cell.append(" (stopped)", style="italic")
    notes = [_count(record["thinking_tokens"], record["answer_tokens"], record.get("tokens_per_s"))]
    if record["cut_off"]:
        notes.append("cut off at the token limit")
    if not record["thinking"] and not stopped:
        notes.append("no thinking")
    return cell.append("\n\n" + ", ".join(notes), style="dim italic")


def _text(thinking: str, answer: str) -> Text:
    """Dimmed thinking, a blank line, the answer; without what is empty."""
    text = Text()
    if thinking:
        text.append("thinking: ", style="dim bold").append(thinking, style="dim")
        text.append("\n\n" if answer else "")
    return text.append(answer)


def _count(thinking: int, answer: int, tokens_per_s: float | None) -> str:
    rate = f", {tokens_per_s:.0f} tok/s" if tokens_per_s else ""
    return f"{thinking} thinking + {answer} answer tokens{rate}"


class _Written:
    """What one side has written so far. tokens: by kind; the tag that ends the thinking counts as thinking."""

    def __init__(self, stream: TextStream):
        self.tokens: dict[Kind, int] = {"thinking": 0, "answer": 0}
        self.ended = False
        self._stream = stream
        self._text: dict[Kind, str] = {"thinking": "", "answer": ""}
        self._from = 0
        self._first_s = self._last_s = 0.0

    def take(self, token: int, now_s: float) -> None:
        """Add a token drawn at ``now_s``."""
        if not sum(self.tokens.values()):
            self._first_s = now_s
        self._last_s = now_s
        self.tokens[self._stream.kind] += 1
        for kind, text in self._stream.feed(token):
            self._text[kind] += text

    @property
    def tokens_per_s(self) -> float | None:
        """Rate from the first token to the last, so without the prompt; None before the second token."""
        seconds = self._last_s - self._first_s
        return (sum(self.tokens.values()) - 1) / seconds if seconds > 0 else None

    def last_lines(self, console: Console, width: int, height: int) -> Text:
        """The end of the text, as many lines as fit; a long text is not broken into lines as a whole."""
        text = _text(self._text["thinking"], self._text["answer"])
        room = width * height
        if len(text) - self._from > 2 * room:
            # The begin moves rarely, and to the begin of a line or word, so that what is shown does not rewrap.
            last = len(text) - room
            near = max(text.plain.rfind("\n", self._from, last), 0) or max(text.plain.rfind(" ", self._from, last), 0)
            self._from = near + 1 if near else last
        lines = text[self._from :].wrap(console, width, overflow="fold")[-height:]
        return Text("\n", no_wrap=True).join(lines)

    def note(self) -> str:
        """The line below the text."""
        if not sum(self.tokens.values()):
            return "waiting"
        return _count(self.tokens["thinking"], self.tokens["answer"], self.tokens_per_s) + ", done" * self.ended


class _Screen:
    """One question's sides in columns on a terminal while they are written, from the first token to the end."""

    def __init__(self, console: Console, question: str, sides: Sequence[str], prompt: Prompt):
        self.console = console
        self.question = " ".join(question.split())
        self.written = {
            side: _Written(TextStream(StreamDecoder(prompt.tokenizer), prompt.opens_think)) for side in sides
        }
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next_s = 0.0

    def __enter__(self) -> _Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def take(self, side: str, token: int) -> None:
        """Add a token, and draw where it is time."""
        now = time.perf_counter()
        self.written[side].take(token, now)
        if now >= self._next_s:
            self._live.start()  # at the first token: what is logged before it stays above
            self._live.update(self.frame(), refresh=True)
            self._next_s = now + max(1 / FRAMES_PER_S, (time.perf_counter() - now) / DRAWING_SHARE)

    def end(self, record: dict[str, Any]) -> None:
        """Mark a side as ended, and put its rate into the record."""
        written = self.written[record["side"]]
        written.ended = True
        record["tokens_per_s"] = written.tokens_per_s and round(written.tokens_per_s, 1)

    def frame(self) -> Group:
        """The question's first line, the last lines of each side, and a line on each."""
        columns = len(self.written)
        # Borders and blanks between columns; question, two lines for the head, three rules, the note, a line to spare.
        width = max((self.console.width - 3 * columns - 1) // columns, 1)
        height = max(self.console.height - 8, 1)
        table = Table(expand=True)
        for side in self.written:
            table.add_column(side, ratio=1, overflow="fold")
        texts = [w.last_lines(self.console, width, height) for w in self.written.values()]
        table.add_row(*texts, end_section=True)
        notes = [Text(w.note(), "dim italic", no_wrap=True, overflow="ellipsis") for w in self.written.values()]
        table.add_row(*notes)
        return Group(Text(self.question, style="bold", no_wrap=True, overflow="ellipsis"), table)
