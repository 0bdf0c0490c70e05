"""Training by the engine is training by autograd: same losses, gradients and curves, and no step is ever lost."""

import logging
from dataclasses import replace

import pytest
import torch

from deepdoctor.data.pack import pack
from deepdoctor.data.prompt import EncodedRow
from deepdoctor.engine.step import Engine, padded
from deepdoctor.errors import TrainingError
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.model.load import load_decoder
from deepdoctor.train import loop
from deepdoctor.train.checkpoint import latest_checkpoint
from deepdoctor.train.gradients import AutogradGradients, EngineGradients, make_gradients
from helpers_engine import by_autograd, engine_plan, loaded
from helpers_models import save_tiny_model
from helpers_train import losses, new_adapter, run_training, short_section, synthetic_rows

ROWS = synthetic_rows(24)
HELD_OUT = synthetic_rows(5, seed=9, longest=70)
SHORT = short_section(micro_batch_tokens=100)
"""Batches of eight rows in about three micro-batches."""


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request, tmp_path_factory):
    """A tiny model of each family; Qwen2 with biases, Qwen3 with norms on q and k."""
    path = tmp_path_factory.mktemp(request.param)
    save_tiny_model(path, request.param)
    return path


@pytest.fixture
def decoder(tiny_r1):
    """The tiny Llama in fp32, a fresh one for every test: an engine moves its weights."""
    return load_decoder(tiny_r1, "fp32")


def changed(plan, **settings):
    """The plan with other settings of the engine."""
    return replace(plan, engine=replace(plan.engine, **settings))


def by_engine(decoder, section, folder, rows=ROWS, plan=None, **settings):
    """Train by the engine; returns the result and the adapter."""
    plan = plan or engine_plan(decoder, section, rows)
    return run_training(decoder, rows, section, folder, plan=plan, token_budget=plan.token_budget, **settings)


def assert_same_curve(mine, theirs, tolerance=1e-5):
    """Losses and gradient norms at every step, no drift in the mean, and the counts beside them."""
    differences = [a - b for a, b in zip(losses(mine), losses(theirs), strict=True)]
    assert max(map(abs, differences)) < tolerance, differences
    assert abs(sum(differences) / len(differences)) < tolerance / 2, differences
    for a, b in zip(mine.metrics, theirs.metrics, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert (a["tokens"], a["label_tokens"], a["rows"]) == (b["tokens"], b["label_tokens"], b["rows"])


class Interruption:
    """Raises torch.OutOfMemoryError in chosen calls of ``Engine.gradients``, after these have done their work."""

    def __init__(self, monkeypatch, armed=()):
        self.calls, self.armed, self.raised = 0, set(armed), 0
        plain = Engine.gradients

        def gradients(engine, rows, scale, layers=None):
            loss = plain(engine, rows, scale, layers)
            self.calls += 1
            if self.calls in self.armed:
                self.raised += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss

        monkeypatch.setattr(Engine, "gradients", gradients)

    def arm_next(self, *numbers):
        """Raise in the calls so-many from now."""
        self.armed = {self.calls + number for number in numbers}


def smaller_plans(decoder, rows=ROWS, sizes=(70, 60, 50)):
    """A replan whose micro-batches shrink each time it is asked, and the MiB it was asked to spare."""
    asked = []

    def replan(spare_mib):
        asked.append(spare_mib)
        section = short_section(micro_batch_tokens=sizes[len(asked) - 1])
        plan = engine_plan(decoder, section, rows)
        return changed(replace(plan, predicted_peak_mib=1000.0 - len(asked)), rungs=("layer",) * len(plan.engine.rungs))

    return replan, asked


@pytest.mark.parametrize("rungs", [None, ("host", "layer"), ("gate_up", "elementwise")])
def test_one_steps_loss_and_gradient(folder, rungs):
    """The mean loss, every gradient, its norm and what clipping leaves are autograd's, micro-batch by micro-batch."""
    decoder, adapter = loaded(folder)
    plain = AutogradGradients(decoder, adapter, SHORT, 100)
    expected = plain.compute(plain.prepare(ROWS[:8]), 3.0)
    norm = plain.clip(0.0)
    wanted = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    decoder, adapter = loaded(folder)
    plan = engine_plan(decoder, SHORT, ROWS[:8])
    gradients = EngineGradients(decoder, adapter, SHORT, changed(plan, rungs=rungs) if rungs else plan, None)
    step = gradients.prepare(ROWS[:8])
    assert len(step.batches) > 2
    assert float(gradients.compute(step, 3.0)) == pytest.approx(float(expected), rel=1e-6)
    found = {name: p.grad for name, p in adapter.named_parameters()}
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error < 1e-5, f"{name}: {error:.1e}"
    assert float(gradients.clip(0.0)) == pytest.approx(float(norm), rel=1e-6)
    gradients.unscale(0.5)
    assert float(gradients.clip(0.01)) == pytest.approx(float(norm) / 2, rel=1e-6)
    assert float(gradients.clip(0.0)) == pytest.approx(0.01, rel=1e-5)
    gradients.zero()
    assert not any(p.grad.any() for p in adapter.parameters())


def test_held_out_losses(folder):
    """Reasoning and answer of every held-out row, before and after an update that the matrices must follow."""
    decoder, adapter = loaded(folder)
    plan = engine_plan(decoder, SHORT, ROWS, held_out_longest=70)
    gradients = EngineGradients(decoder, adapter, SHORT, plan, None)
    for _ in range(2):
        other, twin = loaded(folder)
        twin.load_state(adapter.state(), "copy")
        expected = AutogradGradients(other, twin, SHORT, 100).held_out(HELD_OUT)
        for mine, row in zip(gradients.held_out(HELD_OUT), expected, strict=True):
            assert (mine.reasoning_tokens, mine.answer_tokens) == (row.reasoning_tokens, row.answer_tokens)
            assert mine.reasoning == pytest.approx(row.reasoning, rel=1e-5)
            assert mine.answer == pytest.approx(row.answer, rel=1e-5)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.5)
        gradients.after_update()


