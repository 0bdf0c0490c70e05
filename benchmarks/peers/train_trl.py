"""TRL + PEFT + bitsandbytes on the benchmark's rows: ``python train_trl.py '{"base": ..., "rows": ..., ...}'``."""

from __future__ import annotations

import json
import sys
import time

started = time.perf_counter()
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import_s = time.perf_counter() - started
from peer_run import LORA, run, texts, training_arguments

settings = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(settings["base"])
if tokenizer.pad_token is None:
    tokenizer.pad_token = "<|reserved_special_token_0|>"
started = time.perf_counter()
quantisation = None
if settings["bits"] == 4:
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
model = AutoModelForCausalLM.from_pretrained(
    settings["base"],
    dtype=torch.bfloat16,
    attn_implementation="sdpa",
    device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    quantization_config=quantisation,
)
load_s = time.perf_counter() - started
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(texts(settings["rows"], tokenizer.eos_token)),
    args=SFTConfig(**training_arguments(settings), gradient_checkpointing=settings["checkpointing"] != "none"),
    peft_config=LoraConfig(**LORA, lora_dropout=0.0, task_type="CAUSAL_LM"),
)
run(trainer, settings, import_s, load_s)
