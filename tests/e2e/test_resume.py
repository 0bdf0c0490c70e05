"""The real command, killed or interrupted in mid-training and taken up again, gives the run that was never broken."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers_run import write_recipe

STEPS, SAVE_STEPS = 24, 5


def values(model, folder):
    """A recipe whose training takes long enough to be hit, and whose other stages take no time."""
    return {
        "name": "resume",
        "runs_dir": str(folder / "runs"),
        "seed": 7,
        "model": {"id": str(model), "precision": "fp32", "device": "cpu"},
        "data": {"source": "embedded:rows", "max_rows": 16, "held_out": 2, "template": "native", "max_seq_len": 4096},
        "train": {
            "lora_rank": 4,
            "lora_dropout": 0.1,
            "global_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "save_steps": SAVE_STEPS,
        },
        "compare": {"held_out_loss": False, "held_out_questions": 0},
        "export": {"adapter": False, "merged": False},
    }


def start(recipe, *flags):
    """Start ``deepdoctor run`` as a process of its own, one thread so that sums keep their order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "deepdoctor.cli", "run", str(recipe), *flags],
        cwd=recipe.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    """Wait for it; return what it told on stderr."""
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told
    return told


def metrics(folder):
    """metrics.jsonl of the run, whole lines only."""
    text = (folder / "runs" / "resume" / "train" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def wait_for_step(process, folder, step):
    """Return once the run has written the line of ``step``."""
    path = folder / "runs" / "resume" / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "training did not get there in a minute"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def straight(tiny_r1, tmp_path_factory):
    """The losses of the run that nobody breaks."""
    folder = tmp_path_factory.mktemp("straight")
    finish(start(write_recipe(folder / "recipe.yaml", values(tiny_r1, folder))))
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(folder)]


def curve(folder):
    """Step, loss and norm of every line."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(folder)]


def test_a_killed_run_goes_on_from_its_checkpoint(tiny_r1, tmp_path, straight):
    """kill -9 past a checkpoint, then the same command with --resume: the same losses to the last bit."""
    recipe = write_recipe(tmp_path / "recipe.yaml", values(tiny_r1, tmp_path))
    process = start(recipe)
    wait_for_step(process, tmp_path, SAVE_STEPS + 3)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    run = tmp_path / "runs" / "resume"
    done = len(metrics(tmp_path))
    assert SAVE_STEPS < done < STEPS, "the process was not hit in mid-training"
    assert not (run / "train" / "adapter").exists()
    saved = [int(p.name.removeprefix("step-")) for p in (run / "train" / "checkpoints").glob("step-*")]
    assert saved and max(saved) % SAVE_STEPS == 0
    told = finish(start(recipe, "--resume"))
    assert f"step-{max(saved):06d}" in told, "it must say from where it goes on"
    assert curve(tmp_path) == straight
    assert [step for step, _, _ in straight] == list(range(1, STEPS + 1))
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["status"] == "done"
    assert (run / "train" / "adapter" / "adapter_model.safetensors").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_r1, tmp_path, straight):
    """SIGINT ends the step, writes a checkpoint of it, exits with 130; --resume repeats nothing, same curve."""
    recipe = write_recipe(tmp_path / "recipe.yaml", values(tiny_r1, tmp_path))
    process = start(recipe)
    wait_for_step(process, tmp_path, SAVE_STEPS + 2)
    process.send_signal(signal.SIGINT)
    told = finish(process, 130)
    assert "--resume" in told
    before = metrics(tmp_path)
    assert SAVE_STEPS < len(before) < STEPS, "the process was not hit in mid-training"
    checkpoints = tmp_path / "runs" / "resume" / "train" / "checkpoints"
    assert max(p.name for p in checkpoints.iterdir()) == f"step-{before[-1]['step']:06d}"
    finish(start(recipe, "--resume"))
    assert metrics(tmp_path)[: len(before)] == before, "steps that were done are not done again"
    assert curve(tmp_path) == straight


def test_a_killed_comparison_goes_on(tiny_r1, tmp_path):
    """kill -9 between answers, then --resume: nothing is asked twice and answers.jsonl is that of an unbroken run."""
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    for folder in (whole, broken):
        folder.mkdir()
        asked = {"held_out_loss": False, "held_out_questions": 2, "tasks": ["embedded:questions"], "max_questions": 6}
        settings = {**asked, "max_new_tokens": 120, "temperature": 0.9, "batch_size": 2}
        few = {**values(tiny_r1, folder), "compare": settings}
        few["train"] = {**few["train"], "max_steps": 1}
        write_recipe(folder / "recipe.yaml", few)
    finish(start(whole / "recipe.yaml"))
    journal = broken / "runs" / "resume" / ".compare.answers.jsonl"
    process = start(broken / "recipe.yaml")
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, "the comparison was not hit"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert not (journal.parent / "compare").exists()
    assert "going on after" in finish(start(broken / "recipe.yaml", "--resume"))
    answers = [(folder / "runs" / "resume" / "compare" / "answers.jsonl").read_bytes() for folder in (whole, broken)]
    assert answers[0] == answers[1] and answers[0].count(b"\n") == 16
    assert not journal.exists()
