"""Which implementation of an operation runs: the Triton kernel or the plain PyTorch reference."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError

__all__ = ["Impl", "use_triton"]

log = logging.getLogger(__name__)

Impl = Literal["auto", "triton", "torch"]
"""``auto`` takes Triton for CUDA tensors where the card can, PyTorch otherwise."""


@functools.cache
def _card_can(device: int, dtype: torch.dtype) -> bool:
    if importlib.util.find_spec("triton") is None:
        log.info("triton is not installed: plain PyTorch kernels on the GPU")
        return False
    major, minor = torch.cuda.get_device_capability(device)
    can = (major, minor) >= (8, 0) or ((major, minor) >= (7, 5) and dtype != torch.bfloat16)
    log.info("%s on compute capability %d.%d: %s kernels", dtype, major, minor, "Triton" if can else "plain PyTorch")
    return can


def use_triton(impl: Impl, tensor: Tensor) -> bool:
    """Whether the Triton kernel handles ``tensor``.

    impl "triton" on a CPU tensor is for Triton's interpreter (``TRITON_INTERPRET=1``). Raises KernelInputError for an
    unknown name, and for "triton" where it cannot run.
    """
    if impl == "torch":
        return False
    if impl not in ("auto", "triton"):
        raise KernelInputError(f"impl is {impl!r}; expected 'auto', 'triton' or 'torch'")
    if tensor.is_cuda:
        can = _card_can(tensor.get_device(), tensor.dtype)
        if impl == "triton" and not can:
            raise KernelInputError("impl is 'triton', but triton is missing or the card is too old", "use impl='auto'")
        return can
    if impl == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelInputError(f"impl is 'triton', but the tensor is on {tensor.device}", "move it to a CUDA device")
    return impl == "triton"
