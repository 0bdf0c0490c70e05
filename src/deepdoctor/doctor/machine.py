"""The machine: Python, torch against the driver, what each GPU can do, memory and disk."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from deepdoctor.doctor.check import Check, make_check

__all__ = ["check_gpus", "check_python", "check_torch", "host_memory"]

GIB = 2**30
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""First NVIDIA driver for each major version of CUDA.
Source: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""
OLDEST_CAPABILITY = (7, 5)
"""First compute capability that our Triton kernels were compiled for."""
BUSY_SHARE = 0.1
"""Share of a GPU's memory in use by others above which that is worth a note."""


def check_python() -> Check:
    """Python's version."""
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return make_check(
        "python", "ok" if good else "bad", platform.python_version(), None if good else "use Python 3.11 to 3.13"
    )


def driver_version() -> str | None:
    """Version of the NVIDIA driver as the kernel or nvidia-smi tells it, or None where there is none."""
    try:
        told = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace").split("\n")[0]
    except OSError:
        told = ""
        if smi := shutil.which("nvidia-smi"):
            command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
            try:
                told = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False).stdout
            except (OSError, subprocess.TimeoutExpired):
                return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", told)
    return found[0] if found else None


def check_torch() -> list[Check]:
    """torch's version, and its build against the driver. Two lines where there is a driver."""
    try:
        import torch
    except (ImportError, OSError) as error:
        line = str(error).split("\n")[0]
        return [make_check("torch", "bad", f"cannot be imported: {line}", "install torch 2.8 or later")]
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else f"built for ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    checks = [
        make_check("torch", "bad", f"{torch.__version__} is too old", "install torch 2.8 or later")
        if release < (2, 8)
        else make_check("torch", "ok", torch.__version__ + (f", {build}" if build != "CPU" else ""))
    ]
    driver = driver_version()
    if driver is not None:
        checks.append(_check_driver(driver, cuda, torch.__version__, torch.cuda.is_available()))
    elif cuda and os.path.exists("/proc/driver/nvidia"):
        checks.append(make_check("driver", "note", "NVIDIA's, of a version that is not told"))
    return checks


def _check_driver(driver: str, cuda: str | None, torch_version: str, works: bool) -> Check:
    major = int(driver.split(".")[0])
    fits = max((version for version, oldest in OLDEST_DRIVER.items() if major >= oldest), default=None)
    build = f"a build of torch for CUDA {fits} (pytorch.org/get-started has the line)"
    if cuda is None:
        return make_check(
            "driver",
            "bad" if fits else "note",
            f"NVIDIA {driver}, but torch {torch_version} was not built for CUDA",
            f"install {build}" if fits else "update the driver",
        )
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if oldest is not None and major < oldest:
        return make_check(
            "driver",
            "note" if works else "bad",
            f"NVIDIA {driver}; torch built for CUDA {cuda} asks for {oldest} or later",
            f"update the driver, or install {build}" if fits else "update the driver",
        )
    return make_check("driver", "ok", f"NVIDIA {driver}, enough for CUDA {cuda}")


def check_gpus() -> list[Check]:
    """Two lines for the GPU that is used (what it can do, what of it is free), one where there is none."""
    import torch

    if torch.cuda.is_available():
        try:
            return _gpu_lines()
        except (RuntimeError, AssertionError) as error:
            line = str(error).split("\n")[0]
            return [make_check("gpu", "bad", f"cannot be used: {line}", "see `nvidia-smi`; restart the machine")]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return [make_check("gpu", "note", f"hidden: CUDA_VISIBLE_DEVICES is {hidden!r}", "unset it to use the GPU")]
    if os.path.exists("/proc/driver/nvidia") or driver_version() is not None:
        remedy = "install a CUDA build of torch that fits the driver; see the lines above"
        return [make_check("gpu", "bad", "an NVIDIA driver is there, but torch sees no GPU", remedy)]
    from deepdoctor.model.precision import cpu_matmul_gflops

    speeds = ", ".join(f"{str(d).removeprefix('torch.')} {speed:.0f}" for d, speed in cpu_matmul_gflops().items())
    found = f"none; CPU products run at {speeds} GFLOP/s on {torch.get_num_threads()} threads"
    return [make_check("gpu", "note", found, "fine for the demo; an 8B model needs a GPU")]


