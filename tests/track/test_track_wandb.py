"""Weights & Biases with the real client: a server that answers, refuses, is away or goes away; files read back."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deepdoctor.track.backend import Start
from deepdoctor.track.to_wandb import WandbBackend
from helpers_run import PROJECT, Outcome, call, tiny_recipe, write_recipe

pytest.importorskip("wandb.proto", reason="needs deepdoctor[track]")
from helpers_wandb import KEY, LocalWandb, local_wandb, read_run


def start_in(folder: Path) -> Start:
    """A run that shows itself."""
    return Start("a project", "demo", folder / "track", {"seed": 7}, job_type="training")


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter patience, so that a test of a dead server takes seconds."""
    monkeypatch.setattr(WandbBackend, "finish_s", 4.0)
    monkeypatch.setattr(WandbBackend, "init_s", 5.0)


def connect(monkeypatch: pytest.MonkeyPatch, server: LocalWandb | str) -> None:
    """Give the client a key and a server."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server if isinstance(server, str) else server.url)


def shown(backend: WandbBackend, folder: Path, steps: range) -> None:
    """Show steps."""
    for step in steps:
        backend.step(step, {"train/loss": 1 / step})


def report(backend: WandbBackend, folder: Path, step: int) -> None:
    """Show what comes after training."""
    page = folder / "report.html"
    page.write_text("<p>report", encoding="utf-8")
    backend.table("samples", ["question", "answer"], [["q", "a"]], step)
    backend.outcome({"compare/loss/all/tuned": 1.5}, step)
    backend.files("report", "report", [page], step)


def assert_no_key(folder: Path) -> None:
    """The key is in no file below a folder."""
    held = [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert held == []


def test_online_everything_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, table, outcome, report and config reach the server; nothing is left to send, and the key is in no file."""
    said: list[str] = []
    with local_wandb() as server:
        connect(monkeypatch, server)
        backend = WandbBackend({}, said.append)
        backend.open(start_in(tmp_path), 0)
        shown(backend, tmp_path, range(1, 41))
        report(backend, tmp_path, 40)
        backend.close(False)
        run = server.runs[backend.state["id"]]
        losses = {point["train/step"]: point["train/loss"] for point in server.history if "train/loss" in point}
        assert losses == {step: 1 / step for step in range(1, 41)}
        assert server.files["artifact/report.html"] == b"<p>report"
        assert json.loads(server.files["artifact/samples.table.json"])["data"] == [["q", "a"]]
        assert json.loads(server.files["wandb-summary.json"])["compare/loss/all/tuned"] == 1.5
        assert (run["project"], run["displayName"], run["jobType"]) == ("a project", "demo", "training")
        assert json.loads(run["config"])["seed"]["value"] == 7
    assert said == [f"track: W&B: {server.url}/tester/a%20project/runs/{backend.state['id']}"]
    assert backend.state["unsent"] == [] and backend.todo() is None
    assert_no_key(tmp_path)


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_refuses_makes_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """A key the server does not know, or a server in trouble: the client gives up within its patience, ours goes on.

    The client keeps the id of a run that it could not begin; beginning again with it used to fail.
    """
    quick(monkeypatch)
    said: list[str] = []
    with local_wandb() as server:
        server.refuse = status
        connect(monkeypatch, server)
        backend = WandbBackend({}, said.append)
        began = time.monotonic()
        backend.open(start_in(tmp_path), 0)
        assert time.monotonic() - began < 20
        shown(backend, tmp_path, range(1, 4))
        backend.close(False)
    assert len(said) == 1 and said[0].startswith("track: W&B is written offline: ")
    (name,) = backend.state["unsent"]
    assert len(read_run(tmp_path / "track" / "wandb" / name)["history"]) == 3
    assert_no_key(tmp_path)


def test_a_server_that_dies_in_mid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the run goes into an offline run of the same id, and one command names both; no point is lost."""
    quick(monkeypatch)
    said: list[str] = []
    with local_wandb() as server:
        connect(monkeypatch, server)
        backend = WandbBackend({}, said.append)
        backend.open(start_in(tmp_path), 0)
        shown(backend, tmp_path, range(1, 11))
        server.wait_for(5)
        server.stop()
        shown(backend, tmp_path, range(11, 21))
        began = time.monotonic()
        report(backend, tmp_path, 20)
        backend.close(False)
        assert time.monotonic() - began < 30
    assert said[1:] == ["track: W&B goes on offline: 127.0.0.1 no longer answers"]
    folder = tmp_path / "track" / "wandb"
    first, second = (read_run(folder / name) for name in backend.state["unsent"])
    assert [point["train/step"] for point in first["history"]] == list(range(1, 21))
    assert first["id"] == second["id"] == backend.state["id"]
    assert sorted(second["artifacts"].values()) == [["report.html"], ["samples.table.json"]]
    assert second["summary"]["compare/loss/all/tuned"] == 1.5
    line = backend.todo()
    assert line is not None and line.startswith("track: send it to W&B later: `wandb sync ")
    assert all(name in line for name in backend.state["unsent"])
    assert_no_key(tmp_path)


def test_the_printed_command_sends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb sync` with the folder that was named brings an offline run to a server; then nothing is left to do."""
    said: list[str] = []
    backend = WandbBackend({}, said.append)
    backend.open(start_in(tmp_path), 0)
    shown(backend, tmp_path, range(1, 6))
    report(backend, tmp_path, 5)
    backend.close(False)
    assert said == ["track: W&B is written offline: no key (`deepdoctor login --wandb`, or WANDB_API_KEY)"]
    read_run(tmp_path / "track" / "wandb" / backend.state["unsent"][0])  # once it is whole
    line = backend.todo()
    assert line is not None
    command = shlex.split(line.split("`")[1])
    with local_wandb() as server:
        connect(monkeypatch, server)
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert {point["train/step"] for point in server.history if "train/loss" in point} == {1, 2, 3, 4, 5}
        assert server.files["artifact/report.html"] == b"<p>report"
    assert backend.todo() is None


