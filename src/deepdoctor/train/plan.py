"""What a run will take on this machine, worked out from the model's shape and the rows' lengths.

Every figure is an estimate with its arithmetic beside it; the run records predicted and measured peak next to each
other. On a GPU the engine trains, and ``train/ladder.py`` chooses its settings. On a CPU, and with dropout, autograd
does: bytes are then those of the decoder in ``model/decoder.py``, where nothing is recomputed but silu and the norms.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from deepdoctor.engine.layout import LayerShape
from deepdoctor.engine.memory import fp8_matrix_bytes
from deepdoctor.engine.step import padded
from deepdoctor.errors import TrainingError
from deepdoctor.kernels.flash_attention import Backend
from deepdoctor.kernels.linear_cross_entropy import CHUNK_TOKENS
from deepdoctor.model.adapter import projection_sizes
from deepdoctor.model.config import ModelConfig
from deepdoctor.recipe import TrainSection
from deepdoctor.sizes import CONTEXT_MIB, MIB
from deepdoctor.train.adamw_8bit import SMALLEST_8BIT
from deepdoctor.train.ladder import Choice, Fixed, choose, smallest
from deepdoctor.train.order import step_rows, total_steps

__all__ = ["Plan", "make_plan", "memory_in_use_mib", "peak_memory_mib", "training_bytes"]

RUNTIME_MIB = {"cpu": 450, "cuda": CONTEXT_MIB}
"""Python with torch loaded; CUDA context and the libraries' own memory."""
CPU_ACTIVATIONS_MIB = 1300
"""Activations a CPU run aims for: products are at full speed from about 700 tokens on, more only costs memory."""
GPU_SHARE = 0.9
"""Share of the memory that an autograd plan fills; the rest is fragmentation."""
ENGINE_SHARE = 0.975
"""The same for the engine, whose memory is one block."""
EXACT_STEPS = 2000
"""Steps whose micro-batches are worked out one by one; of longer runs only the budget is known."""
STEP_SHARE = 0.75
"""Share of the matrix-product rate that a whole step reaches on an H100; used before anything is measured."""
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 2.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Per weight. NF4 with double quantisation: 4 bits, one byte per 64 weights, one fp32 per 256 of those bytes. fp8: the
16-bit base, which answers; the copies that train are the engine's matrices."""


@dataclass(frozen=True)
class Plan:
    """Predictions. Memory in MiB, per token in bytes; rows and tokens count what training sees once per epoch.

    disk_mib: of all that was asked about; disk_parts_mib: by what it is for.
    """

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
    engine: Choice | None = None
    tokens_per_s: float | None = None
    disk_parts_mib: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        values = asdict(self)
        values["engine"] = self.engine.to_json() if self.engine else None
        return values

    def lines(self) -> list[str]:
        """Return the plan as short sentences for the terminal."""
        source = "measured" if self.lengths_measured else "assumed, rows not read"
        lines = [
            f"base {self.parameters / 1e6:,.1f} M weights held as {self.precision}, computed in {self.compute_dtype} "
            f"on {self.device}: {self.weights_mib:,.0f} MiB",
            f"adapter {self.trainable_parameters / 1e6:,.2f} M weights: {self.adapter_mib:,.0f} MiB with gradients, "
            f"optimizer {self.optimizer_mib:,.0f} MiB",
        ]
        if self.engine is None:
            lines.append(
                f"micro-batches of up to {self.token_budget:,} tokens x {self.activation_bytes_per_token / 1000:,.0f} "
                f"kB, logits chunk {self.logits_mib:,.0f} MiB"
            )
        else:
            lines += _engine_lines(self.engine)
        lines.append(f"predicted peak {self.predicted_peak_mib:,.0f} MiB of {self.available_mib:,.0f} MiB")
        speed = ""
        if self.tokens_per_s:
            minutes = self.tokens / self.tokens_per_s / 60
            speed = f"; about {self.tokens_per_s:,.0f} tok/s, {minutes:,.1f} min"
        lines.append(
            f"{self.steps} steps over {self.rows} rows (longest {self.longest_row} tokens, {source}), "
            f"about {self.tokens:,} tokens{speed}"
        )
        parts = ", ".join(f"{name} {size:,.0f}" for name, size in self.disk_parts_mib.items())
        return [*lines, f"disk {self.disk_mib:,.0f} MiB: {parts}"]


RUNG_WORDS = {
    "keep": "keep everything",
    "elementwise": "compute norms and silu again",
    "gate_up": "compute gate/up again",
    "layer": "keep their input alone",
    "host": "keep their input in host memory",
}


