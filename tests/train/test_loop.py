"""The curve depends on rows, recipe and seed alone: not on micro-batches, interruptions or a number format's range."""

import json
import logging
import os
import signal
import threading

import pytest
import torch

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.errors import RunError, TrainingError
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.model.load import load_decoder
from deepdoctor.train import checkpoint, loop
from deepdoctor.train.checkpoint import latest_checkpoint, load_checkpoint
from deepdoctor.train.held_out import held_out_losses, mean_loss
from deepdoctor.train.loop import Interrupted, train
from deepdoctor.train.optimizer import make_optimizer
from helpers_train import losses, new_adapter, run_training, short_section, synthetic_rows

ROWS = synthetic_rows(24)


@pytest.fixture(scope="module")
def decoder(tiny_r1):
    """The tiny base in fp32."""
    return load_decoder(tiny_r1, "fp32")


class Crash(Exception):
    """Stands for a killed process: nothing after it runs."""


def crash_after(step):
    """An on_step that raises once ``step`` is done."""

    def on_step(metrics, steps):
        if metrics["step"] == step:
            raise Crash

    return on_step


def lines(folder):
    """metrics.jsonl as dicts."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_training_learns(decoder, tmp_path):
    """Four rows seen again and again: the loss falls far below where it began, and every step leaves one line."""
    section = short_section(global_batch_size=4, max_steps=25, learning_rate=2e-2)
    result, _ = run_training(decoder, ROWS[:4], section, tmp_path)
    curve = losses(result)
    assert curve[-1] < 0.8 * curve[0]
    assert lines(tmp_path) == result.metrics
    assert [line["step"] for line in result.metrics] == list(range(1, 26))
    first = result.metrics[0]
    assert first["rows"] == 4
    assert first["tokens"] == sum(len(row.input_ids) for row in ROWS[:4])
    assert first["label_tokens"] == sum(label != IGNORE_INDEX for row in ROWS[:4] for label in row.labels[1:])
    assert result.progress.tokens == 25 * first["tokens"]
    assert first["learning_rate"] == 0.0, "the warm-up starts from zero"


def test_the_first_loss_is_the_bases_own(decoder, tmp_path):
    """A fresh adapter changes nothing, so step 1 has the base's loss on its rows, per label token of the whole step."""
    section = short_section(shuffle=False, max_steps=1)
    result, _ = run_training(decoder, ROWS, section, tmp_path, token_budget=64)
    assert losses(result) == pytest.approx([mean_loss(held_out_losses(decoder, None, ROWS[:8], 1000))], rel=1e-6)


