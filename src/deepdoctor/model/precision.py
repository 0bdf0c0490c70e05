"""Which number format the base is held in and computed in, on the device at hand.

On a GPU this follows from the compute capability. On a CPU it must be measured: a processor with AMX multiplies bf16
about six times as fast as fp32, one with AVX512-bf16 alone only half as fast, and one with neither emulates it.
"""

from __future__ import annotations

import functools
import logging
import time

import torch

from deepdoctor.errors import ModelError
from deepdoctor.kernels.fp8 import no_fp8_because

__all__ = ["cpu_matmul_gflops", "gpu_matmul_rate", "resolve_precision"]

log = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@functools.cache
def cpu_matmul_gflops() -> dict[torch.dtype, float]:
    """Measure a (512, 576) x (576, 1536) product on this CPU in bf16 and fp32; GFLOP/s, best of ten each.

    The two take turns, so that a busy moment of the host does not decide. Takes about 100 ms.
    """
    pairs = {d: (torch.randn(512, 576).to(d), torch.randn(1536, 576).to(d)) for d in (torch.bfloat16, torch.float32)}
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(11):
        for dtype, (x, w) in pairs.items():
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return {dtype: 2 * 512 * 576 * 1536 / seconds / 1e9 for dtype, seconds in best.items()}


@functools.cache
def gpu_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure a 4096^3 product on this GPU; operations per second, best of five. Takes about 50 ms and 100 MiB."""
    side = 4096
    x, w = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(x)
    best = float("inf")
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(x, w, out=out)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return 2 * side**3 / best


def resolve_precision(
    precision: str, device: torch.device, compute_dtype: torch.dtype | None = None
) -> tuple[str, torch.dtype]:
    """Return (how the base is held, dtype of activations).

    precision: "auto", "nf4", "fp8", "bf16", "fp16" or "fp32"; "fp8" is held and answers in bf16, and trains with
    products in fp8. Raises ModelError for bf16 or fp8 on a device without it.
    """
    if precision == "fp8":
        reason = no_fp8_because(device)
        if reason is not None:
            raise ModelError(f"model.precision is fp8, but {reason}", "use `--model.precision bf16`, or nf4")
        return "fp8", torch.bfloat16
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        fast = torch.bfloat16 if has_bf16 else torch.float16
        if precision == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise ModelError(f"model.precision is bf16, but {name} has no bf16 arithmetic", "use nf4 or fp16")
    else:
        speeds = cpu_matmul_gflops()
        fast = max(speeds, key=lambda d: speeds[d])
        shown = ", ".join(f"{str(d).removeprefix('torch.')} {s:.0f}" for d, s in speeds.items())
        log.info("CPU products, GFLOP/s: %s; %s is faster here", shown, str(fast).removeprefix("torch."))
    compute = compute_dtype or fast
    if precision == "auto":
        return next(name for name, dtype in _DTYPES.items() if dtype == compute), compute
    if precision == "nf4":
        return "nf4", compute
    return precision, _DTYPES[precision]
