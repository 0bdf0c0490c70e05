"""The engine on a GPU: equal to the CPU in fp32, as exact as autograd in 16 bits, in the memory that was planned.

Where a test also runs on a CPU, it does so with the backend "rows" and in fp32.
"""

import logging

import pytest
import torch

from deepdoctor.data.pack import pack
from deepdoctor.data.prompt import EncodedRow
from deepdoctor.engine.layout import RUNGS, LayerShape
from deepdoctor.engine.memory import plan_arena
from deepdoctor.kernels.fp8 import no_fp8_because
from deepdoctor.model.load import load_decoder
from deepdoctor.recipe import TrainSection
from deepdoctor.sizes import MIB
from deepdoctor.train.gradients import EngineGradients
from deepdoctor.train.loop import train
from helpers_engine import (
    BACKENDS,
    DEVICES,
    LORA,
    MID,
    Result,
    assert_as_exact,
    assert_same_bits,
    by_autograd,
    by_engine,
    by_float64,
    device_rows,
    distances,
    empty_gpu,
    engine_plan,
    loaded,
    mid_rows,
    new_engine,
    packed,
    plain_attention,
    random_decoder,
    rows_of,
    run_engine,
    sized_config,
    skip_unless,
    with_adapter,
    worst,
)
from helpers_models import save_tiny_model
from helpers_train import losses, new_adapter, run_training, short_section, synthetic_rows

# flash-attn-4's compiler warns of its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("llama", "qwen2", "qwen3")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
HALVES = {
    "bf16": ("bf16", torch.bfloat16),
    "fp16": ("fp16", torch.float16),
    "nf4": ("nf4", torch.bfloat16),
    "nf4-fp16": ("nf4", torch.float16),
}
"""How the base is held, and what it is computed in."""
CHUNK = 100
BATCH = packed()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each family, with heads of 64 that every attention kernel takes."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        save_tiny_model(made[family], family, **SIZES)
    return made


@pytest.fixture(scope="module")
def known(folders):
    """Results worked out once: ``known(function, family, precision, device, dtype)``."""
    found = {}

    def ask(function, family, *where):
        key = function.__name__, family, where
        if key not in found:
            found[key] = function(*loaded(folders[family], *where), BATCH)
        return found[key]

    return ask


