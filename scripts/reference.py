"""Write docs/reference/cli.md and recipe.md from the command line's own help and the recipe's own fields.

``python scripts/reference.py`` writes them; with ``--check`` it only says whether they are up to date (exit code 1).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from rich.console import Console

from deepdoctor.cli import app
from deepdoctor.recipe import Recipe, Section

__all__ = ["main", "pages"]

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
WIDTH = 100
NOTE = "<!-- Written by `python scripts/reference.py`; change the source, not this page. -->"
FIELDS_PANEL = "╭─ Recipe fields"


def pages() -> dict[str, str]:
    """Return the text of each page by file name."""
    return {"cli.md": _cli(), "recipe.md": _recipe()}


def _help(*words: str) -> str:
    """``deepdoctor WORDS --help``, without the recipe fields that several commands share."""
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=False, color_system=None)
    app.help_print(list(words), console=console)
    lines, inside = [], False
    for line in console.file.getvalue().splitlines():  # type: ignore[attr-defined]
        inside = inside or line.startswith(FIELDS_PANEL)
        if not inside:
            lines.append(line.rstrip())
        elif line.startswith("╰"):
            inside = False
            lines.append("Every recipe field is an option too: --train.max_steps 20, see recipe.md.")
    return "\n".join(lines).strip()


def _cli() -> str:
    commands = [name for name in app if not name.startswith("-")]
    parts = [
        "# Command line",
        NOTE,
        "Answers, paths and `--json` go to stdout, the story to stderr. Exit codes: 0 done, 1 failed, 2 wrong command "
        "or recipe, 130 stopped with Ctrl-C.",
        f"```text\n{_help()}\n```",
        *(f"## deepdoctor {name}\n\n```text\n{_help(name)}\n```" for name in commands),
    ]
    return "\n\n".join(parts) + "\n"


def _recipe() -> str:
    parts = [
        "# Recipe",
        NOTE,
        "One YAML file describes a run; see [recipes/](../../recipes). Unknown keys are refused. Precedence, highest "
        "first: option (`--train.max_steps 20`), environment (`DD_TRAIN__MAX_STEPS=20`), file, default. On the command "
        "line and in the environment `null` clears a field. `deepdoctor schema` prints the same as a JSON schema.",
    ]
    sections = {name: field for name, field in Recipe.model_fields.items() if _section(field)}
    plain = {name: field for name, field in Recipe.model_fields.items() if name not in sections}
    parts.append("## Top level\n\n" + _table(plain, ""))
    for name, field in sections.items():
        section = _section(field)
        assert section is not None
        parts.append(f"## {name}\n\n{_words(section.__doc__)}\n\n{_table(section.model_fields, f'{name}.')}")
    return "\n\n".join(parts) + "\n"


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _table(fields: dict[str, FieldInfo], prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        cells = (f"`{prefix}{name}`", _type(field), _default(field), _words(field.description))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _words(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


def _type(field: FieldInfo) -> str:
    return " or ".join(_kinds(field.annotation, list(field.metadata)))


def _kinds(kind: Any, limits: list[Any]) -> list[str]:
    """The words for a type with its range: a union gives several."""
    arguments = get_args(kind)
    if hasattr(kind, "__metadata__"):
        return _kinds(arguments[0], [*kind.__metadata__, *limits])
    if get_origin(kind) is tuple:
        return ["list of " + " or ".join(_kinds(arguments[0], []))]
    if kind is type(None):
        return ["null"]
    if kind is Ellipsis or not arguments:
        named = {str: "text", int: "whole number", float: "number", bool: "true or false"}
        return [named[kind] + "".join(f" {_limit(limit)}" for limit in limits if _limit(limit))]
    if all(isinstance(argument, str) for argument in arguments):
        return [f"`{argument}`" for argument in arguments]
    return [word for argument in arguments for word in _kinds(argument, [] if argument is type(None) else limits)]


def _limit(limit: Any) -> str:
    signs = {annotated_types.Gt: ">", annotated_types.Ge: ">=", annotated_types.Lt: "<", annotated_types.Le: "<="}
    sign = signs.get(type(limit))
    return f"{sign} {getattr(limit, type(limit).__name__.lower())}" if sign else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or with ``--check`` name those that are out of date; returns the exit code."""
    check = "--check" in (sys.argv[1:] if arguments is None else arguments)
    stale = []
    for name, text in pages().items():
        path = FOLDER / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'written'}: {', '.join(stale)}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
