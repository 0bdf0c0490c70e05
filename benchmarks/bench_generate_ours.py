"""Our side of the answering benchmark: prompts, the adapter, and answers, each from what a user's command goes through.

A job is a JSON object: prompts (JSON file, token ids of each prompt), streams, new_tokens, base, adapter (PEFT folder
or null), precision. Jobs of one process have base, adapter and precision in common: what is loaded serves all of them.
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

__all__ = ["answer_all", "write_adapter", "write_prompts"]

PROMPT_TOKENS = 150
WARM_UP_TOKENS = 16
B_STD = 0.05
"""Spread of the random B: the adapter then changes a product by about a tenth."""
STARTED = float(os.environ.get("BENCH_STARTED", time.time()))
"""When the benchmark started this process, seconds since the epoch."""


def write_prompts(base: Path, rows: str, count: int, target: Path) -> dict[str, Any]:
    """Write the token ids of ``count`` different prompts, nearest to PROMPT_TOKENS first."""
    from deepdoctor.data.prompt import Prompt
    from deepdoctor.data.sources import load_rows
    from deepdoctor.model.load import load_tokenizer
    from deepdoctor.recipe import DataSection

    prompt = Prompt(load_tokenizer(base), "tutorial")
    questions = list(dict.fromkeys(row.question for row in load_rows(DataSection(source=rows))))
    repeats = range(-(-count // len(questions)))
    texts = [f"Case {n + 1}. {question}" if n else question for n in repeats for question in questions]
    ids = sorted((prompt.prompt_ids(text) for text in texts), key=lambda ids: abs(len(ids) - PROMPT_TOKENS))[:count]
    target.write_text(json.dumps(ids), encoding="utf-8")
    return {"longest": max(map(len, ids)), "shortest": min(map(len, ids))}


def write_adapter(base: Path, folder: Path) -> None:
    """Write an adapter whose B is not zero, so that it acts."""
    import torch

    from deepdoctor.model.adapter import Adapter, LoraSettings
    from deepdoctor.model.config import ModelConfig

    adapter = Adapter(ModelConfig.from_folder(base), LoraSettings(rank=16, alpha=16))
    generator = torch.Generator().manual_seed(1)
    for b in adapter.b.values():
        b.data.normal_(0, B_STD, generator=generator)
    adapter.save(folder, str(base))


class _Clock:
    """When tokens came: ``on_token`` of the generator. Requests are numbered by their key."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.count = 0
        self.begun: set[object] = set()
        self.first_token_s = self.prefill_s = 0.0
        self.early = 0
        self.stamps: list[float] = []
        self.ids: list[int] = []

    def __call__(self, request: Any, token: int) -> None:
        now = time.perf_counter() - self.started
        self.count += 1
        if request.key not in self.begun:
            self.first_token_s = self.first_token_s or now
            self.begun.add(request.key)
            self.prefill_s, self.early = now, self.count
        if request.key == 0:
            self.stamps.append(now)
            self.ids.append(token)


def answer_all(jobs: list[dict[str, Any]]) -> None:
    """Load once and do the jobs; see ``do_jobs``."""
    started = time.perf_counter()
    import torch

    from deepdoctor.model.adapter import Adapter
    from deepdoctor.model.generate import Generator
    from deepdoctor.model.load import choose_device, load_decoder
    from peers.job_loop import do_jobs

    import_s = time.perf_counter() - started
    device = choose_device("auto")
    common = jobs[0]
    torch.zeros(1, device=device)  # the CUDA context is no part of the load
    started = time.perf_counter()
    decoder = load_decoder(Path(common["base"]), common["precision"], device)
    adapter = None
    if common["adapter"]:
        adapter = Adapter.load(Path(common["adapter"]), decoder.config).to(decoder.device).eval()
    if device.type == "cuda":
        torch.cuda.synchronize()
    load_s = time.perf_counter() - started

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        return _answer(Generator(decoder, adapter, (), slots=job["streams"], reduced=True), job)

    do_jobs(jobs, answer, import_s, load_s)


def _answer(generator: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Warm up, answer, and return figures.

    early_tokens: come when the last stream got its first. stamps_s: when the first stream's came.
    """
    import torch

    from deepdoctor.model.generate import Request
    from deepdoctor.model.sampling import Sampling

    decoder, adapter = generator.decoder, generator.adapters.get("tuned")
    cuda = decoder.device.type == "cuda"
    prompts = json.loads(Path(job["prompts"]).read_text(encoding="utf-8"))[: job["streams"]]

    def requests(new_tokens: int) -> list[Request]:
        sampling = Sampling(max_new_tokens=new_tokens)
        sides = ("base" if adapter is None else "tuned", "base")
        return [Request(ids, sampling, sides[number % 2], number) for number, ids in enumerate(prompts)]

    clock = _Clock()
    list(generator.run(requests(min(WARM_UP_TOKENS, job["new_tokens"])), clock))
    to_first_token_s = time.time() - STARTED - (time.perf_counter() - clock.started) + clock.first_token_s
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = _Clock()
    written = sum(len(completion.ids) for completion in generator.run(requests(job["new_tokens"]), clock))
    total_s = time.perf_counter() - clock.started
    assert written == clock.count == len(prompts) * job["new_tokens"], (written, clock.count)
    weight_bytes, kv_bytes = _step_bytes(decoder, adapter, job["streams"])
    return {
        "prompt_tokens": sum(map(len, prompts)),
        "tokens": written,
        "first_token_s": clock.first_token_s,
        "prefill_s": clock.prefill_s,
        "early_tokens": clock.early,
        "total_s": total_s,
        "stamps_s": clock.stamps,
        "ids": clock.ids[:32],
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": kv_bytes,
        "to_first_token_s": to_first_token_s,
        "held": f"{decoder.precision}, activations {decoder.compute_dtype}",
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": torch.get_num_threads(),
    }


def _step_bytes(decoder: Any, adapter: Any, streams: int) -> tuple[float, int]:
    """Bytes of weights that a step of ours reads, and of keys and values of one token."""
    import torch

    from deepdoctor.model.cpu_weights import FEW_ROWS, four_bit_grid, has_fp16_products

    config = decoder.config
    values = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    if decoder.packed_head is None:
        embedding = 0 if decoder.head is decoder.embedding else decoder.embedding.nbytes
        lora = 0 if adapter is None else adapter.trainable_parameters * decoder.compute_dtype.itemsize
        return decoder.nbytes - embedding + lora, values * decoder.compute_dtype.itemsize
    matrices: list[torch.Tensor] = [decoder.head, *(linear.weight for la in decoder.layers for linear in la.linears)]
    # 4 bits with a scale and an offset in bf16 per 32 weights, or 16 bits.
    packed = [0.625 if streams <= FEW_ROWS and four_bit_grid(w) is not None else 2.0 for w in matrices]
    read = sum(size * weight.numel() for size, weight in zip(packed, matrices, strict=True))
    return read, values * (2 if has_fp16_products() else 4)