def _engine_lines(choice: Choice) -> list[str]:
    ladder = ", ".join(f"{count} layers {RUNG_WORDS[rung]}" for rung, count in choice.counts())
    chunk = f" in chunks of {choice.chunk_tokens:,}" if choice.chunk_tokens < choice.max_tokens else ""
    held = "frozen matrices ready in 16 bits" if choice.keep_matrices else "frozen matrices dequantised at each use"
    if choice.products == "fp8":
        held = "frozen matrices in fp8 for both directions"
    host = [
        name
        for name, there in (("embedding", choice.embedding_on_host), ("head", choice.head_rows is not None))
        if there
    ]
    where = f"; {' and '.join(host)} in host memory" if host else ""
    return [
        f"micro-batches of up to {choice.max_tokens:,} tokens{chunk}, {choice.micro_batches:.1f} a step; {held}{where}",
        f"{ladder}: {choice.extra_work:.0%} more products than without",
        "memory: "
        + ", ".join(f"{name} {nbytes / MIB:,.0f}" for name, nbytes in choice.parts.items() if nbytes)
        + f" MiB; host {choice.host_bytes / MIB:,.0f} MiB",
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
    seed: int = 0,
    attention: Backend = "flash",
    held_out_longest: int = 0,
    matmul_rate: float | None = None,
    spare_mib: float = 0.0,
    held_mib: float = 0.0,
    disk: Mapping[str, int] | None = None,
) -> Plan:
    """Predict memory, work and disk, and choose the micro-batch and, on a GPU, the engine's settings.

    lengths: tokens of each training row, in order. memory_mib: the card or machine to plan for (null: this one's free
    memory). seed: decides which rows meet in a step. attention: the engine's backend. held_out_longest: tokens of the
    longest held-out row. matmul_rate: operations per second of a large product here, for the expected speed. spare_mib:
    memory to leave unused. held_mib: of the free memory, what the loaded base holds already. disk: bytes that the run
    writes beside training, by what they are for. Raises TrainingError where not even one row at a time fits, saying
    what would.
    """
    if precision == "fp8" and section.lora_dropout:
        raise TrainingError(
            f"model.precision is fp8, but train.lora_dropout is {section.lora_dropout}, and dropout trains in 16 bits",
            "set `--train.lora_dropout 0`, or `--model.precision bf16`",
        )
    if device.type == "cuda" and not section.lora_dropout:
        return _engine_plan(
            config,
            section,
            lengths,
            device=device,
            precision=precision,
            compute_dtype=compute_dtype,
            available=_engine_room(device, memory_mib, held_mib) - spare_mib,
            lengths_measured=lengths_measured,
            seed=seed,
            attention=attention,
            held_out_longest=held_out_longest,
            matmul_rate=matmul_rate,
            disk=disk,
        )
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
    return Plan(
        weights_mib=weights,
        adapter_mib=adapter,
        optimizer_mib=optimizer,
        activation_bytes_per_token=per_token,
        logits_mib=logits,
        token_budget=budget,
        predicted_peak_mib=peak,
        available_mib=available,
        **_common(config, section, lengths, device, precision, compute_dtype, lengths_measured, disk),
    )


def training_bytes(config: ModelConfig, section: TrainSection) -> int:
    """Bytes that training leaves on disk at most: its checkpoints, one that is being written, and the adapter.

    A checkpoint has the fp32 adapter and the optimizer's state; of each of its tensors, 3 kB for names and tables.
    """
    sizes = projection_sizes(config)
    tensors = [section.lora_rank * width for target in section.target_modules for width in sizes[target]]
    coarse = section.optimizer == "adamw_8bit"
    state = config.num_layers * sum(n * (2 + 8 / 256 if coarse and n >= SMALLEST_8BIT else 8) for n in tensors)
    adapter = config.num_layers * sum(4 * n + 3072 for n in tensors) + 2**16
    return (section.keep_checkpoints + 1) * (adapter + math.ceil(state)) + adapter


def _common(
    config: ModelConfig,
    section: TrainSection,
    lengths: Sequence[int],
    device: torch.device,
    precision: str,
    compute_dtype: torch.dtype,
    lengths_measured: bool,
    disk: Mapping[str, int] | None,
) -> dict[str, Any]:
    """What a plan says whichever way the run trains."""
    steps = total_steps(len(lengths), section.global_batch_size, section.max_steps, section.epochs)
    seen = steps * section.global_batch_size * sum(lengths) / len(lengths)
    parts = {"training": training_bytes(config, section), **(disk or {})}
    return {
        "device": str(device),
        "precision": precision,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "parameters": config.parameters,
        "trainable_parameters": _trainable(config, section),
        "rows": len(lengths),
        "longest_row": max(lengths),
        "steps": steps,
        "tokens": math.ceil(seen),
        "operations_per_token": 4.0 * (config.linear_parameters + config.vocab_size * config.hidden_size),
        "disk_mib": sum(parts.values()) / MIB,
        "disk_parts_mib": {name: size / MIB for name, size in parts.items()},
        "lengths_measured": lengths_measured,
    }


def _engine_room(device: torch.device, memory_mib: float | None, held_mib: float) -> float:
    """MiB that PyTorch may allocate: the card, or what is free on it, less what the CUDA context takes."""
    if memory_mib is not None:
        return memory_mib - RUNTIME_MIB["cuda"]
    if not torch.cuda.is_available():
        return 81920.0 - RUNTIME_MIB["cuda"]
    free, total = (value / MIB for value in torch.cuda.mem_get_info(device))
    reserved = torch.cuda.memory_reserved(device) / MIB
    return min(total - RUNTIME_MIB["cuda"], free + max(reserved, held_mib))


