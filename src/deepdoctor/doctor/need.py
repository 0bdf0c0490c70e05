"""What a recipe needs of this machine: its plan, memory of the host, and room on the disks it writes to."""

from __future__ import annotations

import os
from pathlib import Path

from deepdoctor.disk import free_disk, rooms
from deepdoctor.doctor.check import Check, make_check
from deepdoctor.doctor.machine import GIB, host_memory
from deepdoctor.errors import DeepDoctorError, HubError
from deepdoctor.model.shape import Shape, model_shape
from deepdoctor.recipe import Recipe
from deepdoctor.train.plan import RUNTIME_MIB, Plan

__all__ = ["check_demo", "check_recipe"]

DEMO_MEMORY_GIB, DEMO_DISK_GIB = 4, 2
MIB = 2**20


def check_demo() -> list[Check]:
    """Memory and disk against what the demo needs, for a machine without a recipe in view."""
    total, available = host_memory()
    small = total < DEMO_MEMORY_GIB * GIB
    found = f"{total / GIB:.0f} GiB, {available / GIB:.1f} GiB free"
    memory = make_check("memory", "bad" if small else "ok", found, "the demo needs 4 GiB" if small else None)
    _, free = free_disk(Path())
    tight = free < DEMO_DISK_GIB * GIB
    found = f"{free / GIB:.0f} GiB free here"
    return [memory, make_check("disk", "bad" if tight else "ok", found, "the demo needs 2 GiB" if tight else None)]


def check_recipe(recipe: Recipe) -> list[Check]:
    """The plan, and memory and disk against it. Downloads nothing and loads no weights."""
    try:
        shape = model_shape(recipe.model.id, recipe.model.revision, ask_hub=False)
    except HubError as error:
        return [make_check("plan", "note", error.message, error.hint), *check_demo()]
    except (DeepDoctorError, OSError) as error:
        remedy = (isinstance(error, DeepDoctorError) and error.hint) or "`deepdoctor plan RECIPE`"
        return [make_check("plan", "bad", str(error).split("\n")[0], remedy), *check_demo()]
    from deepdoctor.dry_run import plan_without_loading

    try:
        plan, _ = plan_without_loading(recipe, recipe.model.vram, shape)
    except DeepDoctorError as error:
        return [make_check("plan", "bad", error.message, error.hint or "`deepdoctor plan RECIPE`"), *check_demo()]
    found = (
        f"{plan.steps} steps, peak {plan.predicted_peak_mib:,.0f} of {plan.available_mib:,.0f} MiB on {plan.device}, "
        f"held as {plan.precision}"
    )
    if plan.tokens_per_s:
        found += f", about {plan.tokens / plan.tokens_per_s / 60:,.1f} min of training"
    if not plan.lengths_measured:
        found += "; rows not read, lengths assumed"
    return [make_check("plan", "ok", found), _check_memory(plan), *_check_disks(recipe, shape)]


def _check_memory(plan: Plan) -> Check:
    total, available = host_memory()
    host_mib = plan.predicted_peak_mib
    if plan.device.startswith("cuda"):
        host_mib = RUNTIME_MIB["cpu"] + (plan.engine.host_bytes / MIB if plan.engine is not None else 0)
    need = host_mib * MIB
    found = f"{available / GIB:.1f} of {total / GIB:.0f} GiB free, the recipe needs {need / GIB:.1f}"
    if need > total:
        return make_check("memory", "bad", found, "take a smaller model, fewer tokens, or another machine")
    if need > available:
        return make_check("memory", "note", found, "end other programs first")
    return make_check("memory", "ok", found)


def _check_disks(recipe: Recipe, shape: Shape) -> list[Check]:
    """A line for the runs, and one for the Hub's cache where that is another disk and something is to come."""
    runs, _ = free_disk(Path(recipe.runs_dir))
    if not os.access(runs, os.W_OK):
        return [make_check("disk", "bad", f"{runs} cannot be written", "choose another place with `--runs_dir`")]
    return [
        make_check(
            room.name,
            "bad" if room.short else "ok",
            room.words(),
            f"free some space, export less, or choose another with {room.where}" if room.short else None,
        )
        for room in rooms(recipe, shape)
    ]
