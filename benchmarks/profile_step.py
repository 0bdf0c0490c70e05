"""Where the time of a training step goes on this GPU, with random weights in the shape of R1-Distill-Llama-8B.

    python benchmarks/profile_step.py [--vram 15GiB] [--attention flash|fa4] [--precision nf4|bf16|fp8] [--tokens 2048]
        [--layers 32] [--steps 8] [--out FILE]

Rows have the lengths of medical-o1 rows (540 to 1,050 tokens, 8 a step) unless --tokens says how long each is. Prints
the plan, one step's GPU time by part with calls, tokens/s, peak against prediction, and the clock and power that the
card kept, because an H100 multiplying without a pause is held back by its power limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench_common import device_name, matmul_rate
from deepdoctor.data.prompt import EncodedRow
from deepdoctor.kernels.flash_attention import choose_attention
from deepdoctor.kernels.nf4 import quantize_nf4
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.config import ModelConfig, known_config
from deepdoctor.model.decoder import Decoder, DecoderLayer
from deepdoctor.model.load import limit_memory
from deepdoctor.recipe import TrainSection
from deepdoctor.sizes import MIB, parse_size
from deepdoctor.train.gradients import EngineGradients
from deepdoctor.train.optimizer import make_optimizer
from deepdoctor.train.plan import make_plan

LENGTHS = (540, 620, 670, 740, 880, 1050)
PARTS = (
    ("attention", ("flash", "Flash")),
    ("NF4 to 16 bits", ("_write_bordered", "_dequantize")),
    ("fp8 quantisation", ("_quantize", "_convert")),
    ("norms", ("_add_norm", "_norm_")),
    ("SwiGLU", ("_swiglu",)),
    ("RoPE", ("_rope",)),
    ("loss", ("_cross_entropy", "_accumulate_log", "_overwrite")),
    ("products", ("nvjet", "gemm", "cutlass", "sm90_xmma")),
    ("optimizer", ("kOptimizer",)),
    ("copies to and from the host", ("Memcpy HtoD", "Memcpy DtoH")),
)
"""Part -> what its kernels' names hold; the first that fits counts."""


def build(config: ModelConfig, precision: str, device: torch.device) -> Decoder:
    """A decoder with random weights."""
    torch.manual_seed(0)
    decoder = Decoder(config, torch.bfloat16, precision)
    half = {"device": device, "dtype": torch.bfloat16}

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, **half).mul_(0.02)  # type: ignore[arg-type]

    decoder.embedding, decoder.head = (draw(config.vocab_size, config.hidden_size) for _ in range(2))
    decoder.norm = torch.ones(config.hidden_size, **half)  # type: ignore[arg-type]
    decoder.inverse_frequencies = decoder.inverse_frequencies.to(device)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        layer.input_norm, layer.post_attention_norm = (torch.ones_like(decoder.norm) for _ in range(2))
        for linear in layer.linears:
            if precision == "nf4":
                linear.parts = tuple(quantize_nf4(draw(size, linear.in_features)) for size in linear.sizes)
            else:
                linear.weight = draw(sum(linear.sizes), linear.in_features)
    return decoder


