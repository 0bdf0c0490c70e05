"""CPU threads on a busy host, settled before torch starts its thread pool."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

__all__ = ["lost_share", "prepare_cpu"]

PROBE_S = 0.3
BUSY_SHARE = 0.10
"""Above this share of lost time, spinning threads cost more than sleeping ones: a spinning barrier waits for a thread
that the host has taken away (measured: steps of 2.8 s became 28 s), sleeping costs 25 % when the host is quiet."""

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
    """Make OpenMP threads sleep instead of spin where the host takes time away; must run before torch is imported.

    Does nothing where torch is loaded, OMP_WAIT_POLICY is set, or an NVIDIA driver is there (the GPU does the work).
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ or os.path.exists("/proc/driver/nvidia"):
        return
    started = time.perf_counter()
    lost = lost_share(min(os.cpu_count() or 1, 4))
    if lost > BUSY_SHARE:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        say(
            f"cpu: {lost:.0%} of the processor's time is taken by others ({time.perf_counter() - started:.1f} s probe): threads sleep when they wait"
        )