@pytest.mark.parametrize(
    ("micro_batch_size", "token_budget"), [(4, 10_000), (2, 10_000), (1, 10_000), (None, 120), (None, 60), (3, 90)]
)
def test_micro_batches_do_not_change_the_curve(decoder, tmp_path, micro_batch_size, token_budget):
    """8x1, 4x2, 2x4, 1x8 and every token budget: the same losses and norms at each step, no drift in the mean."""
    whole, one = run_training(decoder, ROWS, short_section(), tmp_path / "whole")
    section = short_section(micro_batch_size=micro_batch_size)
    cut, other = run_training(decoder, ROWS, section, tmp_path / "cut", token_budget=token_budget)
    differences = [a - b for a, b in zip(losses(whole), losses(cut), strict=True)]
    assert max(map(abs, differences)) < 5e-6
    assert abs(sum(differences) / len(differences)) < 2e-6
    for a, b in zip(whole.metrics, cut.metrics, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert (a["tokens"], a["label_tokens"]) == (b["tokens"], b["label_tokens"])
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2}, {"optimizer": "adamw_8bit", "lora_rank": 64}])
def test_a_resumed_run_gives_the_curve_bit_for_bit(decoder, tmp_path, settings):
    """Killed after step 5, resumed from the checkpoint of 3: losses, norms and weights of a run without a break.

    8-bit state used to leave no checkpoint at all: bitsandbytes nested its tensors in a dict.
    """
    section = short_section(max_steps=8, save_steps=3, **settings)
    straight, one = run_training(decoder, ROWS, section, tmp_path / "straight")
    broken = tmp_path / "broken"
    with pytest.raises(Crash):
        run_training(decoder, ROWS, section, broken, on_step=crash_after(5))
    assert latest_checkpoint(broken / "checkpoints").name == "step-000003"
    with (broken / "metrics.jsonl").open("a", encoding="utf-8") as sink:
        sink.write('{"step": 6, "lo')  # what a killed process may leave
    torch.rand(100)  # another random state than the one that was saved
    resumed, other = run_training(decoder, ROWS, section, broken, resume=True)
    assert losses(resumed) == losses(straight)
    assert [line["grad_norm"] for line in resumed.metrics] == [line["grad_norm"] for line in straight.metrics]
    assert lines(broken) == resumed.metrics
    assert [line["step"] for line in lines(broken)] == list(range(1, 9))
    assert resumed.progress.tokens == straight.progress.tokens
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_dropout_draws_anew_each_step(decoder, tmp_path):
    """With dropout the curve is another one, from the second step on; the same seed gives it again."""
    plain, _ = run_training(decoder, ROWS, short_section(), tmp_path / "plain")
    section = short_section(lora_dropout=0.3)
    one, _ = run_training(decoder, ROWS, section, tmp_path / "one")
    two, _ = run_training(decoder, ROWS, section, tmp_path / "two")
    assert losses(one) == losses(two)
    assert losses(one)[0] == pytest.approx(losses(plain)[0]), "B is zero at first, so there is nothing to drop"
    assert abs(losses(one)[-1] - losses(plain)[-1]) > 1e-4


def test_a_finished_run_has_nothing_left_to_do(decoder, tmp_path):
    """Resuming it takes no step and gives the same weights and metrics."""
    section = short_section(max_steps=3)
    done, one = run_training(decoder, ROWS, section, tmp_path)
    again, other = run_training(decoder, ROWS, section, tmp_path, resume=True)
    assert again.metrics == done.metrics
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_another_recipe_does_not_resume(decoder, tmp_path):
    """The fingerprint of the checkpoint must be the recipe's."""
    section = short_section(max_steps=2)
    run_training(decoder, ROWS, section, tmp_path)
    with pytest.raises(RunError, match="made by another recipe"):
        run_training(decoder, ROWS, section, tmp_path, resume=True, fingerprint="another")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(decoder, tmp_path, number):
    """Ctrl-C or SIGTERM: the step is finished and saved, the old handlers return, and the run goes on from there."""
    section = short_section(max_steps=5)
    straight, _ = run_training(decoder, ROWS, section, tmp_path / "straight")
    before = signal.getsignal(number)

    def on_step(metrics, steps):
        if metrics["step"] == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        run_training(decoder, ROWS, section, tmp_path / "cut", on_step=on_step)
    assert caught.value.step == 2
    assert caught.value.checkpoint == latest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert signal.getsignal(number) is before
    resumed, _ = run_training(decoder, ROWS, section, tmp_path / "cut", resume=True)
    assert losses(resumed) == losses(straight)


def test_a_second_ctrl_c_acts_at_once(decoder, tmp_path):
    """Whoever cannot wait for the step presses again."""

    def on_step(metrics, steps):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_training(decoder, ROWS, short_section(), tmp_path, on_step=on_step)


