"""A plan without weights: from the model's shape (``model.shape``) and, where they are local, the real rows."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from deepdoctor.data.placebo import SHUFFLES
from deepdoctor.disk import beside_training, rooms
from deepdoctor.model.shape import Shape, model_shape
from deepdoctor.recipe import Recipe
from deepdoctor.sizes import parse_size
from deepdoctor.train.plan import Plan, make_plan

__all__ = ["plan_without_loading"]

ASSUMED_LENGTHS = (540, 620, 670, 740, 880, 1050)
"""Tokens of medical-o1 rows under the Llama 3.1 tokenizer where rows cannot be read: quantiles of 198 real rows
(median 670, 90 % at most 878, 99 % at most 1,048)."""


def _lengths(recipe: Recipe) -> tuple[list[int], bool, str]:
    """Row lengths: measured where rows and tokenizer are local, else assumed."""
    source = recipe.data.source
    local_rows = source.startswith("embedded:") or Path(source).expanduser().exists()
    local_model = recipe.model.id.startswith("embedded:") or Path(recipe.model.id).expanduser().exists()
    if local_rows and local_model:
        from deepdoctor.data.split import split_rows
        from deepdoctor.data.stage import read_and_check
        from deepdoctor.session import Session
        from deepdoctor.ui import SilentReporter

        session = Session(recipe, None, SilentReporter())
        kept, _ = read_and_check(session)
        train, _ = split_rows([row for row, _ in kept], recipe.data.held_out, recipe.seed)
        indexes = {row.index for row in train}
        return [len(e.input_ids) for row, e in kept if row.index in indexes], True, ""
    rows = recipe.data.max_rows or 1000
    lengths = [min(length, recipe.data.max_seq_len) for length in ASSUMED_LENGTHS] * math.ceil(
        rows / len(ASSUMED_LENGTHS)
    )
    note = f"rows of {source} were not read: lengths assumed (median 670 tokens, longest {max(lengths)})" + (
        "" if recipe.data.max_rows else f", {rows} rows assumed"
    )
    return lengths[:rows], False, note


def plan_without_loading(recipe: Recipe, vram: str | None = None, shape: Shape | None = None) -> tuple[Plan, list[str]]:
    """Return the plan and notes on what it rests on.

    vram: plan for a GPU of this size whatever this machine has. shape: of the model; None looks for it (model_shape).
    Raises TrainingError where the run cannot fit into memory, and as ``model_shape``.
    """
    from deepdoctor.model.load import choose_device
    from deepdoctor.model.precision import gpu_matmul_rate, resolve_precision

    shape = shape or model_shape(recipe.model.id, recipe.model.revision)
    config, notes = shape.config, [shape.note]
    lengths, measured, note = _lengths(recipe)
    if note:
        notes.append(note)
    has_gpu = torch.cuda.is_available() and recipe.model.device != "cpu"
    if vram is not None or (recipe.model.device == "cuda" and not has_gpu):
        device, memory = torch.device("cuda"), parse_size("80GiB" if vram is None else vram)
        notes.append(
            f"planned for a GPU with {memory / 1024:,.0f} GiB" + ("" if has_gpu else "; this machine has none")
        )
    else:
        device, memory = choose_device(recipe.model.device), None
    precision: str = recipe.model.precision
    if device.type == "cuda" and not has_gpu:
        precision = "bf16" if precision == "auto" else precision
        held, compute = precision, torch.float16 if precision == "fp16" else torch.bfloat16
    else:
        held, compute = resolve_precision(precision, device)
    if shape.is_nf4:
        held = "nf4"
    plan = make_plan(
        config,
        recipe.train,
        lengths,
        device=device,
        precision=held,
        compute_dtype=compute,
        memory_mib=memory,
        lengths_measured=measured,
        seed=recipe.seed,
        matmul_rate=gpu_matmul_rate(device, compute) if device.type == "cuda" and has_gpu else None,
        disk=beside_training(recipe, config),
    )
    notes += [f"it does not fit on {room.place}: {room.words()}" for room in rooms(recipe, shape) if room.short]
    trained = [arm for arm in recipe.compare.placebo if arm in SHUFFLES]
    if trained:
        notes.append(
            f"compare.placebo {', '.join(trained)}: the plan is carried out once more for each, and each answers all "
            "questions"
        )
    return plan, notes
