"""What a run needs of the disks it writes to, by what it is for, and whether there is room."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from deepdoctor.data.placebo import SHUFFLES
from deepdoctor.errors import DeepDoctorError, RunError
from deepdoctor.export.sizes import export_bytes
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.shape import Shape, model_shape
from deepdoctor.recipe import Recipe
from deepdoctor.train.plan import training_bytes

__all__ = ["Room", "beside_training", "free_disk", "refuse_full_disk", "rooms"]

GIB = 2**30


@dataclass(frozen=True)
class Room:
    """One disk: a folder on it, bytes free, and bytes needed by what they are for. where: how to choose another."""

    name: str
    place: Path
    free: int
    parts: dict[str, int]
    where: str

    @property
    def need(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    @property
    def short(self) -> bool:
        """Whether it does not fit."""
        return self.need > self.free

    def words(self) -> str:
        """``18.2 GiB free, the recipe needs 23.5: training 0.9, merged 15.0, ...``."""
        shown = {name: f"{size / GIB:.1f}" for name, size in self.parts.items()}
        listed = ", ".join(f"{name} {size}" for name, size in shown.items() if size != "0.0")
        return f"{self.free / GIB:.1f} GiB free, the recipe needs {self.need / GIB:.1f}" + (listed and f": {listed}")


def beside_training(recipe: Recipe, config: ModelConfig) -> dict[str, int]:
    """Bytes that a whole run writes beside its training: adapters of placebo arms, and each kind of export."""
    arms = sum(arm in SHUFFLES for arm in recipe.compare.placebo)
    placebo = {"placebo": arms * training_bytes(config, recipe.train)} if arms else {}
    return {**placebo, **export_bytes(config, recipe)}


def free_disk(place: Path) -> tuple[Path, int]:
    """The existing folder that a path is to lie in, and the bytes free there."""
    place = place.expanduser().absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place, shutil.disk_usage(place).free


def rooms(recipe: Recipe, shape: Shape) -> list[Room]:
    """The disk of the runs, and that of the Hub's cache where it is another one and something is to come.

    What the run's folder holds already is not needed again.
    """
    from huggingface_hub import constants

    parts = {"training": training_bytes(shape.config, recipe.train), **beside_training(recipe, shape.config)}
    folder = Path(recipe.runs_dir).expanduser() / recipe.name
    runs, free = free_disk(Path(recipe.runs_dir))
    there = min(sum(_size(folder / stage) for stage in ("train", "export")), sum(parts.values()))
    if there:
        parts["there already"] = -there
    download = {"download": shape.download_bytes} if shape.download_bytes else {}
    cache, cache_free = free_disk(Path(constants.HF_HUB_CACHE))
    if not download or cache.stat().st_dev == runs.stat().st_dev:
        return [Room("disk", runs, free, parts | download, "`--runs_dir`")]
    return [
        Room("disk", runs, free, parts, "`--runs_dir`"),
        Room("disk of the Hub's cache", cache, cache_free, download, "HF_HOME"),
    ]


def refuse_full_disk(recipe: Recipe) -> None:
    """Raise RunError, before anything is downloaded or trained, where the run would fill a disk.

    A model whose shape cannot be had is left to the stage that loads it, which says why.
    """
    try:
        found = rooms(recipe, model_shape(recipe.model.id, recipe.model.revision))
    except DeepDoctorError:
        return
    for room in found:
        if room.short:
            raise RunError(
                f"{room.place} has {room.words()}",
                f"free some space, choose another disk with {room.where}, or export less (`--export.merged false`, "
                "`--export.gguf null`)",
            )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
