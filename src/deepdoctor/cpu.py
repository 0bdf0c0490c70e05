"""What must be settled before torch is imported: CPU threads on a busy host, GPU memory in growing pieces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

__all__ = ["lost_share", "prepare_cpu", "prepare_gpu"]

PROBE_S = 0.3
BUSY_SHARE = 0.10
"""Share of time lost to others above which threads should hardly spin."""
QUIET_SPINS, BUSY_SPINS = 20_000, 1_000
"""Rounds a thread of libgomp spins before it sleeps. Its own default (about a millisecond) collapses on a busy host: a
spinning thread waits for one the host has taken away. Measured in docs/log.md: 20,000 costs nothing when the host is
quiet; 1,000 costs half of the one-stream decoding speed then, but keeps its speed when the host is busy."""

_SPIN = (
    "import time\n"
    "end=time.perf_counter()+{seconds}\nlast=time.perf_counter()\nlost=0.0\n"
    "while last<end:\n"
    "    now=time.perf_counter()\n"
    "    if now-last>0.001: lost+=now-last\n"
    "    last=now\n"
    "print(lost/{seconds})"
)


def lost_share(processes: int, seconds: float = PROBE_S) -> float:
    """Share of time taken from ``processes`` spinning processes by others on the host; the worst of them, 0 to 1."""
    command = [sys.executable, "-S", "-E", "-c", _SPIN.format(seconds=seconds)]
    spinning = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return max(min(float(process.communicate()[0] or 0), 1.0) for process in spinning)


def prepare_cpu(say: Callable[[str], None]) -> None:
    """Limit how long OpenMP threads spin, less where the host takes time away; must run before torch is imported.

    Does nothing where torch is loaded, OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, or an NVIDIA driver is there (the GPU
    does the work).
    """
    named = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if "torch" in sys.modules or named or os.path.exists("/proc/driver/nvidia"):
        return
    lost = lost_share(min(os.cpu_count() or 1, 4))
    os.environ["GOMP_SPINCOUNT"] = str(BUSY_SPINS if lost > BUSY_SHARE else QUIET_SPINS)
    if lost > BUSY_SHARE:
        say(f"cpu: others take {lost:.0%} of the processor's time, so threads sleep rather than spin")


def prepare_gpu() -> None:
    """Let PyTorch's GPU allocator grow its pieces, so that less is lost between them; what the user set stays."""
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
