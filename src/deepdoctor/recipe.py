"""Every setting of a run, typed: one frozen section per stage, unknown keys refused.

The same class serves the YAML file, the command line and the Python API. Precedence, highest first: command line
flag (``--train.max_steps 20``), environment (``DD_TRAIN__MAX_STEPS=20``), recipe file, default.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from deepdoctor.errors import RecipeError
from deepdoctor.sizes import Size

__all__ = [
    "AskSection",
    "CompareSection",
    "DataSection",
    "ExportSection",
    "ModelSection",
    "Recipe",
    "SamplingSection",
    "Section",
    "TrainSection",
    "load_recipe",
]

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Doubt = Literal[
    "picture_in_reasoning", "duplicate_question", "near_duplicate", "uniform_opening", "chat_markers", "injection",
    "markup", "personal_data", "language_mix", "answer_in_question", "unsupported_answer",
]  # fmt: skip
ENV_PREFIX = "DD_"


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, docstrings become the schema's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSection(Section):
    """Which base model, and in which precision it is held."""

    id: str
    """``embedded:smollm2-135m-instruct``, a Hub id, a local folder, or a ``.gguf`` file."""
    revision: str | None = None
    """Hub commit, tag or branch; pin a commit for a run that others can repeat."""
    precision: Literal["auto", "nf4", "fp8", "bf16", "fp16", "fp32"] = "auto"
    """How the frozen base is held (fp8: in bf16, trained by fp8 products). auto: as stored where it is 4-bit; else bf16
    on a GPU that has it (fp16 where not), and on a CPU whichever of bf16 and fp32 multiplies faster there."""
    double_quant: bool = True
    """NF4 only: quantise the block scales too, as bitsandbytes does. Source: QLoRA (arXiv 2305.14314)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one. ``cuda`` on a machine without one is an error."""
    vram: Size | None = None
    """Use no more of the GPU than a card of this size has, e.g. ``15GiB`` (null: the whole card)."""


class DataSection(Section):
    """Which rows, in which words, and what is done with the doubtful ones."""

    source: str
    """``embedded:rows``, a Hub data set id, or a .jsonl, .json, .csv or .parquet file."""
    config: str | None = None
    """Hub configuration name, e.g. ``en``."""
    revision: str | None = None
    """Hub commit, tag or branch of the data set."""
    split: str = "train"
    """Hub split."""
    question: str = "Question"
    """Column that holds the question."""
    reasoning: str = "Complex_CoT"
    """Column that holds the chain of thought."""
    answer: str = "Response"
    """Column that holds the final answer."""
    max_rows: PositiveInt | None = None
    """Take only the first N rows of the source (null: all)."""
    held_out: NonNegativeInt | NonNegativeFloat = Field(default=0.05, union_mode="left_to_right")
    """Rows kept out of training: a count (16) or a share (0.05). A hash of the question decides, so a share never
    moves a row across."""
    template: str = "native"
    """``native`` (the model's own chat format), ``tutorial`` (instruction format), or the path of a Jinja file."""
    system: str | None = None
    """System message; null leaves the template's own default."""
    max_seq_len: PositiveInt = 2048
    """Tokens a row may have; longer rows are handled by ``too_long``."""
    too_long: Literal["drop", "error"] = "drop"
    """Rows over max_seq_len are dropped and named, or stop the run; they are never cut."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Second and later copies of the same row."""
    missing_image: Literal["drop", "keep"] = "drop"
    """Rows whose question needs a picture that is not there."""
    drop: tuple[Doubt, ...] = ()
    """Findings whose rows go too, e.g. ``[near_duplicate, markup]``; all others of these are kept and named."""
    overlap: Literal["drop", "keep"] = "keep"
    """Training rows that look like a question of ``compare.tasks``; they are counted in any case."""
    train_on: Literal["reasoning_and_answer", "answer", "all"] = "reasoning_and_answer"
    """Which tokens carry loss; ``all`` adds the prompt."""

    @field_validator("held_out", mode="after")
    @classmethod
    def _share_below_one(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            if value != int(value):
                raise ValueError("a share must be below 1; write a whole number to hold out that many rows")
            return int(value)
        return value


class TrainSection(Section):
    """The LoRA adapter and the optimizer."""

    lora_rank: PositiveInt = 16
    """R, the adapter's inner width. Source: LoRA (arXiv 2106.09685), 8 to 64 usual."""
    lora_alpha: PositiveFloat = 16
    """The adapter's product is scaled by alpha / R (alpha / sqrt(R) with rslora)."""
    lora_dropout: NonNegativeFloat = Field(default=0.0, lt=1)
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale by alpha / sqrt(R). Source: rsLoRA (arXiv 2312.03732)."""
    target_modules: tuple[Projection, ...] = PROJECTIONS
    """Projections that get an adapter."""
    global_batch_size: PositiveInt = 8
    """Rows per optimizer step, over all micro-batches and ranks."""
    micro_batch_size: PositiveInt | None = None
    """Most rows in one micro-batch (null: only the token budget counts). The result does not depend on it."""
    micro_batch_tokens: PositiveInt | None = None
    """Token budget of a micro-batch (null: chosen by the plan). The result does not depend on it."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; null trains for ``epochs``."""
    epochs: PositiveFloat = 1.0
    """Passes over the rows, where max_steps is null."""
    learning_rate: PositiveFloat = 2e-4
    """Peak AdamW step size. Source: QLoRA (arXiv 2305.14314), 7B to 13B."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero."""
    warmup_ratio: NonNegativeFloat = Field(default=0.0, lt=1)
    """Share of the steps that warm up, where warmup_steps is 0."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with state in fp32, or in 8 bits: a quarter of the memory, on a CPU slower."""
    attention: Literal["auto", "fa4", "flash", "efficient", "rows"] = "auto"
    """Attention on a GPU. auto: the fastest that is worth its start-up. fa4 needs the package flash-attn-4."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the adapter."""
    beta1: NonNegativeFloat = Field(default=0.9, lt=1)
    """AdamW's first moment decay."""
    beta2: NonNegativeFloat = Field(default=0.999, lt=1)
    """AdamW's second moment decay."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient's global norm to this; 0 switches clipping off."""
    shuffle: bool = True
    """Draw a new row order each epoch from the seed; false keeps the source's order."""
    eval_steps: NonNegativeInt = 0
    """Held-out loss every N steps; 0: only before and after."""
    save_steps: NonNegativeInt = 50
    """Checkpoint every N steps; 0: only at the end and on Ctrl-C."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept on disk."""

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if not value:
            raise ValueError("name at least one projection")
        return tuple(p for p in PROJECTIONS if p in value)

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainSection:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("set warmup_steps or warmup_ratio, not both")
        return self


class SamplingSection(Section):
    """How answers are drawn; base and tuned always share it."""

    max_new_tokens: PositiveInt = 1024
    """Tokens an answer may have, thinking included."""
    temperature: NonNegativeFloat | None = None
    """0 is greedy. null: what the model's authors recommend (R1 family: 0.6), else greedy."""
    top_p: PositiveFloat | None = Field(default=None, le=1)
    """Nucleus sampling. null: what the model's authors recommend (R1 family: 0.95), else 1."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides the logits of tokens already in prompt or answer (CTRL, arXiv 1909.05858); 1 is off."""
    batch_size: PositiveInt = 16
    """Answers written at once."""


class AskSection(SamplingSection):
    """Questions put to base and tuned, before and after, for people to read."""

    questions: tuple[str, ...] = ()
    """Asked of the base before training and of both sides after it."""
    max_new_tokens: PositiveInt = 1200
    """Tokens an answer may have, thinking included."""


class CompareSection(SamplingSection):
    """The measurement: both sides answer the same unseen questions."""

    held_out_loss: bool = True
    """Loss and perplexity on the held-out rows, reasoning and answer apart."""
    held_out_questions: NonNegativeInt = 16
    """Held-out rows whose question both sides answer, judged by form and length."""
    tasks: tuple[str, ...] = ()
    """Four-option questions: ``embedded:questions`` or JSONL files with id, question, options, answer."""
    max_questions: PositiveInt | None = None
    """Questions per task, drawn by seeded hash, never the first N (null: all)."""


class ExportSection(Section):
    """What is written for use elsewhere."""

    adapter: bool = True
    """``export/adapter``: PEFT files."""
    merged: bool = True
    """``export/merged``: safetensors in the base's 16-bit (or 32-bit) weights, checked against base + adapter."""


class Recipe(Section):
    """One run, from rows to a served model."""

    name: str = "run"
    """Folder under ``runs_dir``."""
    runs_dir: str = "runs"
    """Where run folders live."""
    seed: NonNegativeInt = 3407
    """Row order, adapter start, dropout and sampling all follow from it."""
    model: ModelSection
    """Base model."""
    data: DataSection
    """Training rows."""
    train: TrainSection = TrainSection()
    """Adapter and optimizer."""
    ask: AskSection = AskSection()
    """Questions for people to read."""
    compare: CompareSection = CompareSection()
    """The measurement."""
    export: ExportSection = ExportSection()
    """Files for use elsewhere."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or value in {".", ".."} or any(c in value for c in "/\\\0"):
            raise ValueError("a run name is one folder name without slashes")
        return value

    def to_yaml(self) -> str:
        """Return the resolved recipe, every field written out, as YAML text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


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


def read_recipe_file(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Read a recipe file.

    path: YAML file. Returns the nested values and the line of every key. Raises RecipeError for a missing file, text
    that is not YAML, or a top level that is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise RecipeError(
            f"there is no recipe file {path}",
            f"{path.parent} has {', '.join(near)}" if near else "write one: `deepdoctor schema` lists every field",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(
            f"recipe file {path} cannot be read: {why}", "give a YAML file such as those in recipes/"
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
            "start from one of recipes/, or see `deepdoctor schema`",
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

    source: path of a YAML file, a nested mapping, or a Recipe. overrides: nested mapping, e.g.
    ``{"train": {"max_steps": 20}}``. environ: defaults to ``os.environ``; only ``DD_SECTION__FIELD`` names are read.
    Raises RecipeError naming the key, the file and line or variable, the value and what was expected.
    """
    lines: dict[tuple[str, ...], int] = {}
    where = "recipe"
    if isinstance(source, Recipe):
        values: dict[str, Any] = source.model_dump(exclude_unset=True)
    elif isinstance(source, Mapping):
        values = dict(source)
    else:
        where = str(source)
        values, lines = read_recipe_file(Path(source))
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
