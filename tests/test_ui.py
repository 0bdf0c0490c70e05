"""What a person sees: whole lines in a file, a bar on a terminal, one line in a notebook, nothing from the API."""

import io
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from deepdoctor import ui
from deepdoctor.ui import Reporter, SilentReporter, in_notebook
from helpers_run import PROJECT

CELL = """
from deepdoctor.ui import Reporter

reporter = Reporter()
reporter.update_every_s = 0.0
reporter.say("hello", style="yellow")
with reporter.meter("train", 200, "steps") as meter:
    for step in range(200):
        meter.advance(1, f"loss {step}")
with reporter.meter("nothing", 3, "rows"):
    pass
with reporter.meter("load", 4, "layers") as meter:
    meter.advance(3)
    raise RuntimeError("stopped")
"""


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


def test_long_work_prints_fewer_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hours with a step a second: a line every 15 s at first, every minute later, 146 in all and not 480."""
    now = [0.0]
    monkeypatch.setattr(ui, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shown, sink = reporter()
    printed = []
    with shown.meter("train", 7200, "steps") as meter:
        for _ in range(7200):
            now[0] += 1.0
            before = sink.tell()
            meter.advance()
            if sink.tell() > before:
                printed.append(now[0])
    waits = [later - earlier for earlier, later in pairwise(printed)]
    assert waits[0] == 16.0 and waits[-2] == 60.0 and printed[-1] == 7200.0
    assert len(printed) == 146


def test_a_notebook_gets_one_line_per_piece_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real kernel: sentences plain on stdout, progress as one replaced output, also of work that fails.

    A line of its own for each state used to flood the cell.
    """
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT / "src"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, timeout=120, allow_errors=True).execute()
    outputs: list[Any] = notebook.cells[0].outputs
    assert [output.output_type for output in outputs] == ["stream", "display_data", "display_data", "error"]
    assert (outputs[0].name, outputs[0].text) == ("stdout", "hello\n")
    train, load = (output.data["text/plain"] for output in outputs[1:3])
    assert train.startswith("train: 200/200 steps, ") and train.endswith(" s, 0 s left  loss 199")
    assert load.startswith("load: 3/4 layers, ")


def test_a_notebook_is_told_from_ipython_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a kernel's shell shows outputs; and a console of the caller's own gets progress as lines, there too."""
    assert not in_notebook()
    shell = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert not in_notebook()
    shell.kernel = object()
    assert in_notebook()
    shown, sink = reporter()
    with shown.meter("train", 1, "steps") as meter:
        meter.advance()
    assert sink.getvalue() == "train: 1/1 steps, 0 s, 0 s left\n"


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
