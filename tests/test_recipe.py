"""Recipes: who wins over whom, what the shipped files hold, and what a wrong one is answered with."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deepdoctor.errors import RecipeError
from deepdoctor.recipe import Recipe
from deepdoctor.recipe_file import known_keys, load_recipe
from helpers_run import PROJECT

RECIPES = sorted((PROJECT / "recipes").glob("*.yaml"))
LEAST = {"model": {"id": "a/b"}, "data": {"source": "rows.jsonl"}}
QUESTION = (
    "A 61-year-old woman with a long history of involuntary urine loss during activities like coughing or sneezing but "
    "no leakage at night undergoes a gynecological exam and Q-tip test. Based on these findings, what would cystometry "
    "most likely reveal about her residual volume and detrusor contractions?"
)
FILE = """\
# a comment
model:
  id: a/b
data:
  source: rows.jsonl
train:
  max_steps: 30
"""


def written(folder: Path, text: str) -> Path:
    """A recipe file with this text."""
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*arguments: Any, **named: Any) -> RecipeError:
    """The error that loading ends with; its words are held to what every message must be."""
    named.setdefault("environ", {})
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments, **named)
    error = caught.value
    assert error.exit_code == 2
    assert error.hint
    for word in ("pydantic", "http", "constrained", "Section", "NoneType", "input should", "valid integer"):
        assert word not in str(error), str(error)
    return error


# --- precedence


@pytest.mark.parametrize(
    ("environ", "overrides", "steps"),
    [
        ({}, {}, 30),
        ({"DD_TRAIN__MAX_STEPS": "20"}, {}, 20),
        ({"DD_TRAIN__MAX_STEPS": "20"}, {"train": {"max_steps": "10"}}, 10),
        ({"DD_TRAIN__MAX_STEPS": "null"}, {}, None),
        ({"DD_TRAIN__MAX_STEPS": "20"}, {"train": {"max_steps": None}}, None),
    ],
)
def test_flag_wins_over_environment_over_file(tmp_path: Path, environ: Any, overrides: Any, steps: Any) -> None:
    """A value comes from the flag, else the environment, else the file; fields nobody names keep their default."""
    recipe = load_recipe(written(tmp_path, FILE), overrides, environ)
    assert recipe.train.max_steps == steps
    assert recipe.train.learning_rate == 2e-4


def test_environment_is_read_from_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an explicit mapping, DD_ variables of the process count; a mapping of {} switches them off."""
    monkeypatch.setenv("DD_TRAIN__MAX_STEPS", "11")
    path = written(tmp_path, FILE)
    assert load_recipe(path).train.max_steps == 11
    assert load_recipe(path, environ={}).train.max_steps == 30


def test_environment_values_are_text_as_on_the_command_line() -> None:
    """Text that YAML would take for a number or a mapping stays text; [a, b] is a list."""
    environ = {
        "DD_MODEL__REVISION": "1234567",
        "DD_DATA__SYSTEM": "You are: a doctor",
        "DD_TRAIN__TARGET_MODULES": "[v_proj, q_proj]",
        "DD_TRAIN__RSLORA": "true",
        "DD_TRAIN__LEARNING_RATE": "3e-5",
        "DD_SEED": "5",
    }
    recipe = load_recipe(LEAST, environ=environ)
    assert recipe.model.revision == "1234567"
    assert recipe.data.system == "You are: a doctor"
    assert recipe.train.target_modules == ("q_proj", "v_proj")
    assert recipe.train.rslora is True
    assert (recipe.train.learning_rate, recipe.seed) == (3e-5, 5)


def test_variables_of_other_programs_are_left_alone() -> None:
    """DD_API_KEY and DD_ENV belong to Datadog; they used to stop every run on a machine with its agent."""
    assert load_recipe(LEAST, environ={"DD_API_KEY": "x", "DD_ENV": "prod", "OTHER": "1"}) == load_recipe(LEAST, {}, {})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"DD_TRAIN__MAX_STEPZ": "1"}, ("train.max_stepz", "environment: DD_TRAIN__MAX_STEPZ", "train.max_steps")),
        ({"DD_SEED": "x"}, ("seed is 'x'", "whole number", "environment: DD_SEED")),
        ({"DD_TRAIN__TARGET_MODULES": "[q_proj"}, ("train.target_modules", "list", "DD_TRAIN__TARGET_MODULES")),
    ],
)
def test_wrong_variable_is_named(environ: dict[str, str], words: tuple[str, ...]) -> None:
    """An error names the variable it came from."""
    text = str(refusal(LEAST, environ=environ))
    assert all(word in text for word in words), text


