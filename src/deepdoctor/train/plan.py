"""What a run will take on this machine, worked out from the model's shape and the rows' lengths.

Every figure is an estimate with its arithmetic beside it; the run records predicted and measured peak next to each
other. Bytes are of the decoder in ``model/decoder.py`` as it is: nothing is recomputed, except silu and the norms.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from deepdoctor.errors import TrainingError
from deepdoctor.kernels.linear_cross_entropy import CHUNK_TOKENS
from deepdoctor.model.config import ModelConfig
from deepdoctor.recipe import TrainSection
from deepdoctor.train.order import total_steps

__all__ = ["Plan", "make_plan", "memory_in_use_mib", "peak_memory_mib"]

MIB = 2**20
RUNTIME_MIB = {"cpu": 450, "cuda": 600}
"""Python with torch loaded; CUDA context and library workspaces."""
CPU_ACTIVATIONS_MIB = 1300
"""Activations a CPU run aims for: products are at full speed from about 700 tokens on, more only costs memory."""
GPU_SHARE = 0.9
"""Share of the card's memory a plan fills; the rest is fragmentation."""
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Per weight. NF4 with double quantisation: 4 bits, one byte per 64 weights, one fp32 per 256 of those bytes."""


@dataclass(frozen=True)
class Plan:
    """Predictions. Memory in MiB, per token in bytes; rows and tokens count what training sees once per epoch."""

    device: str
    precision: str
    compute_dtype: str
    parameters: int
    trainable_parameters: int
    weights_mib: float
    adapter_mib: float
    optimizer_mib: float
    activation_bytes_per_token: int
    logits_mib: float
    token_budget: int
    predicted_peak_mib: float
    available_mib: float
    rows: int
    longest_row: int
    steps: int
    tokens: int
    operations_per_token: float
    disk_mib: float
    lengths_measured: bool

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the plan as short sentences for the terminal."""
        source = "measured" if self.lengths_measured else "assumed, rows not read"
        return [
            f"base {self.parameters / 1e6:,.1f} M weights held as {self.precision}, computed in {self.compute_dtype} "
            f"on {self.device}: {self.weights_mib:,.0f} MiB",
            f"adapter {self.trainable_parameters / 1e6:,.2f} M weights: {self.adapter_mib:,.0f} MiB with gradients, "
            f"optimizer {self.optimizer_mib:,.0f} MiB",
            f"micro-batches of up to {self.token_budget:,} tokens x {self.activation_bytes_per_token / 1000:,.0f} kB, "
            f"logits chunk {self.logits_mib:,.0f} MiB",
            f"predicted peak {self.predicted_peak_mib:,.0f} MiB of {self.available_mib:,.0f} MiB",
            f"{self.steps} steps over {self.rows} rows (longest {self.longest_row} tokens, {source}), "
            f"about {self.tokens:,} tokens; disk {self.disk_mib:,.0f} MiB",
        ]


def activation_bytes(config: ModelConfig, section: TrainSection, element: int) -> int:
    """Bytes that backward keeps per token, where every token has a label; ``element`` bytes per activation.

    Per layer: x twice and its norm twice (4 D), rotated q, k and v ((N + 2K) H), attention output and its copy, which a
    micro-batch of one row does without (2 N H), gate and up (2 F), their product (F), the adapters' u (R each); fp32:
    two norm factors and one logsumexp per head. Qwen3 normalises q and k, and so keeps qkv once more. With dropout each
    projection keeps its own input and mask. Once: the gradient of the last hidden state (D) and the rope tables.
    """
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    elements = 4 * config.hidden_size + qkv + 2 * heads + 3 * config.intermediate_size
    elements += section.lora_rank * len(section.target_modules)
    floats = 2 + config.num_heads
    if config.qk_norm:
        elements += qkv
        floats += config.num_heads + config.num_kv_heads
    if section.lora_dropout:
        from deepdoctor.model.adapter import projection_sizes

        elements += 2 * sum(projection_sizes(config)[target][1] for target in section.target_modules)
    return config.num_layers * (elements * element + 4 * floats) + config.hidden_size * element + 4 * config.head_dim


