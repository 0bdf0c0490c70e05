"""What the GPU benchmarks share: timing, the machine's two ceilings, and result files that grow command by command."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "ROOT",
    "copy_rate",
    "device_name",
    "matmul_rate",
    "merge_results",
    "result_path",
    "sample_us",
    "spread",
    "write_results",
]

ROOT = Path(__file__).parents[1]
WARM_UPS = 3
QUEUE_CYCLES = 20_000_000
"""GPU cycles (about 10 ms) that the device waits while calls queue up, so that launch gaps stay out of the times."""


def device_name() -> str:
    """Name of the first GPU, or ``cpu``."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")


def spread(samples: Sequence[float]) -> list[float]:
    """20th, 50th and 80th percentile."""
    if len(samples) < 2:
        return [samples[0]] * 3
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return [cuts[1], statistics.median(samples), cuts[7]]


def sample_us(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Microseconds of each of ``repeats`` calls, taken in turns from ``calls``, which differ in their memory.

    Turns keep the inputs out of the L2 cache where all of them together are larger than it. CUDA events time each call
    on a GPU, a clock on a CPU.
    """
    import torch

    for number in range(max(WARM_UPS, len(calls))):
        calls[number % len(calls)]()
    if not torch.cuda.is_available():
        samples = []
        for number in range(repeats):
            started = time.perf_counter()
            calls[number % len(calls)]()
            samples.append((time.perf_counter() - started) * 1e6)
        return samples
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda._sleep(QUEUE_CYCLES)
    for number, (begin, end) in enumerate(events):
        begin.record()
        calls[number % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1000 for begin, end in events]


def matmul_rate(side: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a bf16 product of two (side, side) matrices of random values; the median call."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / (statistics.median(sample_us([lambda: torch.mm(a, b, out=out)], repeats)) * 1e-6)


def copy_rate(nbytes: int = 1 << 30, repeats: int = 20) -> float:
    """Bytes per second, read and written, of a copy on the device; the median call."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / (statistics.median(sample_us([lambda: target.copy_(source)], repeats)) * 1e-6)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from deepdoctor.run_folder import versions

    found = versions()
    for name in ("triton", "transformers", "peft", "flash-attn-4"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_results(what: str, gpu: str, out: str | None, values: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/<what>_<gpu>_<date>.json`` (or ``out``) and return its path."""
    path = Path(out) if out else result_path(what, gpu)
    # Given from outside where the sources came without their history, or with another's.
    commit = (
        os.environ.get("BENCH_COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    head = {"what": what, "gpu": gpu, "date": time.strftime("%Y-%m-%d"), "commit": commit, "versions": _versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **values}, indent=1) + "\n", encoding="utf-8")
    return path


def result_path(what: str, gpu: str) -> Path:
    """Where results of this GPU and day go."""
    return ROOT / "benchmarks" / "results" / f"{what}_{_slug(gpu)}_{time.strftime('%Y-%m-%d')}.json"


def merge_results(path: Path, gpu: str, cases: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the cases of an earlier file of the same GPU and date that ``cases`` do not replace, and then ``cases``.

    keys: fields that say which entry replaces which.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return cases
    if earlier.get("gpu") != gpu or earlier.get("date") != time.strftime("%Y-%m-%d"):
        return cases
    new = {tuple(case.get(key) for key in keys) for case in cases}
    return [case for case in earlier["cases"] if tuple(case.get(key) for key in keys) not in new] + cases
