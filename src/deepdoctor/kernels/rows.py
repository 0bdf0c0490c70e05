"""What kernels over rows have in common: their dtypes, and the layouts they take.

Rows are a matrix (T, X) whose rows are contiguous, with any distance from row to row: a slice of columns of a wider
buffer will do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError

__all__ = ["FLOAT_DTYPES", "as_rows", "check_contiguous", "check_rows", "is_row_view"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_row_view(tensor: Tensor) -> bool:
    """Whether a tensor is a matrix of contiguous rows that do not overlap."""
    return tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]


def as_rows(x: Tensor) -> Tensor:
    """x as (rows, D) with rows that are contiguous; a copy only where its layout cannot be told by one stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_rows(op: str, name: str, tensor: Tensor, shape: torch.Size | tuple[int, ...], like: Tensor) -> None:
    """Refuse a tensor that is not (T, X) rows of ``shape``, contiguous each, in the dtype and on the device of like.

    Raises KernelInputError naming op, argument, what it is and what was expected.
    """
    if tensor.dtype not in FLOAT_DTYPES:
        raise KernelInputError(f"{op}: {name} is {tensor.dtype}, expected bf16, fp16 or fp32")
    if tensor.dim() != 2 or tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device:
        raise KernelInputError(
            f"{op}: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
            f"expected ({', '.join(map(str, shape[:2]))}) {like.dtype} on {like.device}"
        )
    rows, columns = shape
    if (columns > 1 and tensor.stride(1) != 1) or (rows > 1 and tensor.stride(0) < columns):
        raise KernelInputError(
            f"{op}: {name} has strides {tensor.stride()}, expected contiguous rows: (at least {columns}, 1)"
        )


def check_contiguous(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a tensor that is not contiguous, of this shape and dtype, on this device.

    Raises KernelInputError naming op, argument, what it is and what was expected.
    """
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise KernelInputError(
            f"{op}: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}; "
            f"expected a contiguous {tuple(shape)} {dtype} on {device}"
        )