def make_plan(
    config: ModelConfig,
    section: TrainSection,
    lengths: Sequence[int],
    *,
    device: torch.device,
    precision: str,
    compute_dtype: torch.dtype,
    memory_mib: float | None = None,
    lengths_measured: bool = True,
) -> Plan:
    """Predict memory, work and disk, and choose the token budget.

    lengths: tokens of each training row. memory_mib: what the run may take (null: what the machine has).
    Raises TrainingError where even one row at a time does not fit, saying what would.
    """
    element = torch.finfo(compute_dtype).bits // 8
    held = BYTES[precision]
    weights = (config.linear_parameters * held + (config.embedding_parameters + _vectors(config)) * element) / MIB
    pairs = _trainable(config, section)
    adapter = pairs * 8 / MIB
    optimizer = pairs * (2 if section.optimizer == "adamw_8bit" else 8) / MIB
    per_token = activation_bytes(config, section, element)
    logits = CHUNK_TOKENS * config.vocab_size * (4 + element) / MIB
    dense = 0.0
    if precision == "nf4":
        dense = 2 * config.intermediate_size * config.hidden_size * element / MIB
    longest = max(lengths)
    available = memory_mib or _available_mib(device)
    fixed = RUNTIME_MIB[device.type] + weights + adapter + optimizer + logits + dense
    per_row_mib = per_token / MIB
    wanted = CPU_ACTIVATIONS_MIB if device.type == "cpu" else available * GPU_SHARE - fixed
    room = min(wanted, available * GPU_SHARE - fixed)
    budget = section.micro_batch_tokens or max(longest, int(room / per_row_mib))
    together = min(section.global_batch_size, section.micro_batch_size or section.global_batch_size)
    budget = max(longest, min(budget, sum(sorted(lengths, reverse=True)[:together])))
    peak = fixed + budget * per_row_mib
    if peak > available:
        fits = int((available * GPU_SHARE - fixed) / per_row_mib)
        if fits >= longest:
            raise TrainingError(
                f"the plan needs {peak:,.0f} MiB for micro-batches of {budget} tokens, but {available:,.0f} MiB are "
                "there",
                f"set `--train.micro_batch_tokens {fits}`, or leave it out",
            )
        raise TrainingError(
            f"the plan needs {peak:,.0f} MiB for one row of {longest} tokens, but {available:,.0f} MiB are there",
            f"set `--data.max_seq_len {fits}`, or take a smaller model"
            if fits > 64
            else "take a smaller model or `--model.precision nf4`",
        )
    steps = total_steps(len(lengths), section.global_batch_size, section.max_steps, section.epochs)
    seen = steps * section.global_batch_size * sum(lengths) / len(lengths)
    merged = config.parameters * 2 / MIB
    return Plan(
        device=str(device),
        precision=precision,
        compute_dtype=str(compute_dtype).removeprefix("torch."),
        parameters=config.parameters,
        trainable_parameters=pairs,
        weights_mib=weights,
        adapter_mib=adapter,
        optimizer_mib=optimizer,
        activation_bytes_per_token=per_token,
        logits_mib=logits,
        token_budget=budget,
        predicted_peak_mib=peak,
        available_mib=available,
        rows=len(lengths),
        longest_row=longest,
        steps=steps,
        tokens=math.ceil(seen),
        operations_per_token=4.0 * (config.linear_parameters + config.vocab_size * config.hidden_size),
        disk_mib=(section.keep_checkpoints + 1) * (adapter + optimizer) + adapter / 2 + merged,
        lengths_measured=lengths_measured,
    )


def _vectors(config: ModelConfig) -> int:
    """Number of norm weights and biases."""
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = 2 * config.hidden_size
    layer += 2 * config.head_dim if config.qk_norm else 0
    layer += heads + 2 * keys if config.qkv_bias else 0
    layer += config.hidden_size if config.o_bias else 0
    layer += 2 * config.intermediate_size + config.hidden_size if config.mlp_bias else 0
    return config.num_layers * layer + config.hidden_size


def _trainable(config: ModelConfig, section: TrainSection) -> int:
    from deepdoctor.model.adapter import projection_sizes

    sizes = projection_sizes(config)
    return config.num_layers * section.lora_rank * sum(sum(sizes[target]) for target in section.target_modules)


def _available_mib(device: torch.device) -> float:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory / MIB
    try:
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
    except (ValueError, OSError):
        return 8192.0


def memory_in_use_mib(device: torch.device) -> float:
    """Memory the run holds now: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize() / MIB
    except OSError:
        return peak_memory_mib(device)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory the run has held: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
