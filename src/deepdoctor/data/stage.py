"""Stage 1: a source of rows -> ``data/``: checked, encoded, split rows and ``check.json``."""

from __future__ import annotations

from deepdoctor.data.check import CheckReport, check_rows
from deepdoctor.data.show import show_rows
from deepdoctor.data.sources import load_rows
from deepdoctor.data.split import split_rows
from deepdoctor.data.store import PreparedData, load_prepared, save_prepared
from deepdoctor.run_folder import write_json
from deepdoctor.session import Session

__all__ = ["prepare_data", "read_and_check"]


def read_and_check(session: Session, show: int = 0) -> tuple[list, CheckReport]:
    """Read the source and check every row; ``show`` prints that many rows with their loss mask on stderr."""
    section = session.recipe.data
    rows = load_rows(section)
    session.reporter.say(f"data: {len(rows)} rows from {section.source}, template {session.prompt.name}")
    kept, report = check_rows(rows, session.prompt, section)
    for line in report.summary_lines():
        session.reporter.say(f"  {line}")
    if show and kept:
        show_rows(kept, session.prompt, session.reporter.console, show)
    return kept, report


def prepare_data(session: Session, show: int = 0) -> PreparedData:
    """Fill ``data/`` of the run, or read it back where it is complete.

    Writes ``check.json`` (findings, lengths), ``rows.jsonl``, ``tokens.safetensors`` and ``summary.json`` (counts and
    content hash). Raises DataError where no row is left to train on.
    """
    run, recipe = session.run, session.recipe
    assert run is not None
    folder = run.path / "data"
    if run.done("data"):
        return load_prepared(folder, session.prompt.fingerprint)
    with run.stage("data") as partial:
        kept, report = read_and_check(session, show)
        train_rows, held_rows = split_rows([row for row, _ in kept], recipe.data.held_out, recipe.seed)
        by_index = {row.index: encoded for row, encoded in kept}
        train = [(row, by_index[row.index]) for row in train_rows]
        held_out = [(row, by_index[row.index]) for row in held_rows]
        prepared = save_prepared(partial, train, held_out, session.prompt.fingerprint)
        write_json(partial / "check.json", report.to_json())
        summary = {
            "source": recipe.data.source,
            "train": len(train),
            "held_out": len(held_out),
            "read": report.rows_read,
            "dropped": report.rows_read - report.rows_kept,
            "content_hash": prepared.content_hash,
            "template": session.prompt.name,
            "prompt_fingerprint": session.prompt.fingerprint,
        }
        write_json(partial / "summary.json", summary)
    run.update(data=summary)
    session.reporter.say(f"data: {len(train)} rows to train on, {len(held_out)} held out")
    return prepared
