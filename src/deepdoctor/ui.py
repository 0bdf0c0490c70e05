"""What a person sees while a run goes on: plain sentences and progress with time left.

| where | sentences | progress |
|---|---|---|
| terminal | stderr | a bar |
| notebook: Jupyter, Kaggle, Colab | stdout of the cell, where stderr is red | one line that is replaced |
| file, pipe, ``!deepdoctor`` in a notebook | stderr | a line every 15 s, later every minute |

The notebook's line goes through IPython's own ``display``, which needs no widgets and which saved notebooks keep in
its last state. rich's Jupyter progress needs ipywidgets, and makes every sentence an output of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Meter", "Reporter", "SilentReporter", "in_notebook"]


class Meter:
    """Counts work done. ``note`` is shown beside the bar."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count work done."""


class Reporter:
    """Writes where a person looks; see the table above. console: another place for the sentences."""

    line_every_s = 15.0
    """Seconds between two lines of progress in a file: twice that after ten minutes, four times after thirty."""
    update_every_s = 0.5
    """Seconds between two states of a notebook's line."""

    def __init__(self, console: Console | None = None):
        if console is None:
            notebook = in_notebook()
            plain = False if notebook else None
            console = Console(stderr=not notebook, force_terminal=plain, force_jupyter=plain, highlight=False)
        self.console = console

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line, never broken: paths stay whole where stderr is a file."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def meter(self, what: str, total: float, unit: str) -> Iterator[Meter]:
        """Show progress of ``total`` units, e.g. ("train", 60, "steps")."""
        if self.console.is_terminal:
            with self._bar() as progress:
                yield _Bar(progress, what, total)
        elif in_notebook() and self.console.file in (sys.stdout, sys.stderr):
            line = _Replaced(self, what, total, unit)
            try:
                yield line
            finally:
                line.end()
        else:
            yield _Lines(self, what, total, unit)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )


class _Bar(Meter):
    def __init__(self, progress: Progress, what: str, total: float):
        self.progress = progress
        self.task = progress.add_task(what, total=total, note="")

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move the bar."""
        if note:
            self.progress.update(self.task, advance=amount, note=note)
        else:
            self.progress.advance(self.task, amount)


class _Counted(Meter):
    def __init__(self, reporter: Reporter, what: str, total: float, unit: str):
        self.reporter, self.what, self.total, self.unit = reporter, what, total, unit
        self.started = self.shown = time.monotonic()
        self.done = 0.0
        self.note = ""

    def count(self, amount: float, note: str) -> float:
        """Count; return the seconds since something was shown."""
        self.done += amount
        self.note = note or self.note
        return time.monotonic() - self.shown

    def line(self) -> str:
        """Return what is done, the time taken and left, and the last note; that is what is shown now."""
        self.shown = time.monotonic()
        taken = self.shown - self.started
        left = taken / self.done * max(self.total - self.done, 0) if self.done else 0.0
        count = f"{self.what}: {self.done:g}/{self.total:g} {self.unit}"
        return f"{count}, {taken:.0f} s, {left:.0f} s left  {self.note}".rstrip()


class _Lines(_Counted):
    def advance(self, amount: float = 1, note: str = "") -> None:
        """Print a line now and then, and at the end."""
        waited = self.count(amount, note)
        slower = min(1 + (self.shown - self.started) / 600, 4)
        if waited >= self.reporter.line_every_s * slower or self.done >= self.total:
            self.reporter.say(self.line())


class _Replaced(_Counted):
    handle: Any = None
    text = ""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Replace the line now and then."""
        if self.count(amount, note) >= self.reporter.update_every_s:
            self.show()

    def end(self) -> None:
        """Leave the line as it is at the end, also of work that stopped early; without work there is none."""
        if self.done:
            self.show()

    def show(self) -> None:
        """Show the line as it is now; the first time as a new output."""
        from IPython.display import display

        text = self.line()
        if text == self.text:
            return
        self.text = text
        data = {"text/plain": text}
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython in a terminal is none, nor is a ``!command``."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module else None
    return getattr(shell, "kernel", None) is not None


class SilentReporter(Reporter):
    """Says nothing; what the Python API uses unless told otherwise."""

    def say(self, text: str, style: str | None = None) -> None:
        """Drop the line."""

    @contextmanager
    def meter(self, what: str, total: float, unit: str) -> Iterator[Meter]:
        """Count in silence."""
        yield Meter()
