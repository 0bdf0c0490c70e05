"""Thirty steps equal TRL's SFTTrainer with a PEFT adapter on the same rows: the stock way to train such a model."""

import importlib.util
import logging

import pytest
import torch

from deepdoctor.model.load import load_decoder
from deepdoctor.train.loop import train
from helpers_train import new_adapter, short_section, synthetic_rows

STEPS = 30
BATCH, ACCUMULATION = 2, 2
ROWS = synthetic_rows(44, seed=11, shortest=12, longest=64)
"""Eleven steps an epoch: 30 steps see every row two or three times."""


def stock_curve(folder, adapter_folder, rows, section, out):
    """Train with TRL and PEFT from the same adapter, rows in their order; returns losses, norms and LoRA tensors."""
    pytest.importorskip("peft")
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class InOrder(trl.SFTTrainer):
        """SFTTrainer that keeps the data set's order."""

        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_folder, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = datasets.Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    settings = trl.SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        seed=0,
    )
    trainer = InOrder(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    weights = {
        name.replace(".default", ""): p.detach() for name, p in trainer.model.named_parameters() if "lora_" in name
    }
    return [entry["loss"] for entry in history], [entry["grad_norm"] for entry in history], weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is not None,
    reason="TRL hands CPU tensors to its Triton kernel where Triton is installed",
)
def test_thirty_steps_equal_trl_and_peft(tiny_r1, tmp_path):
    """Losses within 1e-5 at every step, gradient norms and final weights beside them, in fp32.

    Both normalise the loss over the label tokens of the whole step, clip at 1.0, warm up and decay linearly; TRL pads
    batches of two and accumulates two, we pack the same four rows.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    section = short_section(
        lora_rank=8,
        lora_alpha=64,
        global_batch_size=BATCH * ACCUMULATION,
        max_steps=STEPS,
        learning_rate=5e-3,
        schedule="linear",
        warmup_steps=5,
        weight_decay=0.01,
        max_grad_norm=1.0,
        shuffle=False,
    )
    decoder = load_decoder(tiny_r1, "fp32")
    adapter = new_adapter(decoder, section)
    adapter.save(tmp_path / "start", str(tiny_r1))
    losses, norms, weights = stock_curve(tiny_r1, tmp_path / "start", ROWS, section, tmp_path / "trl")
    ours = train(decoder, adapter, ROWS, section, seed=0, folder=tmp_path / "ours", token_budget=100)
    mine = [line["loss"] for line in ours.metrics]
    assert len(losses) == len(mine) == STEPS
    assert mine[-1] < mine[0] - 0.05, "nothing was learnt, so nothing was compared"
    differences = [a - b for a, b in zip(mine, losses, strict=True)]
    assert max(map(abs, differences)) < 1e-5, differences
    assert abs(sum(differences)) / STEPS < 2e-6
    assert [line["grad_norm"] for line in ours.metrics] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 1.0, "clipping must have acted"
    state = adapter.state()
    assert state.keys() == weights.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-2, atol=1e-4)
