"""From a YAML file, the environment and the command line to a recipe, and from what is wrong in one to a sentence.

A name without folder or ending stands for a recipe that comes with the package, unless there is a file of that name.

Precedence, highest first: command line flag (``--train.max_steps 20``), environment (``DD_TRAIN__MAX_STEPS=20``),
recipe file, default.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from deepdoctor.errors import RecipeError
from deepdoctor.recipe import Recipe, Section

__all__ = ["find_recipe", "is_recipe", "known_keys", "load_recipe", "read_recipe_file", "shipped_recipes"]

ENV_PREFIX = "DD_"
SHIPPED = Path(__file__).parent / "recipes"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``2e-4`` as a number; YAML 1.1 wants a dot in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+[eE][-+]?\d+$"), list("-+0123456789.")
)


def _lines(node: yaml.Node, file: Path, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Map each key path of a YAML mapping to its 1-based line. Raises RecipeError for a key written twice."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            if path in found:
                raise RecipeError(
                    f"{'.'.join(path)} is written twice ({file}, lines {found[path]} and {_line(key)})",
                    "keep the one you mean",
                )
            found[path] = _line(key)
            found.update(_lines(value, file, path))
    return found


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """Return the file a recipe is read from: the path given, or the shipped recipe of that name."""
    path = Path(source)
    return path if path.is_file() else shipped_recipes().get(str(source), path)


def is_recipe(source: str | Path) -> bool:
    """Whether a path or name means a recipe, and not rows or a folder."""
    return find_recipe(source).suffix.lower() in (".yaml", ".yml")


def read_recipe_file(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Read a recipe file.

    path: YAML file. Returns the nested values and the line of every key. Raises RecipeError for a missing file, text
    that is not YAML, or a top level that is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        own = ", ".join(shipped_recipes())
        hint = (
            f"DeepDoctor comes with {own}: `deepdoctor run NAME`, or `deepdoctor recipe NAME > mine.yaml` to change it"
        )
        raise RecipeError(
            f"there is no recipe file {path}", f"{path.parent} has {', '.join(near)}" if near else hint
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(
            f"recipe file {path} cannot be read: {why}", "give a YAML file such as `deepdoctor recipe demo` prints"
        ) from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{path}{where} is not YAML: {getattr(error, 'problem', None) or error}",
            "write one `key: value` a line, nested by two spaces",
        ) from None
    if not isinstance(values, dict) or node is None:
        kind = "empty" if values is None else "a list" if isinstance(values, list) else "plain text"
        raise RecipeError(
            f"{path} is {kind}, expected sections such as model, data and train",
            "start from `deepdoctor recipe demo`, or see `deepdoctor schema`",
        )
    return values, _lines(node, path)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """``DD_TRAIN__MAX_STEPS=20`` -> ``{"train": {"max_steps": "20"}}``.

    Values stay text, as on the command line; ``null`` clears a field and ``[a, b]`` is a list. Names without ``__``
    that are no field of the recipe belong to other programs (Datadog sets DD_API_KEY) and are left alone.
    """
    values: dict[str, Any] = {}
    for name in sorted(environ):
        path = name.removeprefix(ENV_PREFIX).lower().split("__")
        if not name.startswith(ENV_PREFIX) or (len(path) == 1 and path[0] not in Recipe.model_fields):
            continue
        leaf: Any = environ[name]
        if leaf == "null" or leaf.startswith("["):
            try:
                leaf = yaml.load(leaf, Loader=_Loader)
            except yaml.YAMLError:
                raise RecipeError(
                    f"{'.'.join(path)} is {leaf!r}: expected a list (environment: {name})", "write [one, two]"
                ) from None
        for key in reversed(path):
            leaf = {key: leaf}
        values = _merge(values, leaf)
    return values


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Return every settable dotted key, e.g. ``train.max_steps``."""
    keys = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            keys.append(prefix + name)
            keys += known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_type": "a whole number",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "literal_error": "{expected}",
    "model_type": "keys and values, nested by two spaces",
    "string_type": "text",
    "tuple_type": "a list, e.g. [one, two]",
}
"""What a field wants, by pydantic's name of the complaint."""


def _key_path(error: Mapping[str, Any]) -> tuple[str, ...]:
    """The recipe key of a pydantic error: entries of a list count, branches of a union (held_out) do not."""
    path: list[str] = []
    section: Any = Recipe
    for part in map(str, error["loc"]):
        fields = section.model_fields if isinstance(section, type) and issubclass(section, Section) else None
        if fields is None and not part.isdigit():
            break
        path.append(part)
        section = fields[part].annotation if fields and part in fields else None
    return tuple(path)


def _describe(error: Mapping[str, Any], place: str) -> RecipeError:
    """Turn one pydantic error into a sentence with key, place, value and expectation."""
    path = _key_path(error)
    key = ".".join(path) or "recipe"
    kind = error["type"]
    if kind == "extra_forbidden":
        known = known_keys()
        near = difflib.get_close_matches(key, known, 1, 0.6)
        leaf = difflib.get_close_matches(path[-1], [k.rsplit(".", 1)[-1] for k in known], 1, 0.75)
        if not near and leaf:
            near = [k for k in known if k.rsplit(".", 1)[-1] == leaf[0]][:1]
        hint = f"did you mean `{near[0]}`?" if near else "`deepdoctor schema` lists every key"
        return RecipeError(f"{key} is not a recipe key ({place})", hint)
    if kind == "missing":
        under = f" under `{'.'.join(path[:-1])}:`" if path[:-1] else " at the top level"
        return RecipeError(f"{key} is missing ({place})", f"add `{path[-1]}:`{under}")
    value = error.get("input")
    shown = ":" if isinstance(value, dict) else f" is {'null' if value is None else repr(value)}:"
    if kind in _EXPECTED:
        message = "expected " + _EXPECTED[kind].format(**error.get("ctx", {}))
        if key == "data.held_out" and kind != "greater_than_equal":
            message = "expected a count (16) or a share below 1 (0.05)"
    else:
        message = error["msg"].removeprefix("Value error, ")
    return RecipeError(
        f"{key}{shown} {message[:1].lower() + message[1:]} ({place})", "`deepdoctor schema` gives types and ranges"
    )


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Recipe:
    """Resolve a recipe: file (or mapping), then environment, then overrides; the last wins.

    source: path of a YAML file, name of a shipped recipe, a nested mapping, or a Recipe. overrides: nested mapping,
    e.g. ``{"train": {"max_steps": 20}}``. environ: defaults to ``os.environ``; only ``DD_SECTION__FIELD`` names are
    read.
    Raises RecipeError naming the key, the file and line or variable, the value and what was expected.
    """
    lines: dict[tuple[str, ...], int] = {}
    where = "recipe"
    if isinstance(source, Recipe):
        values: dict[str, Any] = source.model_dump(exclude_unset=True)
    elif isinstance(source, Mapping):
        values = dict(source)
    else:
        file = find_recipe(source)
        where = str(file)
        values, lines = read_recipe_file(file)
    from_env = _environment(os.environ if environ is None else environ)
    overrides = dict(overrides or {})
    try:
        return Recipe.model_validate(_merge(_merge(values, from_env), overrides))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = _key_path(first)
        # A list is given as a whole, so its entries have the place of the list.
        given = tuple(part for part in path if not part.isdigit())
        if _has(overrides, given):
            place = "command line: --" + ".".join(given)
        elif _has(from_env, given):
            place = "environment: " + ENV_PREFIX + "__".join(given).upper()
        else:
            line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
            place = f"{where}, line {line}" if line else where
        raise _describe(first, place) from None


def _has(values: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return bool(path)
