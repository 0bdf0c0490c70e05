"""transformers + PEFT + bitsandbytes answering: ``python generate_transformers.py '[{"base": ..., ...}, ...]'``."""

from __future__ import annotations

import json
import sys
import time

started = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

jobs = json.loads(sys.argv[1])
settings = jobs[0]  # what is read here is the same in all
if settings["adapter"]:
    from peft import PeftModel

import_s = time.perf_counter() - started
from generate_run import DEVICE, DTYPES, lora_parameters, run

started = time.perf_counter()
dtype = DTYPES[settings["precision"]]
quantisation = None
if settings["precision"] == "nf4":
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
model = AutoModelForCausalLM.from_pretrained(
    settings["base"],
    dtype=dtype,
    attn_implementation="sdpa",
    device_map={"": 0 if DEVICE == "cuda" else "cpu"},
    quantization_config=quantisation,
)
if settings["adapter"]:
    model = PeftModel.from_pretrained(model, settings["adapter"])
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(dtype)  # PEFT's own choice is fp32, which is slower
model.eval()
if DEVICE == "cuda":
    torch.cuda.synchronize()
run(model, jobs, import_s, time.perf_counter() - started)