CURVES = {
    "as planned": ({}, {}),
    "three micro-batches": ({"micro_batch_tokens": 100}, {}),
    "two rows at once": ({"micro_batch_size": 2}, {}),
    "input on the host": ({"micro_batch_tokens": 100}, {"rungs": ("host", "host"), "chunk_tokens": 16}),
    "mixed rungs": ({"micro_batch_tokens": 60}, {"rungs": ("gate_up", "elementwise"), "chunk_tokens": 33}),
    "embedding and head on the host": ({}, {"embedding_on_host": True, "head_rows": 100}),
    "few logits": ({}, {"logit_tokens": 7}),
    "some projections": ({"target_modules": ("v_proj", "down_proj"), "rslora": True}, {}),
    "clipped": ({"max_grad_norm": 0.1, "micro_batch_tokens": 100}, {}),
    "decay, a short last batch": ({"global_batch_size": 7, "weight_decay": 0.1, "shuffle": False}, {}),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_autograds(decoder, tiny_r1, tmp_path, name):
    """Six steps with held-out losses in between: the same curve, and the same adapter in the end."""
    recipe, engine = CURVES[name]
    section = short_section(eval_steps=2, **recipe)
    plain, one = run_training(decoder, ROWS, section, tmp_path / "plain", held_out=HELD_OUT, token_budget=150)
    other = load_decoder(tiny_r1, "fp32")
    plan = changed(engine_plan(other, section, ROWS, held_out_longest=70), **engine)
    found, two = by_engine(other, section, tmp_path / "engine", plan=plan, held_out=HELD_OUT)
    assert_same_curve(found, plain)
    for a, b in zip(found.metrics, plain.metrics, strict=True):
        assert a.get("held_out_loss") == (pytest.approx(b["held_out_loss"], abs=1e-5) if "held_out_loss" in b else None)
    for a, b in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert found.plan is plan and plain.plan is None


def test_micro_batches_are_filled_with_nothing(decoder):
    """Every micro-batch has a size that comes often; the row that fills it has no label and adds no bit to a gradient.

    The count of tokens is that of real rows.
    """
    adapter = new_adapter(decoder, SHORT)
    gradients = EngineGradients(decoder, adapter, SHORT, engine_plan(decoder, SHORT, ROWS), None)
    step = gradients.prepare(ROWS[:8])
    lengths = [len(row.input_ids) for row in ROWS[:8]]
    assert step.tokens == sum(lengths)
    sizes = [sum(batch.row_lengths) for batch in step.batches]
    assert sizes == [padded(size) for size in sizes] and max(sizes) <= gradients.plan.engine.max_tokens
    assert sum(sizes) > step.tokens, "something was to be filled"
    assert sum(len(batch.labels) for batch in step.batches) == step.labels
    real = [n for batch in step.batches for n in batch.row_lengths]
    assert sorted(real)[-8:] == sorted(lengths)[-8:]

    row = ROWS[0]
    length = len(row.input_ids)
    (filled,) = gradients.prepare([row]).batches
    assert sum(filled.row_lengths) == padded(length) > length
    assert filled.predict.max() < length and torch.equal(filled.labels, pack([row]).labels)
    assert gradients.engine is not None
    found = []
    for batch in (filled, pack([row])):
        gradients.zero()
        loss = gradients.engine.gradients(gradients._rows(batch), 1.0)
        found.append((float(loss), gradients.flat.gradient.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    error = float((found[0][1] - found[1][1]).norm() / found[1][1].norm())
    assert error < 1e-6, f"{error:.1e}"


class Crash(Exception):
    """Stands for a killed process."""


def crash_after(step):
    """An on_step that raises once ``step`` is done."""

    def on_step(metrics, steps):
        if metrics["step"] == step:
            raise Crash

    return on_step


@pytest.mark.parametrize("first", ["engine", "autograd"])
@pytest.mark.parametrize("second", ["engine", "autograd"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_run_goes_on_either_way(tmp_path, first, second, family):
    """Killed after step 5 and resumed from the checkpoint of 3, on the same path or the other: one curve.

    Checkpoints hold the same tensors under the same names, whoever wrote them.
    """
    save_tiny_model(tmp_path / "base", family)
    section = short_section(max_steps=8, save_steps=3, micro_batch_tokens=100)

    def run(path, folder, **settings):
        base = load_decoder(tmp_path / "base", "fp32")
        if path == "engine":
            return by_engine(base, section, folder, **settings)
        return run_training(base, ROWS, section, folder, token_budget=100, **settings)

    straight, one = run("autograd", tmp_path / "straight")
    with pytest.raises(Crash):
        run(first, tmp_path / "broken", on_step=crash_after(5))
    checkpoint = latest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert checkpoint.name == "step-000003"
    resumed, two = run(second, tmp_path / "broken", resume=True)
    assert_same_curve(resumed, straight)
    assert resumed.progress.updates_applied == 8
    for a, b in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_engine_leaves_the_decoder_as_it_was(decoder, tiny_r1, tmp_path):
    """After training, and after a run that broke off, the same decoder trains again to the same curve.

    Its weights are the same bits in memory of their own again, without the border that the engine gave them.
    """
    first, adapter = by_engine(decoder, SHORT, tmp_path / "a")
    assert all(parameter.grad is None for parameter in adapter.parameters())
    for layer, untouched in zip(decoder.layers, load_decoder(tiny_r1, "fp32").layers, strict=True):
        for linear, other in zip(layer.linears, untouched.linears, strict=True):
            assert torch.equal(linear.weight, other.weight)
            assert linear.weight.untyped_storage().nbytes() == linear.weight.nbytes, linear.names
    with pytest.raises(Crash):
        by_engine(decoder, SHORT, tmp_path / "b", on_step=crash_after(2))
    again, _ = by_engine(decoder, SHORT, tmp_path / "c")
    assert losses(again) == losses(first)
    plain, _ = run_training(decoder, ROWS, SHORT, tmp_path / "d", token_budget=100)
    assert_same_curve(plain, first)


def test_dropout_trains_by_autograd(decoder):
    """A plan without an engine, and no plan at all, give autograd; dropout never has an engine."""
    section = short_section(lora_dropout=0.1)
    plan = engine_plan(decoder, section, ROWS)
    assert plan.engine is None
    for given in (plan, None):
        made = make_gradients(decoder, new_adapter(decoder, section), section, 100, given, None)
        assert isinstance(made, AutogradGradients)


def widen_products(monkeypatch):
    """Half-precision products whose result is fp32 exist on GPUs only: let the CPU convert first."""

    def accumulate(gradient, left, right, scale):
        gradient.addmm_(left.T.float(), right.float(), alpha=scale)

    monkeypatch.setattr("deepdoctor.engine.bordered.accumulate", accumulate)


def test_fp16_overflow_computes_the_step_again(tiny_r1, tmp_path, monkeypatch, caplog):
    """A loss scale far too high is halved until the gradient is finite: every update is applied, the curve is fp16's.

    The overflow is a real one: gradients of half precision times 2^30.
    """
    widen_products(monkeypatch)
    section = short_section(micro_batch_tokens=100)
    calm, _ = by_engine(load_decoder(tiny_r1, "fp16"), section, tmp_path / "calm")
    assert calm.progress.loss_scale == loop.FP16_FIRST_SCALE
    monkeypatch.setattr(loop, "FP16_FIRST_SCALE", 2.0**30)
    with caplog.at_level(logging.WARNING):
        found, _ = by_engine(load_decoder(tiny_r1, "fp16"), section, tmp_path / "high")
    assert found.progress.updates_applied == section.max_steps
    assert 1 < found.progress.loss_scale < 2.0**30
    assert "loss scale lowered" in caplog.text
    plain, _ = run_training(load_decoder(tiny_r1, "fp16"), ROWS, section, tmp_path / "plain", token_budget=100)
    for other in (calm, plain):
        apart = [abs(a - b) for a, b in zip(losses(found), losses(other), strict=True)]
        assert max(apart) < 5e-3, apart


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_out_of_memory_steps_down(decoder, tmp_path, monkeypatch, caplog, broken):
    """Memory runs out in a micro-batch of step 4: a leaner plan computes the whole step again, and nobody can tell.

    What the step had added before, and what the micro-batch that failed left, is forgotten.
    """
    straight, one = run_training(decoder, ROWS, SHORT, tmp_path / "straight", token_budget=100)
    interruption = Interruption(monkeypatch)
    replan, asked = smaller_plans(decoder)

    def on_step(metrics, steps):
        if metrics["step"] == 3:
            interruption.arm_next(broken)

    with caplog.at_level(logging.WARNING):
        found, two = by_engine(decoder, SHORT, tmp_path / "engine", replan=replan, on_step=on_step)
    assert interruption.raised == 1 and len(asked) == 1 and asked[0] > 0
    assert_same_curve(found, straight)
    for a, b in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert found.plan.engine.max_tokens < engine_plan(decoder, SHORT, ROWS).engine.max_tokens
    assert found.plan.engine.rungs == ("layer", "layer")
    before = engine_plan(decoder, SHORT, ROWS).predicted_peak_mib
    assert f"a plan for {before:.0f} MiB: stepping down to 999 MiB" in caplog.text


def test_out_of_memory_again_and_again(decoder, tmp_path, monkeypatch):
    """Each step down leaves more unused than the one before: in the probe, in one step twice, and later on."""
    straight, _ = run_training(decoder, ROWS, SHORT, tmp_path / "straight", token_budget=100)
    interruption = Interruption(monkeypatch, armed={1})
    replan, asked = smaller_plans(decoder)

    def on_step(metrics, steps):
        if metrics["step"] == 2:
            interruption.arm_next(2, 5)

    found, _ = by_engine(decoder, SHORT, tmp_path / "engine", replan=replan, on_step=on_step)
    assert interruption.raised == 3
    assert len(asked) == 3 and 0 < asked[0] < asked[1] < asked[2]
    assert_same_curve(found, straight)


def test_out_of_memory_while_the_engine_is_built(decoder, tmp_path, monkeypatch):
    """No memory for the arena itself: the engine starts leaner."""
    straight, _ = run_training(decoder, ROWS, SHORT, tmp_path / "straight", token_budget=100)
    plain, tried = Engine.__init__, []

    def init(engine, *arguments):
        plain(engine, *arguments)
        tried.append(engine)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "__init__", init)
    replan, asked = smaller_plans(decoder)
    found, _ = by_engine(decoder, SHORT, tmp_path / "engine", replan=replan)
    assert len(tried) == 3 and len(asked) == 2
    assert_same_curve(found, straight)


def test_out_of_memory_and_an_overflow_in_one_step(tiny_r1, tmp_path, monkeypatch):
    """Memory runs out while an overflowed fp16 step is computed, then the step overflows again: it still goes on."""
    widen_products(monkeypatch)
    monkeypatch.setattr(loop, "FP16_FIRST_SCALE", 2.0**30)
    decoder = load_decoder(tiny_r1, "fp16")
    interruption = Interruption(monkeypatch)
    interruption.arm_next(3)  # after the probe: the second micro-batch of the first step
    replan, _ = smaller_plans(decoder)
    found, _ = by_engine(decoder, SHORT, tmp_path, replan=replan)
    assert interruption.raised == 1
    assert found.progress.updates_applied == SHORT.max_steps


def test_out_of_memory_in_held_out_losses(decoder, tmp_path, monkeypatch):
    """Memory that runs out while held-out rows are measured is no end of the run either."""
    section = short_section(micro_batch_tokens=100, eval_steps=2)
    plain, tried = Engine.losses, []

    def losses_of(engine, rows):
        tried.append(rows)
        if len(tried) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(engine, rows)

    monkeypatch.setattr(Engine, "losses", losses_of)
    replan, asked = smaller_plans(decoder)
    plan = engine_plan(decoder, section, ROWS, held_out_longest=70)
    by_engine(decoder, section, tmp_path, plan=plan, replan=replan, held_out=HELD_OUT)
    assert len(asked) == 1


def test_out_of_memory_with_no_way_down(decoder, tmp_path, monkeypatch):
    """Without a replan, and where the leanest plan does not fit, the user is told what to do; checkpoints stay."""
    section = short_section(micro_batch_tokens=100, save_steps=1)

    def refuse(spare_mib):
        raise TrainingError("one row of 50 tokens needs 9 MiB", "set `--data.max_seq_len 40`")

    for replan, message in ((None, "out of memory"), (refuse, "one row of 50 tokens needs")):
        interruption = Interruption(monkeypatch)

        def on_step(metrics, steps, interruption=interruption):
            if metrics["step"] == 3:
                interruption.arm_next(2)

        folder = tmp_path / message.replace(" ", "-")
        with pytest.raises(TrainingError, match=message) as caught:
            by_engine(decoder, section, folder, replan=replan, on_step=on_step)
        assert caught.value.hint and ("--model.vram" in caught.value.hint or "max_seq_len" in caught.value.hint)
        assert latest_checkpoint(folder / "checkpoints").name == "step-000003"
        monkeypatch.undo()


def test_nothing_is_tried_for_ever(decoder, tmp_path, monkeypatch):
    """A GPU on which not even the leanest engine finds room: steps down end with the plan's own error."""
    tried = []

    def init(engine, *arguments):
        tried.append(engine)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "__init__", init)

    def replan(spare_mib):
        return engine_plan(decoder, SHORT, ROWS, room_mib=200.0, spare_mib=spare_mib)

    with pytest.raises(TrainingError, match=r"do not fit|needs .* MiB on the GPU"):
        by_engine(decoder, SHORT, tmp_path, plan=replan(0.0), replan=replan)
    assert 1 <= len(tried) < 100


def silent(row):
    """The row without a label."""
    return EncodedRow(row.input_ids, [IGNORE_INDEX] * len(row.labels), row.reasoning, row.answer)


def test_a_step_without_labels_names_its_rows(decoder, tmp_path):
    """Eight rows that teach nothing stop the run before an update, as on the other path."""
    rows = [*ROWS[:8], *map(silent, ROWS[8:16])]
    section = short_section(shuffle=False, max_steps=3, micro_batch_tokens=100)
    names = [f"row {number}" for number in range(16)]
    messages = []
    for plan in (engine_plan(decoder, section, rows), None):
        folder = tmp_path / ("engine" if plan else "autograd")
        with pytest.raises(TrainingError, match="the loss of step 2 is nan; its rows: row 8, row 9") as caught:
            run_training(decoder, rows, section, folder, plan=plan, row_names=names, token_budget=100)
        messages.append(caught.value.message)
    assert messages[0] == messages[1]


def test_a_micro_batch_without_labels_adds_nothing(tiny_r1, tmp_path):
    """A micro-batch of rows that teach nothing, beside others that do: no nan, and autograd's curve."""
    rows = [silent(row) if number % 2 else row for number, row in enumerate(ROWS)]
    section = short_section(micro_batch_size=1)
    plain, _ = run_training(load_decoder(tiny_r1, "fp32"), rows, section, tmp_path / "plain")
    found, _ = by_engine(load_decoder(tiny_r1, "fp32"), section, tmp_path / "engine", rows=rows)
    assert_same_curve(found, plain)


def test_nothing_is_waited_for(decoder):
    """The loss comes as a tensor on the device, in fp64, and equals autograd's mean over the step's labels."""
    adapter = new_adapter(decoder, SHORT)
    gradients = EngineGradients(decoder, adapter, SHORT, engine_plan(decoder, SHORT, ROWS), None)
    step = gradients.prepare(ROWS[:8])
    loss = gradients.compute(step, 1.0)
    assert isinstance(loss, torch.Tensor) and loss.dtype == torch.float64 and loss.device == decoder.device
    gradients.close()
    expected = sum(by_autograd(decoder, adapter, pack([row])).loss for row in ROWS[:8]) / step.labels
    assert float(loss) == pytest.approx(expected, rel=1e-6)
