"""The command line: what it prints where, how it ends, and that nothing heavy is loaded to say so."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepdoctor.recipe import Recipe
from deepdoctor.recipe_file import known_keys, load_recipe
from deepdoctor.sizes import CONTEXT_MIB
from helpers_run import PROJECT, Outcome, call, tiny_recipe, write_recipe

COMMANDS = (
    "run",
    "data",
    "train",
    "compare",
    "export",
    "push",
    "ask",
    "plan",
    "doctor",
    "login",
    "recipe",
    "schema",
    "dashboard",
)
WITH_FIELDS = ("run", "data", "train", "compare", "export", "plan", "doctor")
TUTORIAL, DEMO = (PROJECT / "recipes" / f"{name}.yaml" for name in ("tutorial", "demo"))
HEAVY = ("torch", "transformers", "pydantic", "datasets", "numpy", "scipy", "matplotlib", "safetensors", "tokenizers")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wide terminal, no DD_ variables, and a working folder that nobody else writes to."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """The command said why it failed, on stderr only, without a traceback."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    assert all(word in outcome.err for word in words), outcome.err


# --- help


def test_help_is_quick_and_light() -> None:
    """`deepdoctor --help` lists every command, loads nothing heavy, and answers at once (0.3 s on a quiet machine)."""
    program = (
        "import sys; from deepdoctor.cli import main; code = main(['--help']); "
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules]); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert "LOADED []" in done.stdout
    assert done.stderr == ""
    assert [name for name in COMMANDS if f"│ {name} " not in done.stdout] == []
    assert min(seconds) < 1.5, seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """`deepdoctor COMMAND --help` ends well on stdout; commands that take a recipe list every recipe key as a flag."""
    outcome = call(capsys, command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"deepdoctor {command}" in outcome.out
    sections = set(Recipe.model_fields) - {"name", "runs_dir", "seed"}
    flags = [f"--{key}" for key in known_keys() if key not in sections]
    missing = [flag for flag in flags if f"{flag} " not in outcome.out]
    assert missing == ([] if command in WITH_FIELDS else flags)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the package's version alone."""
    import deepdoctor

    assert call(capsys, "--version").out.strip() == deepdoctor.__version__


# --- dry run, plan, schema, doctor


def test_dry_run_of_the_tutorial_needs_no_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--dry-run prints the resolved recipe (which loads as the same recipe) and the plan, and writes nothing."""
    outcome = call(capsys, "run", TUTORIAL, "--dry-run", "--train.max_steps", "7")
    assert (outcome.code, outcome.err) == (0, "")
    recipe, _, plan = outcome.out.partition("---\n")
    expected = load_recipe(TUTORIAL, {"train": {"max_steps": 7}}, {})
    assert load_recipe(yaml.safe_load(recipe), environ={}) == expected
    assert "8,030.3 M weights held as nf4" in plan
    assert "7 steps over 500 rows" in plan
    assert "adapter 41.94 M weights" in plan
    assert all(line.startswith("# ") for line in plan.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_dry_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """--json gives recipe, plan and notes as one object."""
    found = json.loads(call(capsys, "run", TUTORIAL, "--dry-run", "--json").out)
    assert Recipe.model_validate(found["recipe"]) == load_recipe(TUTORIAL, environ={})
    assert found["plan"]["steps"] == 60
    assert found["plan"]["trainable_parameters"] == 41_943_040
    assert found["notes"]


def planned(capsys: pytest.CaptureFixture[str], vram: str) -> dict[str, Any] | Outcome:
    """The plan for a GPU of this size, or how the command was refused."""
    outcome = call(capsys, "plan", TUTORIAL, "--vram", vram, "--json")
    return json.loads(outcome.out)["plan"] if outcome.code == 0 else outcome


def test_plans_follow_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """A small card gets a smaller budget or is told why not; a large card gets one that fits it."""
    large = planned(capsys, "80GiB")
    middle = planned(capsys, "14GiB")
    assert isinstance(large, dict)
    assert isinstance(middle, dict)
    assert large["predicted_peak_mib"] <= large["available_mib"] == 80 * 1024 - CONTEXT_MIB
    assert middle["predicted_peak_mib"] <= middle["available_mib"] == 14 * 1024 - CONTEXT_MIB
    assert middle["token_budget"] < large["token_budget"]
    small = planned(capsys, "6GiB")
    assert isinstance(small, dict)
    assert small["predicted_peak_mib"] <= small["available_mib"] == 6 * 1024 - CONTEXT_MIB
    assert small["engine"]["rungs"] != middle["engine"]["rungs"] != large["engine"]["rungs"]
    tiny = planned(capsys, "1GiB")
    assert isinstance(tiny, Outcome)
    refused(tiny, 1, "MiB on the GPU", "smaller model", "hint: ")


@pytest.mark.parametrize("size", ["", "many", "-3GiB", "3 apples"])
def test_a_size_must_be_a_size(capsys: pytest.CaptureFixture[str], size: str) -> None:
    """--vram refuses what is no amount of memory, and says what one looks like."""
    refused(call(capsys, "plan", TUTORIAL, f"--vram={size}"), 2, "--vram", repr(size), "15GiB")


def test_schema_describes_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """`deepdoctor schema` is a JSON schema that accepts the shipped recipes and refuses unknown keys."""
    schema = json.loads(call(capsys, "schema").out)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "data"}
    values = load_recipe(DEMO, environ={}).model_dump(mode="json")
    try:
        import jsonschema
    except ImportError:
        assert matches(values, schema, schema["$defs"])
        assert not matches({**values, "bogus": 1}, schema, schema["$defs"])
        assert not matches({**values, "seed": "x"}, schema, schema["$defs"])
    else:
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(values, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**values, "bogus": 1}, schema)


def matches(value: Any, schema: dict[str, Any], defs: dict[str, Any]) -> bool:
    """Whether a value fits the parts of JSON schema that recipes use."""
    if "$ref" in schema:
        return matches(value, defs[schema["$ref"].rsplit("/", 1)[-1]], defs)
    if "anyOf" in schema:
        return any(matches(value, option, defs) for option in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    kind = schema.get("type")
    if kind == "number":
        return isinstance(value, int | float)
    if kind and (not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool))):
        return False
    if kind == "object":
        fields = schema["properties"]
        return set(value) <= set(fields) and all(matches(value[key], fields[key], defs) for key in value)
    return kind != "array" or all(matches(item, schema["items"], defs) for item in value)


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """doctor --json lists checks with a state, and its exit code says whether one of them is bad."""
    outcome = call(capsys, "doctor", "--json")
    checks = json.loads(outcome.out)
    assert {"python", "torch", "gpu", "memory", "disk"} <= {check["name"] for check in checks}
    assert {check["state"] for check in checks} <= {"ok", "note", "bad"}
    assert outcome.code == int(any(check["state"] == "bad" for check in checks))
    lines = call(capsys, "doctor").out.strip().splitlines()
    assert len(lines) == len(checks)


# --- flags


def resolved(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> Recipe:
    """The recipe a command line resolves to."""
    outcome = call(capsys, "run", path, "--dry-run", "--json", *flags)
    assert outcome.code == 0, outcome.err
    return Recipe.model_validate(json.loads(outcome.out)["recipe"])


def test_flags_of_every_kind(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, booleans, lists and null arrive typed; a flag wins over the environment, which wins over the file."""
    monkeypatch.setenv("DD_TRAIN__LORA_RANK", "4")
    monkeypatch.setenv("DD_TRAIN__MAX_STEPS", "5")
    flags = ("--train.max_steps", "6", "--train.learning_rate", "1e-3", "--train.rslora", "true", "--data.held_out=9")
    recipe = resolved(
        capsys,
        TUTORIAL,
        *flags,
        *("--train.target_modules", "v_proj", "q_proj"),
        *("--ask.questions", "What is it?", "And then?"),
        *("--data.config", "null", "--model.revision", "1234567"),
    )
    assert (recipe.train.max_steps, recipe.train.lora_rank, recipe.train.learning_rate) == (6, 4, 1e-3)
    assert recipe.train.rslora is True
    assert recipe.data.held_out == 9
    assert recipe.train.target_modules == ("q_proj", "v_proj")
    assert recipe.ask.questions == ("What is it?", "And then?")
    assert (recipe.data.config, recipe.model.revision) == (None, "1234567")


@pytest.mark.parametrize("words", (["f16", "q8_0"], ["[f16, q8_0]"], ["[f16,q8_0]"], ['["f16", "q8_0"]']), ids=" ".join)
def test_a_list_is_words_or_as_in_the_file(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`--export.gguf '[f16, q8_0]'` used to be one unknown type, and JSON a fault in the validator's own words."""
    assert resolved(capsys, TUTORIAL, "--export.gguf", *words).export.gguf == ("f16", "q8_0")


def test_brackets_of_a_question_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """A text that only looks like a list is one text."""
    found = resolved(capsys, TUTORIAL, "--ask.questions", "[sic] a [strange: {one]")
    assert found.ask.questions == ("[sic] a [strange: {one]",)


def test_null_empties_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    """`--ask.questions null` used to ask the question "null"."""
    assert resolved(capsys, TUTORIAL, "--ask.questions", "null").ask.questions == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fly",), ('"fly"', "Available commands", "--help")),
        (("pln", "x.yaml"), ('"pln"', '"plan"')),
        (("plan",), ("RECIPE", "--help")),
        (("run", "gone.yaml"), ("there is no recipe file gone.yaml",)),
        (("run", TUTORIAL, "--train.max_stepz", "3"), ("--train.max_stepz", "--train.max_steps")),
        (("run", TUTORIAL, "--dry-run", "--train.max_steps", "x"), ("train.max_steps is 'x'", "--train.max_steps")),
        (("run", TUTORIAL, "--dry-run", "--train.max_steps"), ("--train.max_steps",)),
        (("data", TUTORIAL, "--rows", "x"), ("--rows", "x")),
        (("ask", " "), ("question is empty",)),
        (("ask", "Why?", "--side", "left"), ("--side", "'left'", "both, base or tuned")),
        (("ask", "Why?", "--max-new-tokens", "0"), ("--max-new-tokens is 0", "at least 1")),
        (("ask", "Why?", "--max-new-tokens", "x"), ("--max-new-tokens", "x")),
    ],
)
def test_wrong_words_are_usage_errors(
    capsys: pytest.CaptureFixture[str], words: tuple[object, ...], said: tuple[str, ...]
) -> None:
    """Exit code 2, and a message that names the word and what was expected."""
    refused(call(capsys, *words), 2, *said)