def test_a_recipe_and_a_mapping_are_sources_too() -> None:
    """The Python API takes a mapping or a Recipe, and overrides on top of both."""
    recipe = load_recipe(LEAST, environ={})
    assert load_recipe(recipe, environ={}) == recipe
    assert load_recipe(recipe, {"train": {"max_steps": 3}}, {}).train.max_steps == 3
    assert recipe.train.max_steps is None


# --- push


def test_push_takes_a_word_or_a_list() -> None:
    """`what: all` and `what: [adapter, merged]` are both written in recipes; without `to` nothing is pushed."""
    assert load_recipe(LEAST, environ={}).push.to is None
    assert load_recipe({**LEAST, "push": {"to": "me/it", "what": "merged"}}, environ={}).push.what == ("merged",)
    recipe = load_recipe({**LEAST, "push": {"to": "me/it", "what": ["adapter", "merged"]}}, environ={})
    assert recipe.push.what == ("adapter", "merged")
    assert load_recipe(yaml.safe_load(recipe.to_yaml()), environ={}) == recipe


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"push": {"to": "me/it", "what": "weights"}},
            ("push.what.0 is 'weights'", "'adapter', 'merged', 'merged_4bit', 'gguf' or 'all'"),
        ),
        ({"push": {"to": "me/it", "what": []}}, ("push.what is []", "at least one")),
        (
            {"push": {"to": "me/it", "what": "merged"}, "export": {"merged": False}},
            ("push.what names merged, which export does not write",),
        ),
        (
            {"push": {"to": "me/it"}, "export": {"merged": False, "adapter": False}},
            ("push.to is me/it, but export writes nothing",),
        ),
    ],
)
def test_push_of_what_is_not_there(sections: dict[str, Any], words: tuple[str, ...]) -> None:
    """What a run does not export cannot be pushed, which is said before the run."""
    text = str(refusal({**LEAST, **sections}))
    assert all(word in text for word in words), text


# --- the shipped recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    """Each file of recipes/ loads, opens with its goal, and equals what its resolved YAML loads as."""
    recipe = load_recipe(path, environ={})
    assert path.read_text(encoding="utf-8").startswith("# Goal:")
    assert recipe.name == path.stem
    again = load_recipe(written(tmp_path, recipe.to_yaml()), environ={})
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_there_are_recipes() -> None:
    """The three recipes the documents speak of are there."""
    assert {path.stem for path in RECIPES} >= {"demo", "tutorial", "deepdoctor-8b"}


def test_tutorial_holds_the_articles_values() -> None:
    """recipes/tutorial.yaml is the article's run, value for value."""
    from transformers import TrainingArguments

    recipe = load_recipe(PROJECT / "recipes" / "tutorial.yaml", environ={})
    model, data, train = recipe.model, recipe.data, recipe.train
    assert (model.id, model.precision) == ("unsloth/DeepSeek-R1-Distill-Llama-8B", "nf4")
    assert (data.source, data.config, data.split) == ("FreedomIntelligence/medical-o1-reasoning-SFT", "en", "train")
    assert (data.question, data.reasoning, data.answer) == ("Question", "Complex_CoT", "Response")
    assert (data.max_rows, data.held_out, data.max_seq_len) == (500, 0, 2048)
    assert (data.template, data.train_on) == ("tutorial", "all")
    assert (train.lora_rank, train.lora_alpha, train.lora_dropout, train.rslora) == (16, 16, 0, False)
    seven = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(train.target_modules) == seven
    micro, accumulated = 2, 4
    # How the step's rows are cut changes no result here, so that the plan may choose it.
    assert (train.micro_batch_size, train.global_batch_size) == (None, micro * accumulated)
    assert (train.max_steps, train.warmup_steps, train.warmup_ratio) == (60, 5, 0)
    assert (train.learning_rate, train.schedule) == (2e-4, "linear")
    assert (train.optimizer, train.weight_decay, recipe.seed) == ("adamw_8bit", 0.01, 3407)
    assert (recipe.ask.max_new_tokens, recipe.ask.questions) == (1200, (QUESTION,))
    # What the article leaves alone is what its trainer does.
    left = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
    assert train.max_grad_norm == left["max_grad_norm"]
    assert (train.beta1, train.beta2) == (left["adam_beta1"], left["adam_beta2"])