def test_training_runs_outside_the_main_thread(decoder, tmp_path):
    """Where signals cannot be caught, training works without."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(run_training(decoder, ROWS, short_section(max_steps=2), tmp_path)[0])
    )
    thread.start()
    thread.join()
    assert len(losses(found[0])) == 2


def test_a_non_finite_loss_stops_with_step_and_rows(tiny_r1, tmp_path):
    """A row whose token has no finite embedding: the error names step and rows; the checkpoint before it is whole."""
    decoder = load_decoder(tiny_r1, "fp32")
    decoder.embedding[600] = float("nan")
    rows = list(ROWS[:10])
    bad = rows[5]
    rows[5] = EncodedRow([600, *bad.input_ids[1:]], bad.labels, bad.reasoning, bad.answer)
    section = short_section(global_batch_size=2, max_steps=5, save_steps=1, shuffle=False)
    names = [f"rows.jsonl:{n + 1}" for n in range(10)]
    with pytest.raises(TrainingError, match="the loss of step 3 is nan") as caught:
        run_training(decoder, rows, section, tmp_path, row_names=names)
    assert "rows.jsonl:5, rows.jsonl:6" in caught.value.message
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert_whole(decoder, section, tmp_path, step=2)


def test_a_non_finite_gradient_stops_before_the_update(decoder, tmp_path):
    """The loss may be finite and its gradient not; the spoilt weights used to reach the next checkpoint."""
    section = short_section(max_steps=5, save_steps=1)
    adapter = new_adapter(decoder, section)
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 3 else gradient

    next(iter(adapter.parameters())).register_hook(spoil)
    with pytest.raises(TrainingError, match=r"the gradient norm of step 3 is (inf|nan)"):
        train(decoder, adapter, ROWS, section, seed=7, folder=tmp_path, token_budget=10_000, fingerprint="f")
    assert all(p.isfinite().all() for p in adapter.parameters())
    assert_whole(decoder, section, tmp_path, step=2)


def assert_whole(decoder, section, folder, step):
    """The newest checkpoint is of ``step``, loads, and holds finite weights."""
    newest = latest_checkpoint(folder / "checkpoints")
    adapter = new_adapter(decoder, section)
    optimizer, _ = make_optimizer(adapter.parameters(), "adamw", 1e-3, 0.0, (0.9, 0.999), decoder.device)
    assert load_checkpoint(newest, adapter, optimizer, "f").step == step
    assert all(p.isfinite().all() for p in adapter.parameters())


def test_a_full_disk_stops_with_a_run_error(decoder, tmp_path, monkeypatch):
    """A checkpoint that cannot be written ends the run in words; the one before it is whole and is gone on from."""
    section = short_section(max_steps=4, save_steps=1)
    write = checkpoint.save_file
    written = []

    def full(tensors, path, *args, **kwargs):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        write(tensors, path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="step-000003 could not be written: No space left"):
        run_training(decoder, ROWS, section, tmp_path)
    assert_whole(decoder, section, tmp_path, step=2)
    resumed, _ = run_training(decoder, ROWS, section, tmp_path, resume=True)
    assert [line["step"] for line in resumed.metrics] == [1, 2, 3, 4]


def test_checkpoints_come_as_often_as_asked_and_the_newest_stay(decoder, tmp_path):
    """save_steps 2 and keep_checkpoints 2 over 5 steps leave steps 4 and 5 (the end is always saved)."""
    run_training(decoder, ROWS, short_section(max_steps=5, save_steps=2, keep_checkpoints=2), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_held_out_loss_is_taken_on_the_way(decoder, tmp_path):
    """eval_steps 2 over 5 steps: after 2 and 4, equal to the adapter's loss there, and the curve is untouched."""
    rows, held_out = ROWS[:16], ROWS[16:]
    heard = []
    section = short_section(max_steps=5, eval_steps=2, lora_dropout=0.1)
    result, _ = run_training(
        decoder, rows, section, tmp_path / "eval", held_out=held_out, on_held_out=lambda step, loss: heard.append(step)
    )
    assert heard == [2, 4]
    assert [("held_out_loss" in line) for line in result.metrics] == [False, True, False, True, False]
    plain, _ = run_training(decoder, rows, short_section(max_steps=5, lora_dropout=0.1), tmp_path / "plain")
    assert losses(plain) == losses(result)
    # The rate still rises at step 2, whose update is the first that moves anything.
    base = mean_loss(held_out_losses(decoder, None, held_out, 1000))
    assert result.metrics[1]["held_out_loss"] != pytest.approx(base, abs=1e-6)


