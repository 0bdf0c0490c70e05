"""Unsloth answering, in its inference mode: ``python generate_unsloth.py '[{"base": ..., ...}, ...]'``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

started = time.perf_counter()
import unsloth  # noqa: F401  must come before transformers, which it patches
from unsloth import FastLanguageModel

import_s = time.perf_counter() - started
import torch
from generate_run import DTYPES, lora_parameters, run
from peer_run import LORA
from safetensors.torch import load_file

jobs = json.loads(sys.argv[1])
settings = jobs[0]  # what is read here is the same in all
started = time.perf_counter()
model, _ = FastLanguageModel.from_pretrained(
    model_name=settings["base"],
    max_seq_length=max(job["positions"] for job in jobs),
    dtype=DTYPES[settings["precision"]],
    load_in_4bit=settings["precision"] == "nf4",
)
if settings["adapter"]:
    model = FastLanguageModel.get_peft_model(
        model,
        **LORA,
        lora_dropout=0,
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    values = load_file(Path(settings["adapter"]) / "adapter_model.safetensors")
    parameters = lora_parameters(model)
    assert values.keys() == parameters.keys(), sorted(values.keys() ^ parameters.keys())[:4]
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])
FastLanguageModel.for_inference(model)
torch.cuda.synchronize()
run(model, jobs, import_s, time.perf_counter() - started)