def assert_near(mine, theirs, what, tolerance=1e-3):
    """Every gradient within ``tolerance`` of its tensor's norm, the loss within a tenth of that."""
    far = distances(mine.gradients, theirs.gradients)
    assert max(far.values()) < tolerance, f"{what}: {worst(far)}"
    assert mine.loss == pytest.approx(theirs.loss, rel=tolerance / 10), what


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_equals_the_cpu(known, folders, device, family, backend):
    """Loss and every gradient in fp32 are those of autograd on the CPU, on every rung, in chunks and whole."""
    skip_unless(backend, device, torch.float32, 64)
    expected = known(by_autograd, family, "fp32", "cpu")
    decoder, adapter = loaded(folders[family], "fp32", device)
    for rung in RUNGS:
        for chunk in (CHUNK, 10_000):
            mine = by_engine(decoder, adapter, BATCH, rung=rung, chunk_tokens=chunk, attention=backend)
            assert_near(mine, expected, f"{family}, {backend}, {rung}, chunks of {chunk}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_are_as_exact_as_autograd(known, folders, backend, half, family):
    """Gradients in 16 bits are at most twice as far from float64 as autograd's in the same dtype, on every rung."""
    precision, dtype = HALVES[half]
    skip_unless(backend, "cuda", dtype, 64)
    where = (precision, "cuda", dtype)
    truth, plain = known(by_float64, family, *where), known(by_autograd, family, *where)
    decoder, adapter = loaded(folders[family], *where)
    for rung in RUNGS:
        mine = by_engine(decoder, adapter, BATCH, rung=rung, chunk_tokens=CHUNK, attention=backend)
        assert_as_exact(mine, plain, truth, dtype, f"{family}, {half}, {backend}, {rung}")


def test_the_float64_oracle_is_autograds(known):
    """The truth of these tests is the decoder's own maths: autograd in fp32 is within rounding of it."""
    for family in FAMILIES:
        plain, truth = (known(function, family, "fp32", "cpu") for function in (by_autograd, by_float64))
        assert_near(plain, truth, family, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_every_rung_gives_the_same_bits(folders, device, precision):
    """With an attention that repeats its bits, what is computed again is what was kept: loss and gradients, bit by bit.

    Chunks of 48 leave a last one of 35 tokens.
    """
    if device == "cpu" and precision == "bf16":
        pytest.skip("the engine computes in fp32 on a CPU")
    where = (precision, device, torch.float32 if device == "cpu" else None)
    decoder, adapter = loaded(folders["qwen3"], *where)
    with plain_attention(device):
        kept = by_engine(decoder, adapter, BATCH, chunk_tokens=48)
        for rung in RUNGS[1:]:
            again = by_engine(decoder, adapter, BATCH, rung=rung, chunk_tokens=48)
            assert_same_bits(again, kept, f"{rung} against keep, {precision}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "rows"])
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_every_rung_gives_the_same_but_for_attention(folders, backend, half):
    """Fused backwards add up in any order; rungs differ by no more than three times what one rung differs from itself.

    Rows of up to 700 tokens, several blocks each, so that there is an order.
    """
    precision, dtype = HALVES[half]
    skip_unless(backend, "cuda", dtype, 64)
    batch = packed((700, 333, 512, 90))
    decoder, adapter = loaded(folders["llama"], precision, "cuda")
    found = {
        rung: [by_engine(decoder, adapter, batch, rung=rung, attention=backend) for _ in range(5)] for rung in RUNGS
    }
    kept = found["keep"][0]
    noise = max(distances(run.gradients, kept.gradients)["all"] for run in found["keep"][1:])
    apart = {rung: max(distances(run.gradients, kept.gradients)["all"] for run in found[rung]) for rung in RUNGS[1:]}
    print(f"{backend}, {half}: keep against itself {noise:.1e}, rungs against keep {worst(apart)}")
    assert max(apart.values()) <= 3 * noise + 1e-6, f"noise {noise:.1e}, rungs {worst(apart)}"


DEEP = {"hidden": 256, "layers": 8, "vocab": 640, "heads": 4, "key_heads": 2, "wide": 512}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hosted", [1, 2, 3, 4, 7, 8])
def test_inputs_come_back_from_the_host(device, hosted):
    """Eight layers, some or all with their input in host memory: the bits of inputs that stayed, five times over.

    Four micro-batches of different sizes follow each other without a wait, so that the next one's copies meet the ring,
    the host buffers and the streams of the one before.
    """
    small = device == "cpu"
    dtype = torch.float32 if small else torch.bfloat16
    sizes = [(40, 30), (17,), (64, 6), (33,)] if small else [(512,) * 8, (300, 200), (512,) * 7, (1, 700)]
    batches = [packed(lengths, seed) for seed, lengths in enumerate(sizes)]
    decoder = random_decoder(sized_config(**DEEP), device, dtype, "fp32" if small else "bf16")
    adapter = with_adapter(decoder)
    most = max(sum(batch.row_lengths) for batch in batches)

    def several(engine):
        for parameter in adapter.parameters():
            parameter.grad.zero_()
        lost = [engine.gradients(device_rows(batch, decoder.device), 1.0) for batch in batches]
        gradients = {name: p.grad.cpu().double() for name, p in adapter.named_parameters()}
        return Result(float(sum(lost)), gradients)

    with plain_attention(device):
        engine = new_engine(decoder, adapter, most, rung="layer", chunk_tokens=1000)
        stayed = several(engine)
        assert_same_bits(several(engine), stayed, "layer, a second time")
        engine.close()
        rungs = ("host",) * hosted + ("layer",) * (8 - hosted)
        engine = new_engine(decoder, adapter, most, rung=rungs, chunk_tokens=1000)
        for number in range(5):
            assert_same_bits(several(engine), stayed, f"{hosted} layers on the host, pass {number + 1}")
        assert engine.arena.high_water == engine.arena.memory.numel()
        engine.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keep", [True, False])
def test_the_arena_is_used_as_planned(folders, device, keep):
    """To the last byte, on every ladder; a second micro-batch and a forward alone need no more."""
    where = ("nf4", device, torch.float32 if device == "cpu" else torch.bfloat16)
    decoder, adapter = loaded(folders["qwen3"], *where)
    tokens = sum(BATCH.row_lengths)
    shape = LayerShape.of(decoder.config, LORA.rank, LORA.targets)
    for rungs in [(rung, rung) for rung in RUNGS] + [("host", "keep"), ("layer", "gate_up"), ("gate_up", "layer")]:
        for chunk in (CHUNK, tokens):
            engine = new_engine(decoder, adapter, tokens, rung=rungs, chunk_tokens=chunk, keep_matrices=keep)
            run_engine(engine, adapter, BATCH)
            planned = plan_arena(shape, rungs, tokens, chunk, where[2].itemsize, keep).nbytes
            used, there = engine.arena.high_water, engine.arena.memory.numel()
            assert used == there == planned, f"{rungs}, chunks of {chunk}: {used:,} of {there:,}, planned {planned:,}"
            run_engine(engine, adapter, BATCH)
            engine.losses(device_rows(BATCH, decoder.device))
            assert engine.arena.high_water == planned
            engine.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", ["fp32", "bf16", "fp16"])
def test_embedding_and_head_in_host_memory(known, folders, device, half):
    """An embedding on the host changes no bit. A head that comes in pieces is as exact as autograd with the whole one.

    Pieces of 100 of 640 tokens: the last one is smaller. Losses alone are the same on both.
    """
    if device == "cpu" and half != "fp32":
        pytest.skip("the engine computes in fp32 on a CPU")
    where = (half, device, None)
    with plain_attention(device):
        here = by_engine(*loaded(folders["llama"], *where), BATCH)
        decoder, adapter = loaded(folders["llama"], *where)
        decoder.place_embedding(True)
        assert decoder.embedding.device.type == "cpu"
        assert_same_bits(by_engine(decoder, adapter, BATCH), here, "embedding on the host")
        decoder.place_head(True)
        engine = new_engine(decoder, adapter, sum(BATCH.row_lengths), head_rows=100)
        mine = run_engine(engine, adapter, BATCH)
        alone = float(engine.losses(device_rows(BATCH, decoder.device)).sum())
        assert alone == pytest.approx(mine.loss, rel=1e-5)
        again = run_engine(engine, adapter, BATCH)
        assert_same_bits(again, mine, "head on the host, a second time")
        engine.close()
    decoder.place_head(False)
    decoder.place_embedding(False)
    assert decoder.head.device == decoder.embedding.device == decoder.device
    if half == "fp32":
        assert_near(mine, here, "head on the host", 1e-4)
    else:
        plain, truth = (known(function, "llama", *where) for function in (by_autograd, by_float64))
        assert_as_exact(mine, plain, truth, decoder.compute_dtype, "head on the host")


@pytest.mark.parametrize("device", DEVICES)
def test_matrices_made_anew_are_those_that_are_kept(folders, device):
    """NF4 dequantised at each use, kept, and kept through an update: the same bits."""
    where = ("nf4", device, torch.float32 if device == "cpu" else torch.bfloat16)
    for rung in ("keep", "layer"):
        results = []
        with plain_attention(device):
            for keep in (True, False):
                decoder, adapter = loaded(folders["qwen2"], *where)
                engine = new_engine(decoder, adapter, sum(BATCH.row_lengths), rung=rung, keep_matrices=keep)
                run_engine(engine, adapter, BATCH)
                with torch.no_grad():
                    for parameter in adapter.parameters():
                        parameter.mul_(1.5)
                engine.refresh()
                results.append(run_engine(engine, adapter, BATCH))
                engine.close()
        assert_same_bits(results[1], results[0], f"made anew against kept, {rung}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_alone_equal_the_cpu(known, folders, backend):
    """Held-out losses of every label are the CPU's; labels one by one, not only their sum."""
    dtype = torch.float32 if backend in ("rows", "efficient") else torch.bfloat16
    skip_unless(backend, "cuda", dtype, 64)
    found = []
    for where, chosen in ((("fp32", "cpu"), "rows"), (("fp32" if dtype.itemsize == 4 else "bf16", "cuda"), backend)):
        engine = new_engine(*loaded(folders["qwen3"], *where), sum(BATCH.row_lengths), attention=chosen)
        found.append(engine.losses(device_rows(BATCH, engine.decoder.device)).cpu().double())
        engine.close()
    apart = float((found[0] - found[1]).abs().max())
    assert apart < (1e-4 if dtype == torch.float32 else 0.3), f"largest difference of a label's loss {apart:.1e}"
    assert float((found[0] - found[1]).mean().abs()) < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_without_labels(folders, device):
    """Rows that teach nothing have loss 0 and add nothing, whatever the head's place."""
    decoder, adapter = loaded(folders["llama"], "fp32", device)
    engine = new_engine(decoder, adapter, 64)
    (row,) = rows_of((48,))
    silent = pack([EncodedRow(row.input_ids, [-100] * 48, row.reasoning, row.answer)])
    found = run_engine(engine, adapter, silent)
    assert found.loss == 0.0
    assert not any(gradient.any() for gradient in found.gradients.values())
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_is_autograds(folders, tmp_path, precision):
    """Eight steps by the engine stay within twice the distance that autograd's keep from autograd in fp32, plus 2e-4.

    Held-out losses as well. A run resumed at step 4 goes on as the one without a break; fp16 applies every update.
    """
    rows = synthetic_rows(24, longest=200)
    section = short_section(max_steps=8, eval_steps=3, save_steps=4, micro_batch_tokens=500)

    def run(name, held, by_plan, **settings):
        decoder = load_decoder(folders["llama"], held, "cuda")
        plan = engine_plan(decoder, section, rows) if by_plan else None
        options = {"plan": plan, "held_out": rows[:4], "token_budget": 500, **settings}
        return run_training(decoder, rows, section, tmp_path / name, **options)[0]

    def apart(one, other):
        pairs = list(zip(losses(one), losses(other), strict=True))
        pairs += [(one.metrics[step]["held_out_loss"], other.metrics[step]["held_out_loss"]) for step in (2, 5)]
        return max(abs(a - b) for a, b in pairs)

    mine, plain = run("engine", precision, True), run("autograd", precision, False)
    exact = run("exact", "fp32", False)
    far, allowed = apart(mine, exact), 2 * apart(plain, exact) + 2e-4
    print(f"{precision}: from fp32 {far:.1e}, allowed {allowed:.1e}; from autograd {apart(mine, plain):.1e}")
    assert far < allowed, (losses(mine), losses(plain), losses(exact))
    assert mine.progress.updates_applied == 8 and losses(mine)[-1] < losses(mine)[0]
    (tmp_path / "engine" / "checkpoints" / "step-000008").rename(tmp_path / "gone")
    resumed = run("engine", precision, True, resume=True)
    assert resumed.metrics[:4] == mine.metrics[:4]
    assert apart(resumed, mine) < allowed, (losses(resumed), losses(mine))


ROOMS = {
    "least": (600, {}),
    "inputs only": (700, {}),
    "mixed": (900, {}),
    "matrices kept": (2000, {}),
    "matrices anew": (3000, {}),
    "one micro-batch": (6000, {}),
    "8-bit optimizer": (2500, {"optimizer": "adamw_8bit"}),
    "large vocabulary": (760, {"vocab": 131_072}),
    "bf16": (3500, {"precision": "bf16"}),
    "fp8": (4500, {"precision": "fp8"}),
    "flash-attn-4": (1500, {"attention": "fa4"}),
    "memory-efficient": (1300, {"attention": "efficient"}),
}
"""MiB that the engine may take, and what else is special."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROOMS)
def test_the_peak_is_as_planned(tmp_path, name):
    """Most bytes allocated in three steps are those of the plan, to 5 % and 64 MiB; afterwards they are given back."""
    room, special = ROOMS[name]
    chosen = {"optimizer": "adamw", "precision": "nf4", "attention": "flash", "vocab": MID["vocab"], **special}
    if chosen["precision"] == "fp8" and (reason := no_fp8_because(torch.device("cuda"))):
        pytest.skip(reason)
    skip_unless(chosen["attention"], "cuda", torch.bfloat16, 128)
    before = empty_gpu()
    rows = mid_rows()
    section = TrainSection(max_steps=3, shuffle=False, save_steps=0, optimizer=chosen["optimizer"])
    config = sized_config(**{**MID, "vocab": chosen["vocab"]})
    decoder = random_decoder(config, "cuda", torch.bfloat16, chosen["precision"])
    plan = engine_plan(decoder, section, rows, room, attention=chosen["attention"])
    adapter = new_adapter(decoder, section)
    peaks = []  # before the end, which brings the head back from the host
    options = {"plan": plan, "on_step": lambda metrics, steps: peaks.append(torch.cuda.max_memory_allocated())}
    result = train(decoder, adapter, rows, section, seed=7, folder=tmp_path, token_budget=1, **options)
    peak, planned = (peaks[-1] - before) / MIB, plan.predicted_peak_mib
    parts = {part: round(nbytes / MIB) for part, nbytes in plan.engine.parts.items()}
    told = (
        f"{name}: measured {peak:,.0f} MiB, planned {planned:,.0f} MiB ({peak / planned:.1%}) in a room of {room:,}; "
        f"{plan.engine.counts()}, {plan.engine.max_tokens} tokens, {parts}"
    )
    print(told)
    assert result.plan is plan, f"stepped down: {told}"
    assert abs(peak - planned) <= 0.05 * planned + 64, told
    kept = decoder.nbytes + sum(parameter.nbytes for parameter in adapter.parameters())
    left = empty_gpu() - before
    assert left <= kept + 16 * MIB, f"{left / MIB:,.0f} MiB held after training, of which {kept / MIB:,.0f} are known"


class Squeezed:
    """A run on a card that turns out smaller than planned; in fp32, so that curves can be compared closely."""

    room = 2330.0

    def __init__(self):
        empty_gpu()
        self.rows = mid_rows(16)
        self.section = TrainSection(max_steps=6, shuffle=False, save_steps=0, learning_rate=1e-3)
        self.decoder = random_decoder(sized_config(**{**MID, "layers": 4}), "cuda", torch.float32, "nf4")

    def plan(self, spare_mib=0.0):
        """The plan, with that much left unused."""
        return engine_plan(self.decoder, self.section, self.rows, self.room, spare_mib=spare_mib)

    def limit_to_now(self, more_mib=4.0):
        """Let PyTorch hold no more than it does now, and a little."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more_mib * MIB) / total)

    def train(self, folder, on_step=None):
        """Losses, and the result."""
        plan = self.plan()
        adapter = new_adapter(self.decoder, self.section)
        options = {"seed": 7, "token_budget": 1, "plan": plan, "replan": self.plan, "on_step": on_step}
        result = train(self.decoder, adapter, self.rows, self.section, folder=folder, **options)
        return torch.tensor(losses(result)), result


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["from the start", "in the probe", "in mid-run"])
def test_a_card_smaller_than_planned(tmp_path, caplog, monkeypatch, when):
    """The run steps down by itself, says from what to what, and ends with the curve it would have had.

    From the start: not even the arena fits. In the probe: the arena does, what comes on top does not. In mid-run:
    after two steps others have taken what was free.
    """
    run = Squeezed()
    expected, whole = run.train(tmp_path / "whole")
    plan = run.plan()
    assert whole.plan.engine.settings == plan.engine.settings, "the plan itself must fit"
    less = run.plan(0.07 * plan.available_mib).engine
    assert less.settings != plan.engine.settings, "stepping down is to change the settings"
    probe = EngineGradients.probe

    def late(gradients, steps):
        run.limit_to_now()
        return probe(gradients, steps)

    def squeeze(metrics, steps):
        if when == "in mid-run" and metrics["step"] == 2:
            run.limit_to_now()

    empty_gpu()
    if when == "in the probe":
        monkeypatch.setattr(EngineGradients, "probe", late)
    try:
        if when == "from the start":
            run.limit_to_now(0.73 * (plan.engine.peak_bytes - run.decoder.device_nbytes) / MIB)
        with caplog.at_level(logging.WARNING):
            found, result = run.train(tmp_path / "squeezed", squeeze)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        empty_gpu()
    told = " became ".join(f"{e.counts()} of {e.max_tokens} tokens" for e in (plan.engine, result.plan.engine))
    print(f"{when}: {told}; {caplog.text}")
    assert 0.6 * plan.predicted_peak_mib < result.plan.predicted_peak_mib < plan.predicted_peak_mib, told
    assert f"with a plan for {plan.predicted_peak_mib:.0f} MiB: stepping down to" in caplog.text
    assert f"stepping down to {result.plan.predicted_peak_mib:.0f} MiB" in caplog.text
    apart = (found - expected).abs().max()
    assert apart < 1e-3, f"{told}: curves differ by {apart:.1e}, {found.tolist()} and {expected.tolist()}"


@pytest.mark.gpu
def test_stepping_down_frees_the_old_engine():
    """The old engine's memory comes back before the new one takes its own."""
    run = Squeezed()
    adapter = new_adapter(run.decoder, run.section).to("cuda")
    gradients = EngineGradients(run.decoder, adapter, run.section, run.plan(), run.plan)
    before = torch.cuda.memory_allocated()
    taken = gradients.plan.engine.parts["arena"] + gradients.plan.engine.parts["matrices"]
    gradients._step_down()
    freed = before - torch.cuda.memory_allocated()
    assert freed >= 0.98 * taken, f"{freed / MIB:,.0f} MiB came back of {taken / MIB:,.0f}"
    gradients._build()
    again = gradients.plan.engine.parts["arena"] + gradients.plan.engine.parts["matrices"]
    held = torch.cuda.memory_allocated() - (before - freed)
    assert held <= again + 8 * MIB, f"{held / MIB:,.0f} MiB taken, {again / MIB:,.0f} planned"
    gradients.close()
