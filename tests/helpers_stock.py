"""Stock training beside ours: transformers and PEFT in a plain loop, and how far two curves lie apart."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from deepdoctor.model.load import load_decoder
from deepdoctor.train.loop import train
from helpers_engine import engine_plan
from helpers_train import losses, new_adapter

ROOM_MIB = 16 * 1024


def engine_curve(folder, precision, rows, section, out, device="cuda"):
    """Losses of our own training by the engine, and its result."""
    decoder = load_decoder(folder, precision, device)
    adapter = new_adapter(decoder, section)
    plan = engine_plan(decoder, section, rows, ROOM_MIB)
    assert plan.engine is not None
    result = train(decoder, adapter, rows, section, seed=7, folder=out, token_budget=1, plan=plan)
    free(device)
    return losses(result), result


def free(device):
    """Let the next side have the whole GPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peft_model(folder, start, **settings):
    """Transformers' model with the adapter on it, ready to train."""
    pytest.importorskip("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **settings)
    return PeftModel.from_pretrained(base, start, is_trainable=True)


def padded_batch(rows, device):
    """input_ids, labels and attention mask (B, T), filled up on the right."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        count = len(row.input_ids)
        ids[number, :count], labels[number, :count] = torch.tensor(row.input_ids), torch.tensor(row.labels)
        mask[number, :count] = 1
    return ids.to(device), labels.to(device), mask.to(device)


def stock_curve(folder, start, rows, section, dtype, device="cuda"):
    """Losses of transformers + PEFT + AdamW in a plain loop, as the Trainer does it: autocast where dtype is 16-bit."""
    from transformers import get_scheduler

    model = peft_model(folder, start, dtype=dtype).to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters and all(p.dtype == torch.float32 for p in parameters), "PEFT keeps the adapter in fp32"
    betas = (section.beta1, section.beta2)
    optimizer = torch.optim.AdamW(parameters, section.learning_rate, betas, weight_decay=section.weight_decay)
    scheduler = get_scheduler(section.schedule, optimizer, section.warmup_steps, section.max_steps)
    curve = []
    for step in range(section.max_steps):
        first = step * section.global_batch_size % len(rows)
        ids, labels, mask = padded_batch(rows[first : first + section.global_batch_size], device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wanted = labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted, reduction="sum")
        loss = loss / (wanted != -100).sum()
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    del model, parameters, optimizer, loss
    free(device)
    return curve


@contextlib.contextmanager
def exact_products(roundings: int) -> Iterator[None]:
    """PEFT's LoRA layers multiply in fp32, and round base and adapter ``roundings`` times.

    2, as PEFT has it: the base's output is 16-bit already when the adapter's is added, so what is smaller than half a
    unit in its last place is lost, every time. 1: their sum is rounded.
    """
    from peft.tuners.lora.layer import Linear

    def forward(self, x, *args, **kwargs):
        name, dense, dtype = self.active_adapters[0], self.base_layer, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            a, b = (lora[name].weight.to(dtype).float() for lora in (self.lora_A, self.lora_B))
            y = functional.linear(x.float(), dense.weight.float(), None if dense.bias is None else dense.bias.float())
            u = functional.linear(x.float(), a).to(dtype)
            added = functional.linear(u.float(), b) * self.scaling[name]
            return (y + added).to(dtype) if roundings == 1 else y.to(dtype) + added.to(dtype)

    stock = Linear.forward
    Linear.forward = forward
    try:
        yield
    finally:
        Linear.forward = stock


def farthest(one, other):
    """The largest difference of a step's loss."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def shown(*curves):
    """Curves beside each other, for messages."""
    return "\n".join(" ".join(f"{loss:.4f}" for loss in curve) for curve in curves)