# --- what is refused


def test_unknown_key_names_line_and_near_key(tmp_path: Path) -> None:
    """A mistyped key is named with its file and line, and the key that was meant."""
    path = written(tmp_path, FILE + "  learning_rte: 1e-4\n")
    error = refusal(path)
    assert f"train.learning_rte is not a recipe key ({path}, line 8)" in error.message
    assert error.hint == "did you mean `train.learning_rate`?"


@pytest.mark.parametrize(
    ("key", "meant"),
    [("lora_rnk", "train.lora_rank"), ("learning_rate", "train.learning_rate"), ("modle", "model")],
)
def test_key_in_the_wrong_place_is_recognised(key: str, meant: str) -> None:
    """A key at the top level that belongs into a section is answered with where it belongs."""
    assert f"`{meant}`" in str(refusal({**LEAST, key: 1}))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("  max_steps: many", ("train.max_steps is 'many'", "a whole number", "line 7")),
        ("  max_steps: 2.5", ("train.max_steps is 2.5", "a whole number")),
        ("  max_steps: 0", ("train.max_steps is 0", "above 0")),
        ("  max_steps: -1", ("train.max_steps is -1", "above 0")),
        ("  learning_rate: fast", ("train.learning_rate is 'fast'", "a number")),
        ("  learning_rate: .inf", ("train.learning_rate is inf", "a finite number")),
        ("  learning_rate: .nan", ("train.learning_rate is nan", "number")),
        ("  lora_dropout: 1", ("train.lora_dropout is 1", "below 1")),
        ("  rslora: perhaps", ("train.rslora is 'perhaps'", "true or false")),
        ("  schedule: quadratic", ("train.schedule is 'quadratic'", "'linear', 'cosine' or 'constant'")),
        ("  target_modules: q_proj", ("train.target_modules is 'q_proj'", "a list")),
        ("  target_modules: [q_proj, k]", ("train.target_modules.1 is 'k'", "'q_proj'", "line 7")),
        ("  target_modules: []", ("train.target_modules is []", "at least one")),
        ("  warmup_steps: null", ("train.warmup_steps is null", "a whole number")),
    ],
)
def test_wrong_value_is_named_with_what_was_expected(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    """Key, value, line and expectation stand in the message, in plain words."""
    text = str(refusal(written(tmp_path, FILE.replace("  max_steps: 30", line))))
    assert all(word in text for word in (*words, "recipe.yaml, line 7")), text


@pytest.mark.parametrize("value", ["x", None, [1], -1, -0.5, 1.5])
def test_held_out_is_a_count_or_a_share(value: Any) -> None:
    """held_out takes two kinds of number; its refusal used to show the inside of the schema ("constrained-int")."""
    message = refusal(LEAST, {"data": {"held_out": value}}).message
    assert message.startswith("data.held_out is ")
    assert message.endswith("(command line: --data.held_out)")


@pytest.mark.parametrize(("given", "value"), [("16", 16), ("0.05", 0.05), (0, 0), (1.0, 1), (16.0, 16)])
def test_held_out_reads_counts_and_shares(given: Any, value: float) -> None:
    """Whole numbers are counts, numbers below one are shares, whether written as text or not."""
    found = load_recipe(LEAST, {"data": {"held_out": given}}, {}).data.held_out
    assert found == value
    assert isinstance(found, type(value))


def test_two_warm_ups_are_refused() -> None:
    """warmup_steps and warmup_ratio exclude each other."""
    assert "not both" in str(refusal(LEAST, {"train": {"warmup_steps": 5, "warmup_ratio": 0.1}}))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"samples": 3, "temperature": 0}, ("samples above 1", "temperature above 0", "greedy")),
        ({"samples": 0}, ("compare.samples is 0", "above 0")),
        ({"max_thinking_tokens": 1024}, ("max_thinking_tokens must be below max_new_tokens",)),
        ({"max_thinking_tokens": 0}, ("compare.max_thinking_tokens is 0", "above 0")),
        ({"top_k": -1}, ("compare.top_k is -1", "at least 0")),
        ({"min_p": 1}, ("compare.min_p is 1", "below 1")),
        ({"harm_margin": 2}, ("compare.harm_margin is 2", "below 1")),
    ],
)
def test_sampling_that_cannot_work_is_refused(section: dict[str, Any], words: tuple[str, ...]) -> None:
    """Several greedy samples, thinking that leaves no room for an answer, and values out of range."""
    text = str(refusal(LEAST, {"compare": section}))
    assert all(word in text for word in words), text


