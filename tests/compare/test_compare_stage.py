"""The comparison stage on a tiny model: what it measures, what it writes, and what it says where nothing was asked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepdoctor.compare.stage import compare_sides
from deepdoctor.data.stage import prepare_data
from deepdoctor.pipeline import run
from deepdoctor.recipe import load_recipe
from deepdoctor.run_folder import RunFolder
from deepdoctor.session import Session
from deepdoctor.ui import SilentReporter
from helpers_run import tiny_recipe

TASK = "embedded:questions"


@pytest.fixture(scope="module")
def trained(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of a run that is trained but not compared; each test compares it in its own way."""
    folder = tmp_path_factory.mktemp("compare")
    model = Path(shutil.copytree(tiny_r1, folder / "model"))
    advice = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (model / "generation_config.json").write_text(json.dumps(advice))
    values = tiny_recipe(model, folder, ask={"questions": []}, train={"max_steps": 2})
    run(values, stages=("data", "train"))
    return values


def compared(trained: dict[str, Any], **section: Any) -> tuple[dict[str, Any], Path]:
    """Compare the trained run with these settings; return what the stage returns and its folder."""
    recipe = load_recipe({**trained, "compare": {**trained["compare"], **section}}, environ={})
    made = RunFolder.open(Path(recipe.runs_dir) / recipe.name)
    session = Session(recipe, made, SilentReporter())
    stats = compare_sides(session, prepare_data(session))
    kept = made.path / "compare"
    moved = kept.with_name(f"compare-{len(list(made.path.glob('compare-*')))}")
    kept.rename(moved)
    return stats, moved


def test_everything_asked_for_is_measured(trained: dict[str, Any]) -> None:
    """Held-out loss, held-out questions and a task, in this order; the drawn questions are the same each time."""
    stats, folder = compared(trained, tasks=[TASK], max_questions=3)
    assert [(task["task"], task["n"]) for task in stats["tasks"]] == [("held_out_rows", 2), ("questions", 3)]
    assert stats["loss"]["all"]["n_rows"] == 4
    assert len(stats["answers"]) == 10
    written = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert sorted(map(json.dumps, written)) == sorted(map(json.dumps, stats["answers"]))
    again, _ = compared(trained, tasks=[TASK], max_questions=3)
    assert [(a["id"], a["side"], a["text"]) for a in again["answers"]] == [
        (a["id"], a["side"], a["text"]) for a in stats["answers"]
    ]
    assert any("embedded:questions" in sentence for sentence in stats["limits"])


def test_protocol_is_what_was_done(trained: dict[str, Any]) -> None:
    """The protocol holds the sampling in force (the model's advice where the recipe leaves it), rule and versions."""
    stats, _ = compared(trained, temperature=None, top_p=None, held_out_questions=1)
    assert (stats["protocol"]["temperature"], stats["protocol"]["top_p"]) == (0.6, 0.95)
    assert stats["protocol"]["max_new_tokens"] == 6
    assert stats["protocol"]["extraction_rule"]
    assert stats["model"]["trainable_parameters"] == 8192
    assert stats["train"]["curve"][0].keys() == {"step", "loss", "learning_rate", "grad_norm"}


def test_loss_alone(trained: dict[str, Any]) -> None:
    """Without questions only losses are measured, and the limits say that no answer was judged."""
    stats, folder = compared(trained, held_out_questions=0)
    assert (stats["tasks"], stats["answers"]) == ([], [])
    assert stats["loss"]["all"]["n_rows"] == 4
    assert any("No question has a key" in sentence for sentence in stats["limits"])
    assert "Nothing was measured" not in (folder / "report.md").read_text(encoding="utf-8")


def test_nothing_asked_for_is_said_plainly(trained: dict[str, Any]) -> None:
    """Without loss, questions and tasks the report says that nothing was measured; this used to end the run."""
    stats, folder = compared(trained, held_out_loss=False, held_out_questions=0)
    assert (stats["loss"], stats["tasks"]) == ({}, [])
    for page in ("report.html", "report.md"):
        assert "Nothing was measured" in (folder / page).read_text(encoding="utf-8")
    said = (folder / "report.md").read_text(encoding="utf-8").split("## Verdict")[1].split("## Protocol")[0]
    assert not any(title in said for title in ("Right answers", "Held-out loss", "Form:"))


def test_a_complete_comparison_is_read_back(trained: dict[str, Any]) -> None:
    """A second call returns what stats.json holds and asks nothing again."""
    recipe = load_recipe(trained, environ={})
    made = RunFolder.open(Path(recipe.runs_dir) / recipe.name)
    session = Session(recipe, made, SilentReporter())
    (made.path / "compare").mkdir()
    (made.path / "compare" / "stats.json").write_text('{"schema": 1}')
    assert compare_sides(session, prepare_data(session)) == {"schema": 1}
    assert "decoder" not in vars(session)
    (made.path / "compare" / "stats.json").unlink()
    (made.path / "compare").rmdir()
