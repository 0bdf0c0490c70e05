"""``deepdoctor data``: the check on its own, for a recipe or for a bare file of rows."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any

from deepdoctor.data.stage import prepare_data, read_and_check
from deepdoctor.recipe import load_recipe
from deepdoctor.run_folder import RunFolder
from deepdoctor.session import Session
from deepdoctor.ui import Reporter

__all__ = ["check_source"]


def check_source(source: Path, overrides: dict[str, Any], rows: int, json: bool, reporter: Reporter) -> int:
    """Check a recipe's rows and fill its run's ``data/``, or check a file of rows and print what was found.

    Returns the exit code. Raises DataError where no row is left.
    """
    if source.suffix.lower() in (".yaml", ".yml"):
        recipe = load_recipe(source, overrides)
        run = RunFolder.create(recipe, resume=True)
        session = Session(recipe, run, reporter)
        fresh = not run.done("data")
        prepare_data(session, rows)
        path = run.path / "data" / "check.json"
        if not fresh:
            reporter.say(f"data: {run.path / 'data'} is complete already; this is what it holds")
        print(path.read_text(encoding="utf-8") if json else path)
        return 0
    bare = {"name": "check", "model": {"id": "embedded:smollm2-135m-instruct"}, "data": {"source": str(source)}}
    recipe = load_recipe(bare, overrides)
    _, report = read_and_check(Session(recipe, None, reporter), rows)
    if json:
        print(jsonlib.dumps(report.to_json(), indent=2, ensure_ascii=False))
    return 0
