"""Real weights and real rows on a GPU: the engine's curve beside TRL's, and within what stock 16-bit training keeps.

The stock loop is checked on a CPU too, on a tiny model, where all three ways of training give one curve. Why stock
training in 16 bits lies apart from all of them: docs/decisions/0009-adapters-round-once.md.
"""

import logging
import math

import pytest
import torch

from deepdoctor.data.prompt import Prompt
from deepdoctor.data.sources import load_rows
from deepdoctor.model.load import load_decoder, load_tokenizer
from deepdoctor.recipe import DataSection, TrainSection
from deepdoctor.train.loop import train
from helpers_stock import engine_curve, exact_products, farthest, free, peft_model, shown, stock_curve
from helpers_train import losses, new_adapter, short_section, synthetic_rows

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH = 8
ROWS = 120
"""Rows below 1,024 tokens: fifteen steps see each once, thirty-two steps a second time and a little more."""
SECTION = TrainSection(
    lora_rank=16,
    lora_alpha=16,
    global_batch_size=BATCH,
    max_steps=32,
    learning_rate=2e-4,
    schedule="linear",
    warmup_steps=5,
    weight_decay=0.01,
    shuffle=False,
    save_steps=0,
)
"""The tutorial's settings."""


@pytest.fixture(scope="module")
def rows(shared_data, smollm2):
    """The first real rows that are short enough, in the tutorial's words, every token of them trained."""
    source = shared_data / "medical-o1-sft-sample.jsonl"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    prompt = Prompt(load_tokenizer(smollm2), "tutorial", train_on="all")
    encoded = [prompt.encode_row(row) for row in load_rows(DataSection(source=str(source)))]
    short = [row for row in encoded if len(row.input_ids) < 1024][:ROWS]
    assert len(short) == ROWS, f"{len(short)} of {len(encoded)} rows are below 1,024 tokens"
    return short


@pytest.fixture(scope="module")
def start(smollm2, tmp_path_factory):
    """The adapter that every side starts from, as PEFT files."""
    folder = tmp_path_factory.mktemp("start")
    new_adapter(load_decoder(smollm2, "bf16"), SECTION).save(folder, str(smollm2))
    return folder