def test_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline twice: two folders of one run, both named for sending."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    state: dict[str, Any] = {}
    for steps in (range(1, 4), range(4, 7)):
        backend = WandbBackend(state, lambda text: None)
        backend.open(start_in(tmp_path), steps[0] - 1)
        shown(backend, tmp_path, steps)
        backend.close(False)
        time.sleep(1.1)  # the client names folders by the second
    first, second = (read_run(tmp_path / "track" / "wandb" / name) for name in state["unsent"])
    assert first["id"] == second["id"]
    assert [point["train/step"] for part in (first, second) for point in part["history"]] == [1, 2, 3, 4, 5, 6]


def test_disabled_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_MODE=disabled, which people set on machines where nothing may leave: nothing is written."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    backend = WandbBackend({}, lambda text: None)
    backend.open(start_in(tmp_path), 0)
    shown(backend, tmp_path, range(1, 3))
    report(backend, tmp_path, 2)
    backend.close(False)
    assert backend.todo() is None and list(tmp_path.rglob("*.wandb")) == []


def assert_whole(run: Path, outcome: Outcome) -> None:
    """All metrics of a run are in its offline run, and its last words on W&B are the command that sends them."""
    kept = [json.loads(text) for text in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    (command,) = re.findall(r"`wandb sync (\S+)`", outcome.err)
    found = read_run(Path(command))
    points = {point["train/step"]: point for point in found["history"] if "train/loss" in point}
    assert sorted(points) == [line["step"] for line in kept]
    for line in kept:
        assert points[line["step"]]["train/loss"] == line["loss"]
        assert points[line["step"]]["train/grad_norm"] == line["grad_norm"]
    assert found["artifacts"][f"report-{found['id']}"] == sorted(
        ["recipe.yaml", "report.html", "report.md", "report.zh.html", "stats.json"]
    )
    assert f"run-{found['id']}-samples" in found["artifacts"]
    assert found["config"]["train"]["max_steps"] == len(kept)
    stats = json.loads((run / "compare" / "stats.json").read_text(encoding="utf-8"))
    for part, loss in stats["loss"].items():
        assert found["summary"][f"compare/loss/{part}/tuned"] == pytest.approx(loss["tuned"])


def processes_marked(mark: str) -> list[str]:
    """Command lines of the processes that inherited a variable of this value; Linux only, elsewhere none."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def test_a_run_without_key_and_network_ends_with_all_its_metrics(tiny_r1: Path, tmp_path: Path) -> None:
    """The command in a process of its own, W&B on, nobody logged in and every way out closed: it ends well, offline.

    It names the command that sends the run, leaves no process behind, and nothing in the user's home.
    """
    recipe = write_recipe(tmp_path / "r.yaml", {**tiny_recipe(tiny_r1, tmp_path), "track": {"to": ["wandb"]}})
    home = tmp_path / "home"
    home.mkdir()
    mark = f"mark-of-{tmp_path}"
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")}
    private = {"HOME": str(home), "NETRC": str(home / ".netrc"), "MPLCONFIGDIR": str(tmp_path / "mpl"), "MARK": mark}
    hidden = ("WANDB_CONFIG_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-m", "deepdoctor.cli", "run", str(recipe)], capture_output=True, text=True, timeout=180,
        check=False, cwd=tmp_path, env={**kept, **nowhere, **private, "PYTHONPATH": str(PROJECT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "track: W&B is written offline: no key" in done.stderr
    assert_whole(tmp_path / "runs" / "tiny", Outcome(done.returncode, done.stdout, done.stderr))
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "wandb").exists()
    until = time.monotonic() + 10
    while (left := processes_marked(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


@pytest.mark.slow
def test_the_demo_without_key_and_network(
    tmp_path: Path, smollm2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's own model and rows, shortened, with W&B on, no key and no server: the same."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    outcome = call(
        capsys, "run", PROJECT / "recipes" / "demo.yaml", "--runs_dir", tmp_path, "--track.to", "wandb",
        "--data.max_rows", 10, "--data.held_out", 2, "--train.max_steps", 2, "--ask.max_new_tokens", 4,
        "--compare.held_out_questions", 1, "--compare.max_questions", 1, "--compare.max_new_tokens", 4,
        "--export.merged", "false",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "track: W&B is written offline: no key" in outcome.err
    assert_whole(tmp_path / "demo", outcome)


def test_a_run_with_a_key_and_no_server(
    tiny_r1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key, but nobody there: offline within seconds, where the client alone would wait 90 s and end the run."""
    connect(monkeypatch, "http://127.0.0.1:9")
    recipe = write_recipe(tmp_path / "r.yaml", {**tiny_recipe(tiny_r1, tmp_path), "track": {"to": ["wandb"]}})
    outcome = call(capsys, "run", recipe)
    assert outcome.code == 0, outcome.err
    assert "track: W&B is written offline: 127.0.0.1 cannot be reached" in outcome.err
    run = tmp_path / "runs" / "tiny"
    assert_whole(run, outcome)
    assert_no_key(run)
