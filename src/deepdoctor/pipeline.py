"""The main path: data -> train -> compare -> export -> push, with one question asked before and after.

Every stage is a function from the recipe and earlier artifacts to a folder of the run, so each also runs alone and an
interrupted run goes on from its folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepdoctor.ask import ask_and_keep
from deepdoctor.compare.placebo import native_prompt
from deepdoctor.compare.stage import compare_sides
from deepdoctor.data.stage import prepare_data
from deepdoctor.disk import refuse_full_disk
from deepdoctor.errors import RunError
from deepdoctor.export.stage import export_model
from deepdoctor.publish.check import prepare_hub
from deepdoctor.publish.stage import push_after_run
from deepdoctor.recipe import Recipe
from deepdoctor.recipe_file import load_recipe
from deepdoctor.run_folder import RunFolder
from deepdoctor.session import Session
from deepdoctor.track.tracker import Tracker, check_trackers
from deepdoctor.train.placebo import train_placebos
from deepdoctor.train.stage import train_adapter
from deepdoctor.ui import Reporter, SilentReporter

__all__ = ["STAGES", "RunResult", "run"]

STAGES = ("data", "train", "compare", "export")


@dataclass
class RunResult:
    """What a run left: its folder, the comparison (as in stats.json), the answers read by people, the exports.

    pushed: address of each repository by kind, where the recipe pushes.
    """

    folder: Path
    stats: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    exported: dict[str, str] = field(default_factory=dict)
    pushed: dict[str, str] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """The page to open."""
        return self.folder / "compare" / "report.html"


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    resume: bool = False,
    stages: Sequence[str] = STAGES,
    show_rows: int = 0,
    reporter: Reporter | None = None,
) -> RunResult:
    """Carry out a recipe: file, mapping or Recipe.

    resume: go on in an existing run folder. stages: which of STAGES to carry out; earlier ones must be complete.
    show_rows: print that many rows with their loss mask. Raises DeepDoctorError for anything a user can mend.
    """
    recipe = load_recipe(recipe)
    _refuse_gaps(Path(recipe.runs_dir) / recipe.name, stages)
    reporter = reporter or SilentReporter()
    prepare_hub(recipe, reporter, push=tuple(stages) == STAGES)
    check_trackers(recipe.track.to)
    if tuple(stages) == STAGES:
        refuse_full_disk(recipe)
    folder = RunFolder.create(recipe, resume)
    session = Session(recipe, folder, reporter)
    result = RunResult(folder.path)
    session.prompt  # noqa: B018  a wrong model, template or task stops here, before any work
    if "compare" in stages and not folder.done("compare"):
        session.tasks  # noqa: B018
        native_prompt(session)
    data = prepare_data(session, show_rows)
    with Tracker(recipe, folder, reporter, recipe.track.to if _shows(folder, stages) else ()) as tracker:
        if "train" in stages:
            if recipe.ask.questions:
                ask_and_keep(session, folder, "before", ("base",))
            if not folder.done("train/adapter"):
                train_adapter(session, data, resume, tracker.step)
            if recipe.ask.questions:
                result.answers = ask_and_keep(session, folder, "after", ("base", "tuned"))
                tracker.samples(result.answers)
        if {"train", "compare"} & set(stages) and not folder.done("compare"):
            train_placebos(session, data, resume)
        if "compare" in stages:
            result.stats = compare_sides(session, data)
            tracker.report(result.stats)
    if "export" in stages:
        result.exported = export_model(session, data)
    if tuple(stages) == STAGES:
        folder.update(status="done")
        result.pushed = _push(recipe, folder, reporter)
    return result


def _shows(folder: RunFolder, stages: Sequence[str]) -> bool:
    """Whether these stages have anything left to do that a tracker would show."""
    made = {"train": "train/adapter", "compare": "compare"}
    return any(stage in stages and not folder.done(done) for stage, done in made.items())


def _push(recipe: Recipe, folder: RunFolder, reporter: Reporter) -> dict[str, str]:
    """Publish what was exported, where the recipe says so; a push that fails leaves the run complete."""
    push = recipe.push
    if push.to is None:
        return {}
    pushed = push_after_run(folder, push.to, push.what, public=push.public, base=push.base, reporter=reporter)
    return {kind: one.url for kind, one in pushed.items()}


def _refuse_gaps(folder: Path, stages: Sequence[str]) -> None:
    """A stage that runs alone needs the ones before it; raise RunError where they are missing, and make nothing."""
    needs = {"train": ("data",), "compare": ("data", "train/adapter"), "export": ("data", "train/adapter")}
    made = set(stages)
    for stage in stages:
        for need in needs.get(stage, ()):
            if need.split("/")[0] not in made and not (folder / need).is_dir():
                command = need.split("/")[0]
                raise RunError(
                    f"{folder} has no complete {command} stage, which {stage} starts from",
                    f"run `deepdoctor {command} RECIPE` first, or `deepdoctor run RECIPE` for all",
                )