def draw_rows(count: int, tokens: int | None) -> list[EncodedRow]:
    """Rows of random tokens, all of them labels."""
    source = random.Random(0)
    rows = []
    for _ in range(count):
        length = tokens or int(source.choice(LENGTHS) * source.uniform(0.85, 1.05))
        ids = [source.randrange(128_000) for _ in range(length)]
        rows.append(EncodedRow(ids, list(ids), (10, length // 2), (length // 2, length)))
    return rows


def part_of(kernel: str) -> str:
    """Name of the part a kernel belongs to."""
    return next((part for part, names in PARTS if any(name in kernel for name in names)), "other")


def card_state() -> tuple[float, float]:
    """SM clock in MHz and power in W, now."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    clock, power = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
    return float(clock), float(power)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda")
    config = known_config("deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    assert config is not None
    config = dataclasses.replace(config, num_layers=arguments.layers)
    memory = parse_size(arguments.vram) if arguments.vram else None
    if memory:
        limit_memory(device, memory)
    decoder = build(config, arguments.precision, device)
    torch.cuda.empty_cache()
    section = TrainSection(optimizer=arguments.optimizer, shuffle=False, max_steps=arguments.steps)
    rows = draw_rows(8 * arguments.steps, arguments.tokens)
    attention = arguments.attention or choose_attention(device, torch.bfloat16, config.head_dim)
    plan = make_plan(
        config,
        section,
        [len(row.input_ids) for row in rows],
        device=device,
        precision=decoder.precision,
        compute_dtype=torch.bfloat16,
        memory_mib=memory,
        attention=attention,
        held_mib=decoder.device_nbytes / MIB,
    )
    print("\n".join(plan.lines()), flush=True)
    adapter = Adapter(config, LoraSettings(), 1).to(device)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work = EngineGradients(decoder, adapter, section, plan, None)
    optimizer, _ = make_optimizer(work.parameters, section.optimizer, 1e-4, 0.01, (0.9, 0.999), device)
    torch.cuda.synchronize()
    built = time.perf_counter()
    steps = [rows[at : at + 8] for at in range(0, len(rows), 8)]
    work.probe(steps)
    torch.cuda.synchronize()
    probed = time.perf_counter()

    def step(number: int) -> tuple[float, int]:
        """Seconds and tokens of one step."""
        ready = work.prepare(steps[number])
        torch.cuda.synchronize()
        begun = time.perf_counter()
        loss, norm = work.compute(ready, 1.0), work.clip(1.0)
        float(loss), float(norm)
        optimizer.step()
        work.zero()
        work.after_update()
        torch.cuda.synchronize()
        return time.perf_counter() - begun, ready.tokens

    timed = [step(number) for number in range(len(steps))][2:]
    clock, power = card_state()
    peak = torch.cuda.max_memory_allocated() / MIB
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        seconds, tokens = step(0)
    parts: dict[str, list[float]] = {}
    for event in found.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total > 0:
            if event.key.startswith("Optimizer."):
                continue  # a mark around the kernel, which is there itself
            entry = parts.setdefault(part_of(event.key), [0.0, 0])
            entry[0] += event.self_device_time_total / 1000
            entry[1] += event.count
    total = sum(ms for ms, _ in parts.values())
    for part, (ms, calls) in sorted(parts.items(), key=lambda item: -item[1][0]):
        print(f"{part:>28}  {ms:7.1f} ms  {ms / total:5.1%}  {calls:6.0f} kernels")
    rates = [count / second for second, count in timed]
    print(f"{'all':>28}  {total:7.1f} ms, {tokens:,} tokens; {1000 * seconds:.1f} ms under the profiler")
    speed = sum(count for _, count in timed) / sum(second for second, _ in timed)
    step_ms = 1000 * statistics.median(second for second, _ in timed)
    off = peak / plan.predicted_peak_mib - 1
    print(f"{speed:,.0f} tok/s ({min(rates):,.0f} to {max(rates):,.0f}), step {step_ms:.0f} ms")
    print(f"peak {peak:,.0f} MiB, predicted {plan.predicted_peak_mib:,.0f} ({off:+.1%})")
    print(f"engine built in {built - started:.1f} s, probe and warm-up {probed - built:.1f} s")
    print(f"{clock:.0f} MHz, {power:.0f} W")
    work.close()
    return {
        "gpu": device_name(),
        "setting": vars(arguments),
        "tokens_per_s": speed,
        "tokens_per_s_steps": rates,
        "peak_mib": peak,
        "predicted_peak_mib": plan.predicted_peak_mib,
        "parts_ms": {part: values[0] for part, values in parts.items()},
        "profiled_tokens": tokens,
        "clock_mhz": clock,
        "power_w": power,
        "matmul_tflops": matmul_rate(8192) / 1e12,
        "plan": plan.to_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vram")
    parser.add_argument("--attention")
    parser.add_argument("--precision", default="nf4")
    parser.add_argument("--optimizer", default="adamw_8bit")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.out:
        result["setting"]["out"] = None
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
