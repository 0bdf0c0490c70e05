"""What a person sees while a run goes on: plain sentences and progress with rate and time left, on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Meter", "Reporter", "SilentReporter"]


class Meter:
    """Counts work done. ``note`` is shown beside the bar."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count work done."""


class Reporter:
    """Writes to stderr: bars on a terminal, a line every few seconds elsewhere."""

    line_every_s = 15.0

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line, never broken: paths stay whole where stderr is a file."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def meter(self, what: str, total: float, unit: str) -> Iterator[Meter]:
        """Show progress of ``total`` units, e.g. ("train", 60, "steps")."""
        if self.console.is_terminal:
            with self._bar() as progress:
                yield _Bar(progress, what, total)
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


class _Lines(Meter):
    def __init__(self, reporter: Reporter, what: str, total: float, unit: str):
        self.reporter, self.what, self.total, self.unit = reporter, what, total, unit
        self.started = self.printed = time.monotonic()
        self.done = 0.0

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Print a line now and then, and at the end."""
        self.done += amount
        now = time.monotonic()
        if now - self.printed < self.reporter.line_every_s and self.done < self.total:
            return
        self.printed = now
        left = (now - self.started) / self.done * max(self.total - self.done, 0) if self.done else 0.0
        count = f"{self.what}: {self.done:g}/{self.total:g} {self.unit}"
        self.reporter.say(f"{count}, {now - self.started:.0f} s, {left:.0f} s left  {note}".rstrip())


class SilentReporter(Reporter):
    """Says nothing; what the Python API uses unless told otherwise."""

    def say(self, text: str, style: str | None = None) -> None:
        """Drop the line."""

    @contextmanager
    def meter(self, what: str, total: float, unit: str) -> Iterator[Meter]:
        """Count in silence."""
        yield Meter()