def trl_curve(folder, start, rows, section, out, dtype):
    """Losses of TRL's SFTTrainer on a bitsandbytes NF4 base, the adapter put back to fp32 and to its start.

    TRL rounds a quantised model's adapter to bf16, as QLoRA's authors did; we keep fp32 masters, and so does PEFT when
    it is left alone. dtype: of the arithmetic; the weights are read as bf16 in any case.
    """
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, BitsAndBytesConfig

    class InOrder(trl.SFTTrainer):
        """SFTTrainer that keeps the data set's order."""

        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    cuda = torch.cuda.is_available()
    place = {"": 0 if cuda else "cpu"}
    model = peft_model(folder, start, dtype=torch.bfloat16, quantization_config=quantised, device_map=place)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    settings = trl.SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=section.global_batch_size,
        gradient_accumulation_steps=1,
        max_steps=section.max_steps,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim="adamw_8bit",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=dtype == torch.bfloat16,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        seed=0,
    )
    data = datasets.Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = InOrder(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    tensors = load_file(start / "adapter_model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = tensors[name.replace(".default", "")].to(parameter.device)
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
    del trainer, model
    free("cuda" if cuda else "cpu")
    return curve


def test_the_stock_loop_is_a_fair_yardstick(tiny_r1, tmp_path):
    """On a CPU in fp32 the stock loop, the engine and autograd give one curve, in the second epoch too."""
    rows = synthetic_rows(16, seed=3)
    section = short_section(max_steps=6, schedule="linear", shuffle=False, weight_decay=0.01)
    decoder = load_decoder(tiny_r1, "fp32")
    adapter = new_adapter(decoder, section)
    adapter.save(tmp_path / "start", str(tiny_r1))
    stock = stock_curve(tiny_r1, tmp_path / "start", rows, section, torch.float32, "cpu")
    plain = losses(train(decoder, adapter, rows, section, seed=7, folder=tmp_path / "plain", token_budget=100))
    mine, result = engine_curve(tiny_r1, "fp32", rows, section, tmp_path / "engine", "cpu")
    assert result.plan is not None
    assert max(farthest(mine, stock), farthest(plain, stock)) < 1e-5, shown(mine, plain, stock)


@pytest.mark.gpu
def test_nf4_gives_the_curve_of_trl_peft_and_bitsandbytes(smollm2, start, rows, tmp_path):
    """Fifteen steps of eight rows in NF4 with 8-bit AdamW: bf16 here is within 0.005 of stock in fp32 at every step.

    Stock in bf16 is not: it loses small adapters to rounding, so its own distance from fp32 is printed beside ours.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    section = SECTION.model_copy(update={"max_steps": 15, "optimizer": "adamw_8bit"})
    exact, usual = (
        trl_curve(smollm2, start, rows, section, tmp_path / str(dtype), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    mine, result = engine_curve(smollm2, "nf4", rows, section, tmp_path / "ours")
    assert result.optimizer == "adamw_8bit"
    assert len(exact) == len(usual) == len(mine) == 15
    apart = farthest(mine, exact)
    print(f"from TRL in fp32: ours {apart:.5f}, TRL in bf16 {farthest(usual, exact):.5f}; ours, TRL bf16, TRL fp32:")
    print(shown(mine, usual, exact))
    assert sum(mine[-4:]) < sum(mine[:4]), "nothing was learnt, so nothing was compared"
    assert apart < 0.005, f"{apart:.5f}\n{shown(mine, exact)}"
    assert apart < farthest(usual, exact)


@pytest.fixture(scope="module")
def stock(smollm2, start, rows):
    """Stock curves in fp32 and bf16."""
    return {dtype: stock_curve(smollm2, start, rows, SECTION, dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_keep_to_fp32(smollm2, rows, stock, tmp_path, precision):
    """Thirty-two steps: no farther from stock fp32 than twice what stock bf16 is, plus 0.001; every update applied.

    fp16 rounds finer than bf16, and so is held to the same; a loss scale that is too high costs no update.
    """
    exact, usual = stock[torch.float32], stock[torch.bfloat16]
    mine, result = engine_curve(smollm2, precision, rows, SECTION, tmp_path)
    far, allowed = farthest(mine, exact), 2 * farthest(usual, exact) + 1e-3
    scale = result.progress.loss_scale
    print(f"{precision}: {far:.5f} from fp32, allowed {allowed:.5f}, loss scale {scale:g}\n{shown(mine, usual, exact)}")
    assert result.progress.updates_applied == result.steps == 32
    assert all(math.isfinite(loss) for loss in mine)
    assert sum(mine[15:30]) < sum(mine[:15]), "the second time the rows must be easier"
    assert far < allowed, f"{far:.5f}, allowed {allowed:.5f}\n{shown(mine, usual, exact)}"
    drift = sum(a - b for a, b in zip(mine, exact, strict=True)) / len(mine)
    assert abs(drift) < allowed / 2, f"mean difference {drift:.5f}"


@pytest.mark.gpu
def test_stock_bf16_loses_to_the_second_rounding(smollm2, start, rows, stock):
    """Rounding base and adapter together, instead of the base first, takes away most of stock bf16's distance."""
    exact, usual = stock[torch.float32], stock[torch.bfloat16]
    curves = []
    for roundings in (1, 2):
        with exact_products(roundings):
            curves.append(stock_curve(smollm2, start, rows, SECTION, torch.bfloat16))
    once, twice = (farthest(curve, exact) for curve in curves)
    print(
        f"from fp32: stock bf16 {farthest(usual, exact):.5f}; exact products rounded once {once:.5f}, twice {twice:.5f}"
    )
    print(shown(usual, *curves, exact))
    assert once < twice / 4
