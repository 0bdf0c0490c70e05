"""Everything a user can get wrong, through the real command line: one clear message, no traceback, nothing lost."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers_run import Outcome, asset_rows, call, snapshot, tiny_recipe, write_recipe, write_rows

Ask = Callable[..., Outcome]


@pytest.fixture
def deepdoctor(
    capsys: pytest.CaptureFixture[str], tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Ask:
    """Run ``deepdoctor COMMAND RECIPE FLAGS`` on a tiny recipe changed by keywords."""
    monkeypatch.chdir(tmp_path)

    def ask(command: str, *flags: object, **sections: Any) -> Outcome:
        return call(
            capsys, command, write_recipe(tmp_path / "tiny.yaml", tiny_recipe(tiny_r1, tmp_path, **sections)), *flags
        )

    return ask


def refused(outcome: Outcome, *words: object, code: int = 1) -> None:
    """It failed with one message on stderr that holds these words, and neither traceback nor inner names."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.count("error: ") == 1
    assert "hint: " in outcome.err
    for bad in ("Traceback", "pydantic", "Error(", "<class", "NoneType"):
        assert bad not in outcome.err, outcome.err
    missing = [str(word) for word in words if str(word) not in outcome.err]
    assert not missing, f"{missing} not in:\n{outcome.err}"


# --- rows


def test_missing_file_names_its_neighbours(deepdoctor: Ask, tmp_path: Path) -> None:
    """A path that does not exist is answered with the file that was meant."""
    refused(
        deepdoctor("run", data={"source": str(tmp_path / "row.jsonl")}), "there is no file", "row.jsonl", "rows.jsonl"
    )
    assert snapshot(tmp_path / "runs").keys() == {"tiny/manifest.json", "tiny/recipe.yaml"}


def test_line_that_is_not_json(deepdoctor: Ask, tmp_path: Path) -> None:
    """The line and the column are named, and the line is shown."""
    path = write_rows(tmp_path / "bad.jsonl", asset_rows(3))
    path.write_text(path.read_text() + '{"Question": "half\n', encoding="utf-8")
    refused(
        deepdoctor("run", data={"source": str(path)}), f"{path}:4 is not JSON", "column", '"half', "one JSON object"
    )


def test_missing_column_lists_those_that_exist(deepdoctor: Ask, tmp_path: Path) -> None:
    """The columns of the file are listed with the flag that names one."""
    rows = [{"question": r["Question"], "cot": r["Complex_CoT"], "Response": r["Response"]} for r in asset_rows(3)]
    path = write_rows(tmp_path / "other.jsonl", rows)
    outcome = deepdoctor("run", data={"source": str(path)})
    refused(outcome, path, "'Question'", "'Complex_CoT'", "it has question, cot, Response", "--data.question question")
    source = {"source": str(path), "held_out": 1}
    fixed = deepdoctor("data", "--data.question", "question", "--data.reasoning", "cot", data=source)
    assert fixed.code == 0, fixed.err


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_data_set(deepdoctor: Ask, tmp_path: Path, text: str) -> None:
    """A file without rows is said to have none."""
    path = tmp_path / "none.jsonl"
    path.write_text(text)
    refused(deepdoctor("run", data={"source": str(path)}), path, "holds no rows")


def test_all_rows_too_long(deepdoctor: Ask) -> None:
    """The message says which rows, how long they are, and which limit would keep them."""
    outcome = deepdoctor("run", data={"max_seq_len": 20})
    refused(outcome, "none of the 14 rows", "14 too_long", "rows.jsonl:1: too_long", "--data.max_seq_len")
    longest = int(outcome.err.rsplit("--data.max_seq_len ", 1)[1].split("`")[0])
    kept = deepdoctor("data", "--data.max_seq_len", longest)
    assert kept.code == 0, kept.err
    assert "14 rows read, 14 kept" in kept.err


def test_one_row_too_long_with_error(deepdoctor: Ask) -> None:
    """too_long: error stops at the first long row and says where a cut would have fallen."""
    refused(
        deepdoctor("run", data={"max_seq_len": 20, "too_long": "error"}),
        "rows.jsonl:1 is too long",
        "over max_seq_len 20",
    )


def test_all_rows_dropped_lists_every_finding(deepdoctor: Ask, tmp_path: Path) -> None:
    """Where no row is left, each one is shown with its place and reason; it used to be a bare count."""
    one, two, three = asset_rows(3)
    rows = [
        one | {"Response": " "},
        two | {"Question": "What does the image show?\n[img]"},
        three | {"Complex_CoT": "<think>"},
    ]
    path = write_rows(tmp_path / "doubtful.jsonl", rows)
    for command in ("run", "data"):
        outcome = deepdoctor(command, data={"source": str(path)})
        refused(
            outcome, "none of the 3 rows", f"{path}:1: empty_field: answer", f"{path}:2: missing_image", "<think> in"
        )
        assert f"{path}:3: control_tokens" in outcome.err


