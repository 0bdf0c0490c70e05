"""CUDA C++ compiled at run time by NVRTC, which PyTorch's CUDA builds bring along, and launched through the driver.

For the few kernels that need what Triton does not give: shared memory by address, copies whose order stands. Whoever
uses it has another way where NVRTC or the driver cannot be found, as on Windows: see ``why_not``.

Source: the NVRTC manual, and cuLaunchKernelEx in the driver's manual.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepdoctor.errors import KernelInputError

__all__ = ["CudaKernel", "compile_cubin", "why_not"]

log = logging.getLogger(__name__)

MOST_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""
SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


def _folders() -> list[Path]:
    """Where packages of NVIDIA and PyTorch keep their libraries."""
    roots = [Path(torch.__file__).parent.parent, *(Path(entry) for entry in sys.path if entry)]
    found = [folder for root in dict.fromkeys(roots) for folder in sorted(root.glob("nvidia/*/lib"))]
    return [*found, Path(torch.__file__).parent / "lib", Path("/usr/local/cuda/lib64")]


@functools.cache
def _nvrtc() -> Any:
    """The library; OSError where there is none."""
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    for folder in _folders():
        if (folder / name).exists():
            # The library looks for this one by its name alone, which works once it is loaded.
            for builtins in sorted(folder.glob(f"libnvrtc-builtins.so.{major}*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(folder / name))
    return ctypes.CDLL(name)


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def why_not() -> str | None:
    """Why no kernel can be compiled and launched here, or None where one can."""
    try:
        _nvrtc()
        _driver()
    except OSError as error:
        return str(error)
    return None


def compile_cubin(source: str, name: str, architecture: str, defines: dict[str, object]) -> bytes:
    """Return machine code. architecture: "sm_90". Raises KernelInputError with the compiler's words."""
    library, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    options = [f"--gpu-architecture={architecture}", "-std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = library.nvrtcCompileProgram(program, len(options), array)
    if failed:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, text)
        raise KernelInputError(f"{name} for {architecture} with {options[2:]}: {text.value.decode()[:2000]}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


class CudaKernel:
    """One kernel of a cubin, on the device that is current, with ``shared`` bytes of dynamic shared memory."""

    def __init__(self, cubin: bytes, name: str, shared: int):
        module, self._function, self._shared = ctypes.c_void_p(), ctypes.c_void_p(), shared
        self._checked("cuModuleLoadData", ctypes.byref(module), cubin)
        self._checked("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())
        self._checked("cuFuncSetAttribute", self._function, MOST_SHARED, shared)
        self._name = name

    @staticmethod
    def _checked(call: str, *arguments: Any) -> None:
        status = getattr(_driver(), call)(*arguments)
        if status:
            text = ctypes.c_char_p()
            _driver().cuGetErrorString(status, ctypes.byref(text))
            words = (text.value or b"unknown").decode()
            raise KernelInputError(f"{call} fails with {status}: {words}")

    def __call__(self, blocks: int, threads: int, dependent: bool, arguments: Sequence[Any]) -> None:
        """Launch on the current stream. dependent: see ``dependent_triton``. arguments: ctypes values, in order."""
        attribute = _Attribute(SERIALIZATION, 0, 1)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        config = _Config(
            (blocks, 1, 1),
            (threads, 1, 1),
            self._shared,
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute),
            int(dependent),
        )
        self._checked("cuLaunchKernelEx", ctypes.byref(config), self._function, pointers, None)
