"""The commands behind ``deepdoctor.cli``. stdout carries data (answers, paths, --json); stderr carries the story."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from deepdoctor.options import Fields, Several, given_fields, make_reporter, resolve_recipe
from deepdoctor.recipe import Recipe
from deepdoctor.recipe_file import is_recipe, load_recipe

if TYPE_CHECKING:
    from deepdoctor.train.plan import Plan

__all__ = [
    "ask_command",
    "compare_command",
    "dashboard_command",
    "data_command",
    "doctor_command",
    "export_command",
    "login_command",
    "plan_command",
    "push_command",
    "recipe_command",
    "run_command",
    "schema_command",
    "train_command",
]


def _plan(recipe: Recipe, vram: str | None) -> tuple[Plan, list[str]]:
    from deepdoctor.dry_run import plan_without_loading
    from deepdoctor.publish.check import prepare_hub

    prepare_hub(recipe, make_reporter(), push=False)  # a gated model shows its config.json to a token only
    return plan_without_loading(recipe, vram)


def _dry_run(recipe: Recipe, json: bool) -> int:
    plan, notes = _plan(recipe, recipe.model.vram)
    if json:
        print(
            jsonlib.dumps({"recipe": recipe.model_dump(mode="json"), "plan": plan.to_json(), "notes": notes}, indent=2)
        )
        return 0
    print(recipe.to_yaml(), end="")
    print("---")
    for line in [*plan.lines(), *notes]:
        print(f"# {line}")
    return 0


def _stages(recipe: Recipe, stages: tuple[str, ...], resume: bool, json: bool, show_rows: int = 0) -> int:
    from deepdoctor.cpu import prepare_cpu, prepare_gpu

    reporter = make_reporter()
    prepare_cpu(reporter.say)  # before anything that imports torch
    prepare_gpu()
    from deepdoctor.ask import print_answers
    from deepdoctor.compare.outcome import outcome_lines
    from deepdoctor.pipeline import run
    from deepdoctor.train.loop import Interrupted

    try:
        result = run(recipe, resume=resume, stages=stages, show_rows=show_rows, reporter=reporter)
    except Interrupted as stop:
        reporter.say(f"stopped after step {stop.step}; checkpoint {stop.checkpoint}")
        reporter.say("go on with the same command and `--resume`")
        return 130
    if json:
        stats = {key: value for key, value in result.stats.items() if key != "answers"}
        found = {"run": str(result.folder), "stats": stats, "exported": result.exported, "pushed": result.pushed}
        print(jsonlib.dumps(found, ensure_ascii=False))
        return 0
    if result.answers:
        print_answers(result.answers, Console())
    if "compare" in stages:
        for line in outcome_lines(result.stats):
            print(line)
        print(f"report: {result.report}")
    else:
        print(result.folder)
    for kind, url in result.pushed.items():
        print(f"{kind}: {url}")
    return 0


def run_command(
    recipe: Path,
    /,
    *,
    fields: Fields = None,
    resume: bool = False,
    dry_run: bool = False,
    vram: str | None = None,
    json: bool = False,
) -> int:
    """Carry out a whole recipe and end with the report's path.

    Parameters
    ----------
    recipe
        YAML file, or the name of a recipe that comes along, e.g. demo.
    resume
        Go on in an existing run folder from what is complete.
    dry_run
        Print the resolved recipe and the plan; of a model that is not here, only its config.json is fetched.
    vram
        Use no more of the GPU than a card of this size has, e.g. 15GiB; with --dry-run no GPU is needed.
    json
        Print the result as one JSON object.
    """
    resolved = resolve_recipe(recipe, fields, vram)
    if dry_run:
        return _dry_run(resolved, json)
    return _stages(resolved, ("data", "train", "compare", "export"), resume, json)


def data_command(
    source: Path, /, *, fields: Fields = None, rows: int = 3, page: Path | None = None, json: bool = False
) -> int:
    """Check rows: what is found, what is dropped and why, and three rows with their loss mask.

    Parameters
    ----------
    source
        Recipe (.yaml, or a name such as demo), or a file of rows, which is checked with the embedded model's tokenizer.
    rows
        Rows shown with trained and masked tokens apart.
    page
        Write the check as an HTML page, with examples of what was found.
    json
        Print check.json.
    """
    from deepdoctor.data.command import check_source
    from deepdoctor.publish.check import prepare_hub

    reporter = make_reporter()
    if is_recipe(source):
        prepare_hub(resolve_recipe(source, fields), reporter, push=False)
    return check_source(source, given_fields(fields), rows, json, reporter, page)


def train_command(
    recipe: Path, /, *, fields: Fields = None, resume: bool = True, vram: str | None = None, json: bool = False
) -> int:
    """Train the adapter of a run whose data stage is complete; resumes from its newest checkpoint.

    Parameters
    ----------
    recipe
        YAML file, or the name of a recipe that comes along.
    resume
        Go on from the newest checkpoint.
    vram
        Use no more of the GPU than a card of this size has, e.g. 15GiB.
    json
        Print the result as one JSON object.
    """
    return _stages(resolve_recipe(recipe, fields, vram), ("train",), resume, json)


def compare_command(
    recipe: Path | None = None,
    /,
    *,
    answers: Annotated[list[Path] | None, Several] = None,
    task: Annotated[list[str] | None, Several] = None,
    models: Annotated[list[str] | None, Several] = None,
    out: Path | None = None,
    plan: Annotated[bool, Parameter(negative=())] = False,
    questions: int | None = None,
    resolution: float | None = None,
    discordance: Annotated[list[float] | None, Several] = None,
    tokens_per_s: float | None = None,
    engine: str | None = None,
    fields: Fields = None,
    json: bool = False,
) -> int:
    """Compare base and tuned of a trained run on unseen questions; or answers made elsewhere; or plan a comparison.

    Parameters
    ----------
    recipe
        YAML file of a trained run; left out with --answers and --plan.
    answers
        Answers made elsewhere (.jsonl, .jsonl.gz): base and tuned of each task in turn, or a file with both.
    task
        What they answer: medqa, medmcqa, mmlu-pro-health, medxpertqa, pubmedqa, or a questions file.
    models
        Base and tuned, where the answers' files hold several models.
    out
        Folder for answers.jsonl, stats.json, report.html and report.md.
    plan
        Say what so many questions of each task can show; asks nobody anything.
    questions
        With --plan: how many questions [default: the public set].
    resolution
        With --plan: the difference in points that is to be seen.
    discordance
        With --plan: share of questions on which only one side is right, low and high [default: 0.15 0.25].
    tokens_per_s
        With --plan: speed measured on the machine in question; without it no minutes are given.
    engine
        Who answers a RECIPE's questions: deepdoctor or vllm; short for --compare.engine.
    json
        Print the result as one JSON object.
    """
    from deepdoctor.errors import UsageError

    if (recipe is not None) + bool(answers) + plan != 1:
        raise UsageError(
            "compare takes one of three: a RECIPE, --answers, or --plan",
            "`deepdoctor compare RECIPE`, `deepdoctor compare --answers BASE TUNED --task NAME`, "
            "`deepdoctor compare --plan --task NAME`",
        )
    foreign = {
        "--task": task and recipe is not None, "--models": models and not answers, "--out": out and not answers,
        "--questions": questions is not None and not plan, "--resolution": resolution is not None and not plan,
        "--discordance": discordance and not plan, "--tokens-per-s": tokens_per_s is not None and not plan,
        "recipe fields": fields is not None and recipe is None, "--engine": engine and recipe is None,
    }  # fmt: skip
    if misplaced := [name for name, given in foreign.items() if given]:
        kind = "a RECIPE" if recipe is not None else "--plan" if plan else "--answers"
        raise UsageError(f"{misplaced[0]} does not go with {kind}", "`deepdoctor compare --help` says what does")
    if recipe is not None:
        return _stages(resolve_recipe(recipe, fields, engine=engine), ("compare",), True, json)
    if plan:
        from deepdoctor.compare.power import ASSUMED_DISCORDANCE, plan_tasks, print_plans

        points = None if resolution is None else resolution / 100
        plans = plan_tasks(task or (), questions, points, discordance or ASSUMED_DISCORDANCE, tokens_per_s)
        print_plans(plans, json)
        return 0
    from deepdoctor.compare.outside_result import compare_outside, print_outside, write_outside

    result = compare_outside(answers or (), task or (), models or ())
    if out is not None:
        write_outside(out, result)
    print_outside(result, out, json)
    return 0


def export_command(recipe: Path, /, *, fields: Fields = None, json: bool = False) -> int:
    """Write adapter and merged model of a trained run."""
    return _stages(resolve_recipe(recipe, fields), ("export",), True, json)


def ask_command(
    question: str,
    /,
    *,
    run: Path | None = None,
    side: str = "both",
    max_new_tokens: int | None = None,
    json: bool = False,
) -> int:
    """Ask base and tuned the same question and print both answers side by side.

    Parameters
    ----------
    question
        What to ask.
    run
        Run folder; the newest under runs/ where left out.
    side
        both, base or tuned.
    max_new_tokens
        Tokens an answer may have; the recipe's where left out.
    json
        Print the answer records as JSON lines.
    """
    from deepdoctor.errors import RunError, UsageError

    sides = {"both": ("base", "tuned"), "base": ("base",), "tuned": ("tuned",)}.get(side)
    if sides is None:
        raise UsageError(f"--side is {side!r}, expected both, base or tuned")
    if not question.strip():
        raise UsageError("the question is empty", 'write it in quotes: `deepdoctor ask "What is ...?"`')
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}, expected at least 1")
    if run is None:
        found = sorted(Path("runs").glob("*/train/adapter"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise RunError(
                "there is no trained run under runs/", "give one with `--run FOLDER`, or `deepdoctor run RECIPE`"
            )
        run = found[-1].parent.parent
    try:
        return _ask(run, question, sides, max_new_tokens, json)
    except KeyboardInterrupt:
        stop = RunError("stopped", "ask again: its answers are not kept, and `--max-new-tokens N` makes them shorter")
        stop.exit_code = 130
        raise stop from None


def _ask(run: Path, question: str, sides: tuple[str, ...], max_new_tokens: int | None, json: bool) -> int:
    """Ask and print. Raises KeyboardInterrupt on Ctrl-C, once what was written by then is printed."""
    from deepdoctor.cpu import prepare_cpu

    reporter = make_reporter()
    prepare_cpu(reporter.say)
    from deepdoctor.ask import ask, print_answers
    from deepdoctor.publish.check import prepare_hub
    from deepdoctor.run_folder import RunFolder
    from deepdoctor.session import Session

    folder = RunFolder.open(run)
    recipe = folder.recipe
    if max_new_tokens is not None:
        recipe = load_recipe(recipe, {"ask": {"max_new_tokens": max_new_tokens}}, {})
    console = Console()
    prepare_hub(recipe, reporter, push=False)
    session = Session(recipe, folder, reporter)
    records = ask(session, [question], sides, None if json else console, stoppable=True)
    if json:
        for record in records:
            print(jsonlib.dumps(record, ensure_ascii=False))
    else:
        print_answers(records, console)
    if any(record.get("stopped") for record in records):
        raise KeyboardInterrupt
    return 0


def dashboard_command(
    runs: Path = Path("runs"),
    /,
    *,
    port: int | None = None,
    browser: Annotated[bool, Parameter(negative="--no-browser")] = True,
) -> int:
    """Show the curves, samples and reports of trained runs in Trackio's page, on this computer only.

    Parameters
    ----------
    runs
        Folder of runs, or one run.
    port
        Port of the page; a free one from 7860 on where left out.
    browser
        Open the page; its address is printed in any case.
    """
    from deepdoctor.track.dashboard import dashboard

    return dashboard(runs, port, browser, make_reporter())


def plan_command(recipe: Path, /, *, fields: Fields = None, vram: str | None = None, json: bool = False) -> int:
    """Print what a recipe would take on this machine, without loading or downloading weights.

    Parameters
    ----------
    recipe
        YAML file, or the name of a recipe that comes along.
    vram
        Plan for a GPU with this much memory, e.g. 15GiB, whatever this machine has.
    json
        Print the plan as JSON.
    """
    resolved = resolve_recipe(recipe, fields)
    plan, notes = _plan(resolved, resolved.model.vram if vram is None else vram)
    if json:
        print(jsonlib.dumps({"plan": plan.to_json(), "notes": notes}, indent=2))
    else:
        for line in [*plan.lines(), *notes]:
            print(line)
    return 0


def push_command(
    run: Path,
    /,
    *,
    to: str | None = None,
    what: Annotated[list[str] | None, Several] = None,
    public: Annotated[bool, Parameter(negative=())] = False,
    base: str | None = None,
    json: bool = False,
) -> int:
    """Publish what a run exported on the Hugging Face Hub, or finish a push that was interrupted.

    Parameters
    ----------
    run
        Run folder, e.g. runs/demo.
    to
        user/name; where left out, the last push's or the recipe's.
    what
        adapter, merged, merged_4bit, gguf, several of them, or all [default: all that the run has].
    public
        Let everybody see it; private otherwise.
    base
        Hub id of the base, where the run used a local folder.
    json
        Print the repositories as one JSON object.
    """
    from dataclasses import asdict

    from deepdoctor.errors import HubError
    from deepdoctor.publish.stage import push_run

    try:
        pushed = push_run(run, to, what or "all", public=public, base=base, reporter=make_reporter())
    except KeyboardInterrupt:
        stop = HubError("stopped", f"what arrived stays there; `deepdoctor push {run}` sends the rest")
        stop.exit_code = 130
        raise stop from None
    if json:
        print(jsonlib.dumps({kind: asdict(one) for kind, one in pushed.items()}))
    else:
        for kind, one in pushed.items():
            print(f"{kind}: {one.url}")
    return 0


def login_command(*, wandb: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Read a token without showing it, or one line from stdin; try it, and store it where the libraries look.

    Parameters
    ----------
    wandb
        Weights & Biases instead of Hugging Face.
    """
    from deepdoctor.errors import HubError
    from deepdoctor.publish.login import login

    try:
        login("wandb" if wandb else "hub", reporter=make_reporter())
    except KeyboardInterrupt:
        stop = HubError("stopped", "nothing was stored")
        stop.exit_code = 130
        raise stop from None
    return 0