def _fixed(config: ModelConfig, section: TrainSection, shape: LayerShape, precision: str, element: int) -> Fixed:
    sides = shape.matrices().values()
    embedding = config.vocab_size * config.hidden_size * element
    trainable = _trainable(config, section)
    fp8 = precision == "fp8"
    layer = fp8_matrix_bytes(shape, element) if fp8 else sum(out * inn for out, inn in sides) * element
    return Fixed(
        linears=round(config.linear_parameters * BYTES[precision]),
        matrices=config.num_layers * layer,
        dense=precision not in ("nf4", "fp8"),
        vectors=_vectors(config) * element,
        embedding=embedding,
        head=embedding,
        tied=config.tie_word_embeddings,
        masters=trainable * 4,
        optimizer=round(trainable * (2 + 8 / 256 if section.optimizer == "adamw_8bit" else 8)),
        fp8=fp8,
    )


def _engine_plan(
    config: ModelConfig,
    section: TrainSection,
    lengths: Sequence[int],
    *,
    device: torch.device,
    precision: str,
    compute_dtype: torch.dtype,
    available: float,
    lengths_measured: bool,
    seed: int,
    attention: Backend,
    held_out_longest: int,
    matmul_rate: float | None,
    disk: Mapping[str, int] | None,
) -> Plan:
    element = compute_dtype.itemsize
    shape = LayerShape.of(config, section.lora_rank, tuple(section.target_modules))
    fixed = _fixed(config, section, shape, precision, element)
    count = total_steps(len(lengths), section.global_batch_size, section.max_steps, section.epochs)
    order = step_rows(len(lengths), section.global_batch_size, min(count, EXACT_STEPS), seed, section.shuffle)
    steps = [[lengths[i] for i in step] for step in order]
    longest = max(max(lengths), held_out_longest)

    def search(budget: int | None) -> Choice | None:
        """The best choice for micro-batches of ``budget`` tokens (None: of any)."""
        return choose(
            config,
            shape,
            fixed,
            steps,
            int(available * ENGINE_SHARE * MIB),
            element=element,
            attention=attention,
            budget=budget,
            max_rows=section.micro_batch_size,
            longest=longest,
            exact=count <= EXACT_STEPS,
        )

    choice = search(section.micro_batch_tokens)
    if choice is None and section.micro_batch_tokens and (other := search(None)):
        raise TrainingError(
            f"micro-batches of {section.micro_batch_tokens} tokens do not fit into {available:,.0f} MiB",
            f"set `--train.micro_batch_tokens {other.max_tokens}`, or leave it out",
        )
    if choice is None:
        raise _does_not_fit(config, shape, fixed, longest, available, element, attention, precision)
    adapter, optimizer = fixed.masters * 2 / MIB, fixed.optimizer / MIB
    common = _common(config, section, lengths, device, precision, compute_dtype, lengths_measured, disk)
    speed = None
    if matmul_rate is not None:
        speed = STEP_SHARE * matmul_rate / (choice.cost / (sum(map(sum, steps)) / len(steps)))
    return Plan(
        weights_mib=(fixed.linears + fixed.vectors + fixed.embedding + (0 if fixed.tied else fixed.head)) / MIB,
        adapter_mib=adapter,
        optimizer_mib=optimizer,
        activation_bytes_per_token=round(choice.parts["arena"] / choice.max_tokens),
        logits_mib=choice.logit_tokens * config.vocab_size * element / MIB,
        token_budget=choice.max_tokens,
        predicted_peak_mib=choice.peak_bytes / MIB,
        available_mib=available,
        engine=choice,
        tokens_per_s=speed,
        **common,
    )


def _does_not_fit(
    config: ModelConfig,
    shape: LayerShape,
    fixed: Fixed,
    longest: int,
    available: float,
    element: int,
    attention: Backend,
    precision: str,
) -> TrainingError:
    """Say what is missing and what would fit."""
    room = available * ENGINE_SHARE

    def needed(tokens: int) -> float:
        return smallest(config, shape, fixed, padded(tokens), element=element, attention=attention).peak_bytes / MIB

    message = (
        f"one row of {longest} tokens needs {needed(longest):,.0f} MiB on the GPU, {room:,.0f} MiB are there for it"
    )
    fits = 0
    for power in range(longest.bit_length(), 3, -1):
        if fits + 2**power < longest and needed(fits + 2**power) <= room:
            fits += 2**power
    if fits >= 64:
        return TrainingError(message, f"rows of up to {fits} tokens fit: set `--data.max_seq_len {fits}`")
    if precision != "nf4":
        return TrainingError(message, "hold the base in 4 bits: `--model.precision nf4`, or take a smaller model")
    return TrainingError(message, "take a smaller model, e.g. deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")


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