def test_samples_leave_the_temperature_to_the_model() -> None:
    """Without a temperature the model's authors may name one, so that the recipe alone refuses nothing."""
    section = load_recipe(LEAST, {"compare": {"samples": "3", "shuffle_options": "true"}}, {}).compare
    assert (section.samples, section.shuffle_options, section.temperature) == (3, True, None)
    assert (section.top_k, section.min_p, section.max_thinking_tokens) == (0, 0.0, None)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b"])
def test_run_name_is_one_folder(name: str) -> None:
    """A name cannot lead out of runs_dir."""
    assert "name" in refusal({**LEAST, "name": name}).message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("is empty",)),
        ("# only a comment\n", ("is empty",)),
        ("- model\n- data\n", ("is a list",)),
        ("just words\n", ("is plain text",)),
        ("model: [\n", ("line 2", "not YAML")),
        ("model:\n\tid: a\n", ("line 2", "not YAML")),
        ("name: 2024-13-45\n", ("not YAML",)),
        (FILE + "  max_steps: 40\n", ("train.max_steps is written twice", "lines 7 and 8")),
        (FILE + "model:\n  id: c\n", ("model is written twice", "lines 2 and 8")),
        ("data:\n  source: x\n", ("model is missing", "add `model:` at the top level")),
        ("model:\n  precision: nf4\ndata:\n  source: x\n", ("model.id is missing", "line 1", "under `model:`")),
        ("model:\ndata:\n  source: x\n", ("model is null", "keys and values", "line 1")),
        ("model: a/b\ndata:\n  source: x\n", ("model is 'a/b'", "keys and values", "line 1")),
    ],
)
def test_broken_file_is_explained(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    """A file that is no recipe is answered with its name, the line where there is one, and what is wrong."""
    message = str(refusal(written(tmp_path, text)))
    assert all(word in message for word in (*words, "recipe.yaml")), message


def test_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    """A wrong path is answered with the recipes beside it."""
    written(tmp_path, FILE)
    assert "recipe.yaml" in (refusal(tmp_path / "recipes.yaml").hint or "")


def test_folder_and_bytes_are_no_recipe(tmp_path: Path) -> None:
    """A folder and a file that is not text are refused by name."""
    assert "cannot be read" in refusal(tmp_path).message
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "recipe.yaml").message


# --- numbers, schema


@pytest.mark.parametrize(("text", "value"), [("2e-4", 2e-4), ("1e-3", 1e-3), ("5E-5", 5e-5), ("1.5e-4", 1.5e-4)])
def test_exponents_without_a_dot_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    """YAML 1.1 takes 2e-4 for text; a recipe takes it for the number everybody means, and other text stays text."""
    path = written(tmp_path, FILE + f"  learning_rate: {text}\nname: 1e\n")
    recipe = load_recipe(path, environ={})
    assert recipe.train.learning_rate == value
    assert recipe.name == "1e"


def test_recipes_are_frozen_and_every_field_is_explained() -> None:
    """No stage can change a setting, and each key has a sentence for schema and help."""
    recipe = load_recipe(LEAST, environ={})
    with pytest.raises(ValidationError):
        recipe.train.max_steps = 3  # type: ignore[misc]
    schema = Recipe.model_json_schema()
    sections = {"": schema, **schema["$defs"]}
    bare = [
        f"{name}.{key}" for name, s in sections.items() for key, f in s["properties"].items() if "description" not in f
    ]
    assert not bare
    assert "train.max_steps" in known_keys()


def test_resolved_yaml_is_plain_yaml() -> None:
    """to_yaml needs none of our reader: a plain YAML loader gives the same values."""
    recipe = load_recipe(LEAST, {"train": {"learning_rate": 2e-4}, "data": {"system": "Ärztin: ja"}}, {})
    assert yaml.safe_load(recipe.to_yaml()) == recipe.model_dump(mode="json")