def test_bare_file_is_checked_without_a_recipe(
    capsys: pytest.CaptureFixture[str], tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deepdoctor data FILE` shows findings, prints check.json with --json, and leaves no run behind."""
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / "few.jsonl", [*asset_rows(3), asset_rows(1)[0]])
    outcome = call(capsys, "data", path, "--model.id", tiny_r1, "--json", "--rows", "1")
    assert outcome.code == 0, outcome.err
    check = json.loads(outcome.out)
    assert (check["rows_read"], check["rows_kept"]) == (4, 3)
    assert [(f["code"], f["place"], f["action"]) for f in check["findings"]] == [("duplicate", f"{path}:4", "dropped")]
    assert "same question, reasoning and answer" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["few.jsonl"]


# --- recipe


def test_unknown_key(deepdoctor: Ask, tmp_path: Path) -> None:
    """A key that does not exist is named with its line and the near one; nothing is made."""
    refused(deepdoctor("run", train={"max_step": 3}), "train.max_step", "tiny.yaml, line ", "`train.max_steps`", code=2)
    assert not (tmp_path / "runs").exists()


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that does not exist is answered with the near one."""
    refused(call(capsys, "trian", "x.yaml"), '"trian"', '"train"', code=2)


def test_template_that_cannot_be_used(deepdoctor: Ask, tmp_path: Path) -> None:
    """A template file that is missing or broken stops before any work."""
    refused(deepdoctor("run", data={"template": str(tmp_path / "gone.jinja")}), "gone.jinja", code=2)
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}")
    outcome = deepdoctor("run", data={"template": str(tmp_path / "bad.jinja")})
    assert (outcome.code, outcome.out) == (2, "")
    assert "bad.jinja is not Jinja" in outcome.err


# --- models


@pytest.fixture
def model(tiny_r1: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_r1, tmp_path / "model"))


def config(model: Path, **changes: Any) -> None:
    """Change config.json."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_config(model: Path) -> None:
    """Take config.json away."""
    (model / "config.json").unlink()


def no_tokenizer(model: Path) -> None:
    """Take tokenizer.json away."""
    (model / "tokenizer.json").unlink()


def no_weights(model: Path) -> None:
    """Take the weights away."""
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    """Cut the weights short, as a broken download does."""
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def unknown(model: Path) -> None:
    """Name an architecture that the decoder does not cover."""
    config(model, model_type="mamba", architectures=["MambaForCausalLM"])


def wrong_shapes(model: Path) -> None:
    """Promise wider layers than the weights have."""
    config(model, intermediate_size=256)


def missing_tensor(model: Path) -> None:
    """Leave one tensor out."""
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (no_config, ("config.json",)),
        (no_tokenizer, ("tokenizer.json",)),
        (no_weights, (".safetensors",)),
        (truncated, ("model.safetensors", "truncated", "download")),
        (unknown, ("config.json", "'MambaForCausalLM'", "LlamaForCausalLM")),
        (wrong_shapes, ("gate_proj", "(128, 64)", "(256, 64)", "config.json")),
        (missing_tensor, ("model.norm.weight",)),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_broken_model_folder(
    deepdoctor: Ask, model: Path, broken: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    """Each fault of a model folder is named with the file, what it holds and what was expected."""
    broken(model)
    refused(deepdoctor("run", model={"id": str(model)}), *words)


def test_model_that_is_nowhere(deepdoctor: Ask) -> None:
    """A path that does not exist and an id that is none are told apart from a Hub that cannot be reached."""
    refused(deepdoctor("run", model={"id": "./gone"}), "model.id './gone'", "owner/name")
    refused(deepdoctor("run", model={"id": "a/b/c"}), "model.id 'a/b/c'", "owner/name")


def test_hub_cannot_be_reached(deepdoctor: Ask) -> None:
    """Offline, a model or data set that is not in the cache is named with the way around."""
    refused(deepdoctor("run", model={"id": "nobody/nothing-8b"}), "model nobody/nothing-8b", "--model.id")
    refused(deepdoctor("run", data={"source": "nobody/nothing-rows"}), "nobody/nothing-rows", "--data.source")


def test_gpu_that_is_not_there(deepdoctor: Ask) -> None:
    """A recipe that wants CUDA on a machine without it is told so."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused(deepdoctor("run", model={"device": "cuda"}), "model.device is cuda", "--model.device cpu")


# --- questions


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("gone.jsonl", ("gone.jsonl",)),
        ("embedded:nothing", ("embedded:nothing", "embedded:questions")),
        ("rows.jsonl", ("rows.jsonl:1", "id is missing")),
    ],
)
def test_task_that_cannot_be_read(deepdoctor: Ask, tmp_path: Path, task: str, words: tuple[str, ...]) -> None:
    """Wrong questions stop a run before any work; it used to train first and fail at the comparison."""
    refused(deepdoctor("run", compare={"tasks": [task]}), *words)
    assert snapshot(tmp_path / "runs").keys() == {"tiny/manifest.json", "tiny/recipe.yaml"}


# --- run folders and disks


def test_runs_dir_is_a_file(deepdoctor: Ask, tmp_path: Path) -> None:
    """A runs_dir that is a file is named."""
    (tmp_path / "occupied").write_text("a file")
    refused(deepdoctor("run", "--runs_dir", tmp_path / "occupied"), "occupied/tiny", "Not a directory", "--runs_dir")


def test_read_only_runs_dir(deepdoctor: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only disk is named with its reason (made up here: tests may run as a user who may write anywhere)."""

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(deepdoctor("run"), "runs/tiny", "Read-only file system", "--runs_dir")


FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
@pytest.mark.parametrize(
    ("writer", "kept"),
    [
        ("deepdoctor.data.store.save_file", set()),
        ("deepdoctor.train.checkpoint.save_file", {"data"}),
        ("deepdoctor.export.merge.save_file", {"data", "train/adapter", "compare", "export/adapter"}),
    ],
)
def test_full_disk(
    deepdoctor: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, kept: set[str], error: Exception
) -> None:
    """A full disk at any stage says so, leaves no half folder, and --resume goes on from what was complete."""

    def full(*_: object, **__: object) -> None:
        raise error

    run = tmp_path / "runs" / "tiny"
    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        refused(
            deepdoctor("run", train={"max_steps": 2}), "could not be written", "No space left on device", "--resume"
        )
    stages = ("data", "train/adapter", "compare", "export/adapter", "export/merged")
    assert {stage for stage in stages if (run / stage).is_dir()} == kept
    assert [path for path in run.rglob("*.partial*")] == []
    before = {stage: snapshot(run / stage) for stage in kept}
    outcome = deepdoctor("run", "--resume", train={"max_steps": 2})
    assert outcome.code == 0, outcome.err
    assert {stage: snapshot(run / stage) for stage in kept} == before


def test_full_disk_while_answers_are_kept(deepdoctor: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the answers before training cannot be written, the error names the disk; no traceback."""
    original = Path.write_text

    def full(path: Path, *arguments: Any, **named: Any) -> int:
        if path.parent.name == "ask":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", full)
    refused(deepdoctor("run"), "No space left on device", "ask")
    assert (tmp_path / "runs" / "tiny" / "data" / "check.json").exists()


@pytest.fixture
def trained(deepdoctor: Ask, tmp_path: Path) -> Path:
    """A run whose data and train stages are complete."""
    for stage in ("data", "train"):
        outcome = deepdoctor(stage, ask={"questions": []})
        assert outcome.code == 0, outcome.err
    return tmp_path / "runs" / "tiny"


def test_resume_with_another_recipe(deepdoctor: Ask, trained: Path) -> None:
    """Each changed field is named with both values, and the run stays as it was."""
    before = snapshot(trained)
    outcome = deepdoctor("run", "--resume", "--train.learning_rate", "1e-4", ask={"questions": []})
    refused(outcome, "train.learning_rate was 0.01, is 0.0001", "recipe.yaml", "--name")
    refused(deepdoctor("run", ask={"questions": []}), "already exists", "--resume", "--name")
    assert snapshot(trained) == before


def test_checkpoint_of_another_recipe(deepdoctor: Ask, trained: Path) -> None:
    """A checkpoint whose settings differ from the run's is refused, not silently continued."""
    shutil.rmtree(trained / "train" / "adapter")
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["recipe"]["train"]["learning_rate"] = 0.5
    (trained / "manifest.json").write_text(json.dumps(manifest))
    outcome = deepdoctor("run", "--resume", "--train.learning_rate", "0.5", ask={"questions": []})
    refused(outcome, "checkpoint", "another recipe", "step-000004")


def test_rows_changed_by_hand(deepdoctor: Ask, trained: Path) -> None:
    """Prepared rows that were edited or cut are refused."""
    (trained / "data" / "rows.jsonl").write_text("{}\n")
    refused(deepdoctor("run", "--resume", ask={"questions": []}), "data", "deepdoctor data RECIPE")


def test_adapter_cut_short(deepdoctor: Ask, trained: Path) -> None:
    """A trained adapter that cannot be read is named."""
    path = trained / "train" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused(deepdoctor("compare", ask={"questions": []}), "adapter_model.safetensors")


def test_ask_without_a_run(deepdoctor: Ask, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """ask needs a trained run and says where it looked; a run without an adapter is told from no run at all."""
    refused(call(capsys, "ask", "Why?"), "no trained run under runs/", "--run FOLDER")
    assert deepdoctor("data").code == 0
    refused(
        call(capsys, "ask", "Why?", "--run", tmp_path / "runs" / "tiny"), "has no trained adapter", "deepdoctor train"
    )