def test_warmup_ratio_is_a_share_of_the_steps(decoder, tmp_path):
    """A quarter of 8 steps warms up: 0, half, full."""
    section = short_section(max_steps=8, warmup_steps=0, warmup_ratio=0.25, learning_rate=1e-3, schedule="constant")
    result, _ = run_training(decoder, ROWS, section, tmp_path)
    assert [line["learning_rate"] for line in result.metrics] == pytest.approx([0, 5e-4, *[1e-3] * 6])


def test_clipping_bounds_the_step(decoder, tmp_path):
    """With a tiny max_grad_norm the reported norm stays the raw one, and the weights end elsewhere than without."""
    free, one = run_training(decoder, ROWS, short_section(max_grad_norm=0, max_steps=2), tmp_path / "free")
    cut, other = run_training(decoder, ROWS, short_section(max_grad_norm=1e-9, max_steps=2), tmp_path / "cut")
    assert free.metrics[0]["grad_norm"] == cut.metrics[0]["grad_norm"] > 1e-3
    moved = [max(float(p.detach().abs().max()) for p in a.b.values()) for a in (one, other)]
    # Below AdamW's eps of 1e-8 a gradient no longer sets the whole step.
    assert moved[1] < 0.5 * moved[0]


def test_fp16_overflow_halves_the_scale_and_repeats_the_step(tiny_r1, tmp_path, monkeypatch, caplog):
    """From a scale far too large: it falls until gradients are finite, no update is skipped, the curve is fp16's."""
    decoder = load_decoder(tiny_r1, "fp16")
    section = short_section(max_steps=4)
    calm, _ = run_training(decoder, ROWS, section, tmp_path / "calm")
    assert {line["loss_scale"] for line in calm.metrics} == {loop.FP16_FIRST_SCALE}
    monkeypatch.setattr(loop, "FP16_FIRST_SCALE", 2.0**30)
    with caplog.at_level(logging.WARNING):
        wild, _ = run_training(decoder, ROWS, section, tmp_path / "wild")
    assert "loss scale lowered" in caplog.text
    assert wild.metrics[0]["loss_scale"] < 2.0**30
    assert [line["updates_applied"] for line in wild.metrics] == [line["step"] for line in wild.metrics] == [1, 2, 3, 4]
    assert losses(wild) == pytest.approx(losses(calm), abs=2e-3)
    exact, _ = run_training(load_decoder(tiny_r1, "fp32"), ROWS, section, tmp_path / "fp32")
    assert losses(calm) == pytest.approx(losses(exact), abs=2e-2)


def test_the_loss_scale_survives_a_resume(tiny_r1, tmp_path, monkeypatch):
    """A lowered scale is part of the checkpoint, so the resumed curve is the same."""
    decoder = load_decoder(tiny_r1, "fp16")
    monkeypatch.setattr(loop, "FP16_FIRST_SCALE", 2.0**30)
    section = short_section(max_steps=4, save_steps=2)
    straight, _ = run_training(decoder, ROWS, section, tmp_path / "straight")
    with pytest.raises(Crash):
        run_training(decoder, ROWS, section, tmp_path / "cut", on_step=crash_after(3))
    resumed, _ = run_training(decoder, ROWS, section, tmp_path / "cut", resume=True)
    assert losses(resumed) == losses(straight)
    assert resumed.metrics[-1]["loss_scale"] == straight.metrics[-1]["loss_scale"]


def test_a_step_without_labels_is_refused(decoder, tmp_path):
    """Rows in which nothing trains cannot give a loss; the error names them."""
    silent = [EncodedRow(row.input_ids, [IGNORE_INDEX] * len(row.labels), row.reasoning, row.answer) for row in ROWS]
    with pytest.raises(TrainingError, match="step 1 is nan"):
        run_training(decoder, silent, short_section(), tmp_path)
