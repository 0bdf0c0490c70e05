"""What commands share: every recipe field as an option, and who tells the story meanwhile."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, get_origin

import yaml
from cyclopts import Parameter
from pydantic import BaseModel, BeforeValidator, create_model

from deepdoctor.recipe import Recipe, Section
from deepdoctor.recipe_file import load_recipe
from deepdoctor.ui import Reporter

__all__ = ["Fields", "Several", "given_fields", "make_reporter", "resolve_recipe"]


def _items(given: Any) -> Any:
    """The items of a list that was given as one word in brackets; any other words as they are.

    What is JSON has been parsed before, and comes as a list in a list.
    """
    word = given[0] if isinstance(given, list) and len(given) == 1 else None
    if isinstance(word, str) and word.startswith("[") and word.endswith("]"):
        try:
            word = yaml.safe_load(word)
        except yaml.YAMLError:
            return given
    return word if isinstance(word, list) and all(isinstance(item, str) for item in word) else given


def _optional(section: type[BaseModel], name: str) -> type[BaseModel]:
    """Return a copy of a section in which every field may be left out and holds the words of the command line.

    Values stay text here; the recipe converts and checks them, so that a wrong one is named as in a file.
    """
    fields: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        kind: Any = field.annotation
        note = " ".join((field.description or "").split())
        if isinstance(kind, type) and issubclass(kind, Section):
            kind = _optional(kind, f"{name}_{key}")
        else:
            if not field.is_required() and field.default not in (None, ()):
                shown = field.default if not isinstance(field.default, tuple) else " ".join(field.default)
                note = f"{note} [default: {shown}]"
            kind = list[str] if get_origin(kind) is tuple else str
        several = kind == list[str]
        option = Parameter(help=note, negative=(), consume_multiple=several)
        fields[key] = (Annotated[kind | None, option, BeforeValidator(_items)], None)
    return create_model(name, **fields)


Overrides: Any = _optional(Recipe, "Overrides")
Fields = Annotated[
    Overrides | None, Parameter(name="*", group="Recipe fields, above file and environment", name_transform=str)
]
Several = Parameter(consume_multiple=True, negative=())
"""An option that takes several words: ``--what adapter merged``."""


def given_fields(fields: BaseModel | None) -> dict[str, Any]:
    """The values given on the command line, nested; the word null clears a field, or empties a list.

    A list is several words (``--export.gguf f16 q8_0``) or one, written as in the file (``[f16, q8_0]``).
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [] if value == ["null"] else value
        return None if value == "null" else value

    return plain(fields.model_dump(exclude_unset=True)) if fields is not None else {}


def resolve_recipe(path: Path, fields: Any, vram: str | None = None, engine: str | None = None) -> Recipe:
    """Return a recipe file with the fields given on the command line. Raises RecipeError."""
    overrides = given_fields(fields)
    if engine is not None:
        overrides.setdefault("compare", {})["engine"] = engine
    if vram is not None:
        overrides.setdefault("model", {})["vram"] = vram
    return load_recipe(path, overrides)


def make_reporter(verbose: bool = True) -> Reporter:
    """Return who writes the story to stderr, with the libraries' own chatter off."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    for noisy in ("httpx", "httpx2", "urllib3", "datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return Reporter()
