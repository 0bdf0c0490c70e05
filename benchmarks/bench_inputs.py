"""What the training benchmark trains on: random weights in the exact shape of an 8B Llama, and rows of a given length.

Throughput and memory do not depend on the weights' values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["flop_per_token", "write_base", "write_long_rows", "write_rows"]

SHARD_BYTES = 3_000_000_000
STD = 0.02
"""Spread of the random weights, as the published models were initialised."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": STD,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
"""config.json of DeepSeek-R1-Distill-Llama-8B."""
TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""A shape that a CPU trains in seconds."""


def _config(layers: int | None, tiny: bool) -> dict[str, Any]:
    config = {**LLAMA_8B, **(TINY if tiny else {})}
    return {**config, "num_hidden_layers": layers} if layers else config


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        yield stem + "input_layernorm.weight", (hidden,)
        yield stem + "self_attn.q_proj.weight", (queries, hidden)
        yield stem + "self_attn.k_proj.weight", (keys, hidden)
        yield stem + "self_attn.v_proj.weight", (keys, hidden)
        yield stem + "self_attn.o_proj.weight", (hidden, queries)
        yield stem + "post_attention_layernorm.weight", (hidden,)
        yield stem + "mlp.gate_proj.weight", (wide, hidden)
        yield stem + "mlp.up_proj.weight", (wide, hidden)
        yield stem + "mlp.down_proj.weight", (hidden, wide)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def flop_per_token(base: Path) -> float:
    """FLOP that a trained token costs without recompute: each frozen weight twice forward, twice for dX."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    matrices = [shape for name, shape in _shapes(config) if len(shape) == 2 and "embed_tokens" not in name]
    return 4.0 * sum(rows * columns for rows, columns in matrices)


def write_base(folder: Path, tokenizer: Path, layers: int | None = None, tiny: bool = False) -> None:
    """Write config, tokenizer and random bf16 shards; drawn on the GPU where there is one. 16 GB for the whole shape.

    layers: fewer than 32, for quick trials. tiny: two narrow layers with the whole vocabulary.
    """
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    config = _config(layers, tiny)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    total = 0
    for name, shape in _shapes(config):
        nbytes = 2 * torch.Size(shape).numel()
        if nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, shape))
        room -= nbytes
        total += nbytes

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return values.normal_(0, STD, generator=generator).cpu()

    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    with ThreadPoolExecutor(2) as writers:
        pending = []
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            index.update(dict.fromkeys((name for name, _ in names), file))
            tensors = {name: draw(name, shape) for name, shape in names}
            pending.append(writers.submit(save_file, tensors, folder / file, {"format": "pt"}))
            if len(pending) > 2:  # three shards in memory at most
                pending[-3].result()
        for job in pending:
            job.result()
    _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _json(folder / "generation_config.json", {"bos_token_id": 128000, "eos_token_id": 128001})
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    _json(folder / "config.json", config)  # last: a folder with it is complete


def _json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_rows(source: Path, target: Path, batch: int) -> int:
    """Copy whole batches of rows, so that every system sees the same ones in each step; return how many rows."""
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = lines[: max(len(lines) // batch * batch, 1)]
    target.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return len(kept)


def write_long_rows(source: Path, target: Path, tokenizer: Path, tokens: int, count: int) -> None:
    """Write ``count`` rows of ``tokens`` tokens or a few less: the reasoning of many rows, one after another.

    tokens counts the tutorial's template, question and answer too.
    """
    from deepdoctor.data.prompt import Prompt
    from deepdoctor.data.rows import Row
    from deepdoctor.model.load import load_tokenizer

    ours = load_tokenizer(tokenizer)
    prompt = Prompt(ours, "tutorial", None, "all")
    found = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = [row["Complex_CoT"].strip() for row in found]
    with target.open("w", encoding="utf-8") as sink:
        for number in range(count):
            row = found[number % len(found)]

            def length(reasoning: str, row: dict[str, Any] = row) -> int:
                filled = Row(0, "benchmark", row["Question"], reasoning, row["Response"])
                return len(prompt.encode_row(filled).input_ids)

            stream: list[int] = []
            at = number
            while len(stream) < tokens:
                stream += ours.encode(texts[at % len(texts)] + "\n")
                at += 1
            wanted = tokens - length("x")
            while length(reasoning := ours.decode(stream[:wanted]).strip()) > tokens:
                wanted -= 1 + wanted // 10_000
            line = {"Question": row["Question"], "Complex_CoT": reasoning, "Response": row["Response"]}
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
