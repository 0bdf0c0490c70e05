"""What a run needs of its disks: each export is counted, as large as it becomes, and a full disk is said at once."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from deepdoctor import pipeline
from deepdoctor.disk import beside_training, refuse_full_disk, rooms
from deepdoctor.errors import RunError
from deepdoctor.export.gguf_write import GGUF_KINDS
from deepdoctor.export.sizes import export_bytes
from deepdoctor.model.config import ModelConfig, known_config
from deepdoctor.model.shape import model_shape
from deepdoctor.recipe import Recipe
from deepdoctor.recipe_file import load_recipe
from deepdoctor.train.plan import training_bytes
from helpers_run import PROJECT, call, tiny_recipe, write_recipe

TUTORIAL = PROJECT / "recipes" / "tutorial.yaml"
GIB = 2**30
EVERYTHING = {"adapter": True, "merged": True, "merged_4bit": True, "gguf": list(GGUF_KINDS)}


def tutorial(**export: Any) -> Recipe:
    """The tutorial's recipe with other exports."""
    return load_recipe(TUTORIAL, {"export": export}, {})


def disk_of(patch: pytest.MonkeyPatch, free: float) -> None:
    """Let every disk have ``free`` bytes left."""
    usage = namedtuple("usage", "total used free")
    patch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, int(free)))


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_each_export_of_8b_is_counted() -> None:
    """16 bits are 16.1 GB, 8.5 bits 8.5, the 4-bit GGUF kinds 5.5 and 5.1; what is not asked for takes nothing."""
    config = known_config("deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    assert config is not None
    found = export_bytes(config, tutorial(**EVERYTHING))
    gb = {kind: round(value / 1e9, 1) for kind, value in found.items()}
    assert gb == {"adapter": 0.2, "merged": 16.1, "merged_4bit": 5.7, "gguf": 35.1}
    assert export_bytes(config, tutorial(adapter=False, merged=False, gguf=["q8_0"])).keys() == {"gguf"}
    assert beside_training(tutorial(), config).keys() == {"adapter", "merged"}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_run_takes_no_more_than_was_reckoned(tiny_r1: Path, tmp_path: Path, optimizer: str) -> None:
    """Every export and the training of a whole run, file by file; and not far less."""
    pytest.importorskip("gguf")
    train = {"optimizer": optimizer, "lora_rank": 32, "save_steps": 1}
    values = tiny_recipe(tiny_r1, tmp_path, ask={"questions": []}, train=train) | {"export": EVERYTHING}
    recipe = load_recipe(values, environ={})
    folder = pipeline.run(values, stages=("data", "train", "export")).folder
    config = ModelConfig.from_folder(tiny_r1)
    for kind, reckoned in export_bytes(config, recipe).items():
        taken = size(folder / "export" / kind)
        assert taken <= reckoned < 2 * taken + 1.5e6 * len(recipe.export.gguf), kind
    taken = size(folder / "train")
    checkpoint = size(max((folder / "train" / "checkpoints").iterdir()))
    assert taken + checkpoint <= training_bytes(config, recipe.train) < 2 * (taken + checkpoint)


def test_a_disk_like_kaggles(monkeypatch: pytest.MonkeyPatch) -> None:
    """19.5 GB hold merged 8B weights, and no GGUF files beside them: GGUF files used not to be counted."""
    disk_of(monkeypatch, 19.5e9)
    monkeypatch.setattr("deepdoctor.model.shape.cached_model", lambda *_: Path("cached"))
    refuse_full_disk(tutorial())
    refuse_full_disk(tutorial(merged=False, gguf=["q8_0", "q4_0"]))
    for export in ({"gguf": ["q8_0"]}, {"merged_4bit": True}):
        with pytest.raises(RunError, match=rf"18\.2 GiB free, .*merged 15\.0, {next(iter(export))}") as caught:
            refuse_full_disk(tutorial(**export))
        assert "--runs_dir" in str(caught.value.hint) and "--export.merged false" in str(caught.value.hint)


def test_the_download_counts_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the disk of the runs where the cache lies there too, else on its own; nothing where it is here already."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe(TUTORIAL, {"runs_dir": str(tmp_path)}, {})
    shape = model_shape(recipe.model.id)
    (room,) = rooms(recipe, shape)
    assert room.parts["download"] == shape.download_bytes == pytest.approx(16.06e9, rel=0.01)
    assert room.need == sum(room.parts.values())

    class Elsewhere(type(tmp_path)):
        def stat(self, **options: Any) -> Any:
            return namedtuple("stat", "st_dev")(-1)

    monkeypatch.setattr(
        "deepdoctor.disk.free_disk", lambda place: (Elsewhere(place) if place == tmp_path else place, 5)
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path.parent))
    runs, cache = rooms(recipe, shape)
    assert "download" not in runs.parts and cache.parts == {"download": shape.download_bytes}


def test_placebo_arms_train_too() -> None:
    """Two shuffled arms leave checkpoints and an adapter each; asking in the native prompt leaves nothing."""
    config = known_config("deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    assert config is not None
    arms = ["native_prompt", "shuffled_answers", "shuffled_rows"]
    recipe = load_recipe(TUTORIAL, {"compare": {"placebo": arms}}, {})
    assert beside_training(recipe, config)["placebo"] == 2 * training_bytes(config, recipe.train)


def test_a_run_that_would_fill_the_disk_does_not_start(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`run` ends before it makes a folder; `plan` says the same in a line; going on counts what is there."""
    path = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tiny_r1, tmp_path, ask={"questions": []}))
    recipe = load_recipe(path, environ={})
    need = rooms(recipe, model_shape(str(tiny_r1)))[0].need
    with monkeypatch.context() as patch:
        disk_of(patch, need - 1)
        outcome = call(capsys, "run", path)
        assert (outcome.code, "GiB free, the recipe needs" in outcome.err) == (1, True), outcome
        assert not (tmp_path / "runs").exists()
        assert "it does not fit on" in call(capsys, "plan", path).out
    pipeline.run(recipe, stages=("data", "train"))
    taken = size(tmp_path / "runs" / "tiny" / "train")
    assert rooms(recipe, model_shape(str(tiny_r1)))[0].need == need - taken


def test_a_model_that_cannot_be_had_is_left_to_its_stage(tmp_path: Path) -> None:
    """The stage that loads it has the better words."""
    refuse_full_disk(load_recipe(tiny_recipe(tmp_path / "none", tmp_path), environ={}))
