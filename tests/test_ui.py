"""What a person sees: whole lines where stderr is a file, a bar on a terminal, nothing from the Python API."""

import io

import pytest
from rich.console import Console

from deepdoctor.ui import Reporter, SilentReporter


def reporter(terminal: bool = False) -> tuple[Reporter, io.StringIO]:
    """A reporter and what it writes to, 40 columns wide."""
    sink = io.StringIO()
    return Reporter(Console(file=sink, force_terminal=terminal, width=40, highlight=False)), sink


def test_lines_are_not_broken() -> None:
    """A path longer than the line stays in one piece, and [brackets] are text, not markup."""
    shown, sink = reporter()
    shown.say("wrote " + "/long" * 30 + " [bold]")
    assert sink.getvalue() == "wrote " + "/long" * 30 + " [bold]\n"


def test_stories_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """stdout is for data."""
    Reporter().say("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_counting_without_a_terminal_prints_the_end_and_not_every_step() -> None:
    """A log gets a line every few seconds, and one at the end with the note."""
    shown, sink = reporter()
    with shown.meter("train", 50, "steps") as meter:
        for step in range(50):
            meter.advance(1, f"loss {step}")
    assert sink.getvalue().count("\n") == 1
    assert sink.getvalue().startswith("train: 50/50 steps, ")
    assert sink.getvalue().endswith("loss 49\n")


def test_counting_tells_how_long_is_left() -> None:
    """Lines between tell what is done and how long the rest takes; more than was announced is never negative."""
    shown, sink = reporter()
    shown.line_every_s = 0.0
    with shown.meter("load", 4, "layers") as meter:
        for _ in range(5):
            meter.advance()
    lines = sink.getvalue().splitlines()
    assert lines[0].startswith("load: 1/4 layers, ")
    assert len(lines) == 5
    assert all(" s left" in line and "-" not in line for line in lines)


def test_a_terminal_gets_a_bar() -> None:
    """On a terminal progress is a bar with count and note."""
    shown, sink = reporter(terminal=True)
    shown.console.width = 100
    with shown.meter("train", 2, "steps") as meter:
        meter.advance(1)
        meter.advance(1, "loss 1.5")
    assert "2/2" in sink.getvalue()
    assert "loss 1.5" in sink.getvalue()


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    """The Python API says nothing unless it is given a reporter."""
    silent = SilentReporter()
    silent.say("hello")
    with silent.meter("train", 2, "steps") as meter:
        meter.advance(2, "done")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
