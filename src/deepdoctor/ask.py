"""Questions for people to read: base and tuned next to each other, thinking and answer told apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepdoctor.compare.answers import Item, answer_items
from deepdoctor.model.generate import Generator
from deepdoctor.run_folder import RunFolder
from deepdoctor.session import Session

__all__ = ["ask", "ask_and_keep", "print_answers"]


def ask(session: Session, questions: Sequence[str], sides: Sequence[str]) -> list[dict[str, Any]]:
    """Ask every question of every side with the recipe's ``ask`` settings; return the answer records."""
    section = session.recipe.ask
    adapter = session.adapter if "tuned" in sides else None
    sampling = session.sampling(section, session.recipe.seed)
    generator = Generator(session.decoder, adapter, session.prompt.stop_ids, section.batch_size, session.reduced)
    items = [Item("ask", f"q{number}", question) for number, question in enumerate(questions, 1)]
    total = len(items) * len(sides) * sampling.max_new_tokens
    with session.reporter.meter("ask", total, "tokens at most") as meter:
        return answer_items(items, generator, session.prompt, sampling, sides, on_token=meter.advance)


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
    cell = Text()
    if record["thinking"]:
        cell.append("thinking: ", style="dim bold").append(record["thinking"].strip() + "\n\n", style="dim")
    cell.append(record["answer"] or "(no answer)", style="" if record["answer"] else "italic")
    notes = [f"{record['thinking_tokens']} thinking + {record['answer_tokens']} answer tokens"]
    if record["cut_off"]:
        notes.append("cut off at the token limit")
    if not record["thinking"]:
        notes.append("no thinking")
    return cell.append("\n\n" + ", ".join(notes), style="dim italic")
