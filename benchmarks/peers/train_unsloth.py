"""Unsloth on the benchmark's rows: ``python train_unsloth.py '{"base": ..., "rows": ..., ...}'``."""

from __future__ import annotations

import json
import sys
import time

started = time.perf_counter()
import unsloth  # noqa: F401  must come before trl and transformers, which it patches
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

import_s = time.perf_counter() - started
from peer_run import LORA, run, texts, training_arguments

settings = json.loads(sys.argv[1])
started = time.perf_counter()
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=settings["base"], max_seq_length=2048, dtype=None, load_in_4bit=settings["bits"] == 4
)
load_s = time.perf_counter() - started
model = FastLanguageModel.get_peft_model(
    model,
    **LORA,
    lora_dropout=0,
    use_gradient_checkpointing={"unsloth": "unsloth", "none": False}[settings["checkpointing"]],
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(texts(settings["rows"], tokenizer.eos_token)),
    args=SFTConfig(**training_arguments(settings), dataset_num_proc=2),
)
run(trainer, settings, import_s, load_s)
