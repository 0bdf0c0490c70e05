"""Checkpoints: adapter, optimizer, random states and the place in the data, as safetensors and JSON.

A checkpoint is written under a temporary name and renamed, so a folder named ``step-000020`` is always whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deepdoctor.errors import RunError
from deepdoctor.model.adapter import ADAPTER_FILE, Adapter
from deepdoctor.train.flat import Piece
from deepdoctor.train.optimizer import optimizer_state, restore_optimizer

__all__ = ["Progress", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

_NAME = re.compile(r"step-(\d{6,})$")


@dataclass
class Progress:
    """Where training stands. step: optimizer steps done; tokens, label_tokens: seen so far; seconds: spent training."""

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    updates_applied: int = 0
    seconds: float = 0.0
    loss_scale: float = 1.0


def save_checkpoint(
    folder: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    fingerprint: str,
    base_model: str,
    keep: int,
    pieces: Sequence[Piece] | None = None,
) -> Path:
    """Write ``folder/step-NNNNNN`` and drop all but the newest ``keep``. Returns the new folder.

    fingerprint: hash of everything that decides the curve; a resume with another one is refused. pieces:
    ``FlatAdapter.pieces`` where the optimizer works on the flat parameter; the files are the same either way.
    Raises RunError where the disk is full or read-only; older checkpoints stay whole.
    """
    target = folder / f"step-{progress.step:06d}"
    if target.exists():
        return target
    partial = folder / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        adapter.save(partial, base_model)
        tensors, numbers = optimizer_state(optimizer, pieces)
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        save_file(tensors, partial / "optimizer.safetensors")
        state = {"progress": vars(progress), "optimizer": numbers, "fingerprint": fingerprint}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            _sync(path)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError to safetensors
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"checkpoint {target} could not be written: {getattr(error, 'strerror', None) or error}",
            "free some space or choose another `--runs_dir`, then run again with `--resume`; older checkpoints are "
            "whole",
        ) from None
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _all(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load_checkpoint(
    path: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    pieces: Sequence[Piece] | None = None,
) -> Progress:
    """Restore adapter, optimizer and random states in place and return the progress.

    pieces: as for ``save_checkpoint``; what was saved flat goes on with single parameters and the other way round.
    Raises RunError where the checkpoint was made by another recipe or cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "optimizer.safetensors")
        weights = load_file(path / ADAPTER_FILE)
    except Exception as error:
        raise RunError(
            f"checkpoint {path} cannot be read: {error}", "delete this folder; the one before it is used"
        ) from None
    if state["fingerprint"] != fingerprint:
        raise RunError(
            f"checkpoint {path} was made by another recipe (model, data or training settings differ)",
            "resume with the recipe in the run folder's recipe.yaml, or start a new run with another `--name`",
        )
    adapter.load_state(weights, str(path))
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    restore_optimizer(optimizer, tensors, state["optimizer"], pieces)
    return Progress(**state["progress"])