# --- exit codes


def test_ctrl_c_ends_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_r1: Path, tmp_path: Path
) -> None:
    """Ctrl-C outside of training ends in one sentence and the shell's code for it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepdoctor.pipeline.prepare_data", interrupt)
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(tiny_r1, tmp_path))
    refused(call(capsys, "run", recipe), 130, "stopped", "--resume")


def test_failures_end_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    """A request that is well put but cannot be carried out ends with 1."""
    refused(call(capsys, "ask", "Why?"), 1, "no trained run under runs/", "--run FOLDER")
    refused(call(capsys, "ask", "Why?", "--run", "nowhere"), 1, "nowhere is no run folder", "deepdoctor run")


def test_closed_pipe_is_no_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepdoctor schema | head -1` ends quietly."""

    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    assert call(capsys, "schema") == Outcome(0, "", "")


@pytest.mark.parametrize("command", [["run", "recipes/demo.yaml"], ["ask", "Why?", "--run", "runs/none"]])
def test_threads_are_settled_before_torch(command):
    """Imports in the wrong order used to load torch first, and its threads then span without bound."""
    code = (
        "import sys\nfrom deepdoctor import cpu\n"
        "def probe(say):\n    print('torch' in sys.modules)\n    raise SystemExit(0)\n"
        f"cpu.prepare_cpu = probe\nfrom deepdoctor.cli import main\nmain({command!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, timeout=120)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
