"""``deepdoctor data``: the check on its own, for a recipe or for a bare file of rows."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepdoctor.data.sources import load_rows
from deepdoctor.data.stage import prepare_data, read_and_check
from deepdoctor.errors import DeepDoctorError, RunError
from deepdoctor.recipe import DataSection
from deepdoctor.recipe_file import is_recipe, load_recipe
from deepdoctor.run_folder import RunFolder
from deepdoctor.session import Session
from deepdoctor.ui import Reporter

if TYPE_CHECKING:
    from deepdoctor.data.rows import Row

__all__ = ["check_source"]


def check_source(
    source: Path, overrides: dict[str, Any], rows: int, json: bool, reporter: Reporter, page: Path | None = None
) -> int:
    """Check a recipe's rows and fill its run's ``data/``, or check a file of rows and print what was found.

    page: where to write the check as HTML (None: nowhere). Returns the exit code. Raises DataError where no row is
    left, RunError where the page cannot be written.
    """
    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        raise RunError(f"{page} cannot be written", "give `--page` a file in a folder that exists")
    if is_recipe(source):
        recipe = load_recipe(source, overrides)
        run = RunFolder.create(recipe, resume=True)
        session = Session(recipe, run, reporter)
        fresh = not run.done("data")
        prepared = prepare_data(session, rows)
        path = run.path / "data" / "check.json"
        if not fresh:
            reporter.say(f"data: {run.path / 'data'} is complete already; this is what it holds")
        text = path.read_text(encoding="utf-8")
        print(text if json else path)
        check = jsonlib.loads(text)
        kept = [*prepared.train, *prepared.held_out]
    else:
        bare = {"name": "check", "model": {"id": "embedded:smollm2-135m-instruct"}, "data": {"source": str(source)}}
        recipe = load_recipe(bare, overrides)
        kept, report = read_and_check(Session(recipe, None, reporter), rows)
        check = report.to_json()
        if json:
            print(jsonlib.dumps(check, indent=2, ensure_ascii=False))
    if page is not None:
        from deepdoctor.data.page import write_page

        write_page(page, check, kept, _rows_again(recipe.data))
        if json:
            reporter.say(f"page: {page}")
        else:
            print(page)
    return 0


def _rows_again(section: DataSection) -> list[Row]:
    """The rows as read, dropped ones too, to quote from; none where the source is no longer there."""
    try:
        return load_rows(section)
    except DeepDoctorError:
        return []
