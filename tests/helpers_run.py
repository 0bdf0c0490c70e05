"""Small rows, small recipes and the command line in this process, for tests of whole runs."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, data (stdout), story (stderr)."""

    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], *words: object) -> Outcome:
    """Run ``deepdoctor`` in this process and return what it did; anything it raises is a traceback, and fails."""
    from deepdoctor.cli import main

    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


def asset_rows(count: int) -> list[dict[str, str]]:
    """The first rows of the embedded set, each text cut to a few words so that a tiny model is quick with them."""
    lines = (files("deepdoctor") / "assets" / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:count]
    words = {"Question": 10, "Complex_CoT": 12, "Response": 8}
    rows = [json.loads(line) for line in lines]
    return [{name: " ".join(row[name].split()[:most]) for name, most in words.items()} for row in rows]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSONL; return the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(base: Path, folder: Path, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of a few seconds: 14 short rows, 4 held out, 4 steps, answers of 6 tokens; ``sections`` change it."""
    source = folder / "rows.jsonl"
    if not source.exists():
        write_rows(source, asset_rows(14))
    values: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "seed": 7,
        "model": {"id": str(base), "precision": "bf16", "device": "cpu"},
        "data": {"source": str(source), "held_out": 4},
        "train": {
            "lora_rank": 4,
            "lora_alpha": 8,
            "max_steps": 4,
            "global_batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 2,
        },
        "ask": {"questions": ["What is the dose?"], "max_new_tokens": 6, "temperature": 0},
        "compare": {"held_out_questions": 2, "max_new_tokens": 6, "temperature": 0},
    }
    for section, changes in sections.items():
        values[section] = {**values[section], **changes} if isinstance(changes, Mapping) else changes
    return deepcopy(values)


def write_recipe(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a recipe file; return its path."""
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder: equal snapshots mean nothing was written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            state = path.stat()
            found[str(path.relative_to(folder))] = (state.st_size, state.st_mtime_ns)
    return found