def _gpu_lines() -> list[Check]:
    import torch

    name, capability = torch.cuda.get_device_properties(0).name, torch.cuda.get_device_capability(0)
    free, total = torch.cuda.mem_get_info(0)
    found = f"{name}, {total / GIB:.0f} GiB, {abilities(capability)}"
    others = torch.cuda.device_count() - 1
    if others:
        found += f"; {others} more {'is' if others == 1 else 'are'} visible"
    if torch.version.hip is not None:
        gpu = make_check("gpu", "note", found, "AMD GPUs were not tried: expect faults")
    elif capability < OLDEST_CAPABILITY:
        gpu = make_check("gpu", "bad", found, "take a T4 or newer (on Kaggle `GPU T4 x2`, not P100), or the CPU")
    elif not built_for(capability, torch.cuda.get_arch_list()):
        has = " ".join(torch.cuda.get_arch_list())
        gpu = make_check("gpu", "bad", f"{found}; torch has no code for it ({has})", "install a newer build of torch")
    else:
        gpu = make_check("gpu", "ok", found)
    free_text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    busy = total - free > BUSY_SHARE * total
    remedy = "end what else uses it (`nvidia-smi` lists it); the plan takes what is free" if busy else None
    return [gpu, make_check("gpu memory", "note" if busy else "ok", free_text, remedy), *_check_compiler()]


def abilities(capability: tuple[int, int]) -> str:
    """What a compute capability means for a run, in words."""
    from deepdoctor.kernels.fp8 import CAPABILITY as FIRST_FP8

    if capability >= (8, 0):
        words = "bf16, flash attention, " + ("fp8" if capability >= FIRST_FP8 else "no fp8")
    else:
        words = "no bf16 (fp16 with loss scaling), no flash attention, no fp8"
    return f"capability {capability[0]}.{capability[1]}: {words}"


def built_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether torch's binaries run: code of the same major version and no later minor one, or PTX of any earlier."""
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if not found or (found[4] and (int(found[2]), int(found[3])) != capability):
            continue
        version = (int(found[2]), int(found[3]))
        if version <= capability and (found[1] == "compute" or version[0] == capability[0]):
            return True
    return not architectures


def _check_compiler() -> list[Check]:
    """Triton compiles a launcher for each kernel in C; a line only where something lacks."""
    import importlib.util
    import sysconfig

    if importlib.util.find_spec("triton") is None:
        return [make_check("triton", "bad", "not installed", "pip install triton (CUDA builds of torch bring it)")]
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # as Triton does on Debian
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if compiler and header.is_file():
        return []
    lacks = "no C compiler" if not compiler else f"no {header}"
    return [make_check("triton", "bad", f"{lacks}, which it compiles with", "apt-get install gcc python3-dev")]


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # not there, or "max"


def host_memory() -> tuple[int, int]:
    """Bytes of host memory: all that this process may use, and what of it is free; a container's limit counts."""
    if not hasattr(os, "sysconf"):
        return 0, 0
    total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return total, available
    if found := re.search(r"MemAvailable:\s+(\d+) kB", told):
        available = int(found[1]) * 1024
    for limit_path, used_path, stat in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
        ),
    ):
        limit, used = _number(limit_path), _number(used_path)
        if limit is None or used is None or limit >= total:
            continue
        cache = re.search(r"^(?:total_)?inactive_file (\d+)", _text(stat), re.MULTILINE)
        total, available = limit, min(available, limit - used + (int(cache[1]) if cache else 0))
    return total, max(0, available)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