def doctor_command(recipe: Path | None = None, /, *, fields: Fields = None, json: bool = False) -> int:
    """Check the machine, and what a recipe needs of it; exit code 1 where something would stop a run.

    Parameters
    ----------
    recipe
        YAML file, or the name of a recipe that comes along: also check plan, memory, disk, downloads and the push.
    json
        Print the checks as JSON.
    """
    from deepdoctor.doctor.command import check_machine, print_checks
    from deepdoctor.errors import UsageError

    if recipe is None and fields is not None:
        raise UsageError("recipe fields go with a RECIPE", "`deepdoctor doctor RECIPE --train.max_steps 20`")
    checks = check_machine(None if recipe is None else resolve_recipe(recipe, fields))
    print_checks(checks, json)
    return 1 if any(check["state"] == "bad" for check in checks) else 0


def recipe_command(name: str | None = None, /) -> int:
    """Print a recipe that comes with DeepDoctor, to be changed: `deepdoctor recipe demo > mine.yaml`.

    Parameters
    ----------
    name
        Which one; where left out, they are listed with their goals.
    """
    from deepdoctor.errors import RecipeError
    from deepdoctor.recipe_file import shipped_recipes

    found = {known: path.read_text(encoding="utf-8") for known, path in shipped_recipes().items()}
    if name is None:
        for known, text in found.items():
            print(f"{known}: {text.splitlines()[0].removeprefix('# Goal: ')}")
    elif name in found:
        print(found[name], end="")
    else:
        raise RecipeError(f"DeepDoctor comes with no recipe {name!r}", f"it has {', '.join(found)}")
    return 0


def schema_command() -> int:
    """Print the JSON schema of a recipe: every field with type, range, default and meaning."""
    print(jsonlib.dumps(Recipe.model_json_schema(), indent=2))
    return 0
