"""What both peers share when they answer: prompts padded on the left, the clock and the result line.

A script's argument is a JSON list of jobs, answered in turn by one process. A job: prompts (JSON file, token ids of
each prompt), streams, new_tokens, positions (longest prompt and answer), cache ("dynamic" or "static", the latter
compiled by transformers); and, the same in all, base, adapter (PEFT folder or null), precision ("nf4", "bf16" or
"fp32").
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from job_loop import do_jobs
from transformers import StoppingCriteria, StoppingCriteriaList

__all__ = ["DEVICE", "DTYPES", "lora_parameters", "run"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"nf4": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Activations by precision of the base."""
WARM_UP_TOKENS = 16
STARTED = float(os.environ.get("BENCH_STARTED", time.time()))
"""When the benchmark started this process, seconds since the epoch."""


class _Clock(StoppingCriteria):
    """Never stops; notes when each token came. The first is waited for, later ones by generate itself."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **rest: Any) -> Any:
        if not self.stamps:
            _synchronize()
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def lora_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Adapter matrices under the names of adapter_model.safetensors."""
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if ".lora_" in name}


def _weight_bytes(model: torch.nn.Module) -> int:
    """Bytes a decode step reads: weights as held, an embedding that is not the head left out."""
    held = {p.data_ptr(): p for p in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight.data_ptr() != embedding.data_ptr():
        held.pop(embedding.data_ptr(), None)
    total = 0
    for parameter in held.values():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            total += part.absmax.nbytes if part is not None else 0
    return total


def _kv_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize


def run(model: Any, jobs: list[dict[str, Any]], import_s: float, load_s: float) -> None:
    """Do the jobs; see ``do_jobs``."""
    do_jobs(jobs, lambda job: _answer(model, job), import_s, load_s)


def _answer(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Answer the first ``streams`` prompts at once, greedy, ``new_tokens`` tokens each, and return figures."""
    prompts = json.loads(Path(settings["prompts"]).read_text(encoding="utf-8"))[: settings["streams"]]
    longest = max(map(len, prompts))
    pad = model.config.eos_token_id
    pad = pad[0] if isinstance(pad, list) else pad or 0
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    static = settings.get("cache") == "static"

    def answer(new_tokens: int) -> tuple[_Clock, float, float, torch.Tensor]:
        clock = _Clock()
        _synchronize()
        started = time.perf_counter()
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([clock]),
            **({"cache_implementation": "static"} if static else {}),
        )
        _synchronize()
        return clock, started, time.perf_counter(), out

    new_tokens = settings["new_tokens"]
    # What is compiled for a static cache depends on its length, so the warm-up has the same one.
    clock, *_ = answer(new_tokens if static else min(WARM_UP_TOKENS, new_tokens))
    to_first_token_s = time.time() - STARTED - (time.perf_counter() - clock.stamps[0])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    clock, started, ended, out = answer(new_tokens)
    written = out[:, longest:]
    assert written.shape == (len(prompts), new_tokens), written.shape
    first = clock.stamps[0] - started
    return {
        "prompt_tokens": sum(map(len, prompts)),
        "tokens": written.numel(),
        "first_token_s": first,
        "prefill_s": first,
        "early_tokens": len(prompts),
        "total_s": ended - started,
        "stamps_s": [stamp - started for stamp in clock.stamps],
        "ids": written[0, :32].tolist(),
        "weight_bytes": _weight_bytes(model),
        "kv_bytes_per_token": _kv_bytes(model.config, DTYPES[settings["precision"]]),
        "to_first_token_s": to_first_token_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": torch.get_num_threads(),
    }
