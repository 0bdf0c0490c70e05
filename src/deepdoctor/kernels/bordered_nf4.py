"""A frozen matrix with its adapters around it, as ``engine/bordered.py`` uses it, filled in one launch.

For W (O, I) whose parts lie below each other, A (U, I), and B_j (O_j, r) beside the rows that projection j has::

    M = [[W, B],        (O + R, I + R), R >= U
         [sA, 0]]

B is block-diagonal: B_j has the columns I + j r to I + (j + 1) r. W comes from NF4 (``nf4.py``) or another place, A and
B are fp32; s A is a product in fp32, and everything is rounded to the matrix's dtype at the end. What no adapter covers
is zero, the corner included.

The PyTorch code below is the reference; ``bordered_nf4_triton.py`` gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.nf4 import NF4Weight, dequantize_nf4

if TYPE_CHECKING:
    from deepdoctor.kernels.bordered_nf4_triton import BorderedLaunch

__all__ = ["Border", "BorderBlock", "bordered_launch", "write_base", "write_border"]


class BorderBlock(Protocol):
    """One B: weight (O_j, r) fp32 lies at row ``start`` and column I + ``rank_at``."""

    @property
    def start(self) -> int:
        """First row."""

    @property
    def rank_at(self) -> int:
        """First column, counted from I."""

    @property
    def weight(self) -> Tensor:
        """The values."""


@dataclass(frozen=True, eq=False)
class Border:
    """What lies around W.

    out, inn  O and I
    rank      R; 0: there is no border
    scale     s
    a         (U, I) fp32, or None where no projection has an adapter
    blocks    the B, by rising start
    """

    out: int
    inn: int
    rank: int
    scale: float
    a: Tensor | None
    blocks: Sequence[BorderBlock]


def write_base(matrix: Tensor, parts: Sequence[NF4Weight | Tensor]) -> None:
    """Write W, whose parts lie below each other, into matrix (O + R, I + R)."""
    start = 0
    for part in parts:
        size, columns = part.shape
        rows = matrix[start : start + size, :columns]
        if isinstance(part, NF4Weight):
            dequantize_nf4(part, matrix.dtype, out=rows)
        else:
            rows.copy_(part)
        start += size


def write_border(matrix: Tensor, border: Border) -> None:
    """Write everything but W into matrix (O + R, I + R)."""
    out, inn = border.out, border.inn
    if not border.rank:
        return
    used = 0 if border.a is None else border.a.shape[0]
    matrix[:out, inn:].zero_()
    matrix[out + used :].zero_()
    if border.a is None:
        return
    matrix[out : out + used, inn:].zero_()
    torch.mul(border.a, border.scale, out=matrix[out : out + used, :inn])
    for block in border.blocks:
        rows, rank = block.weight.shape
        matrix[block.start : block.start + rows, inn + block.rank_at : inn + block.rank_at + rank] = block.weight


def bordered_launch(
    parts: Sequence[NF4Weight | Tensor] | None, border: Border, dtype: torch.dtype, impl: Impl = "auto"
) -> BorderedLaunch | None:
    """Prepare the kernel that fills a matrix of dtype in one launch, or return None where the reference is to be used.

    parts    the parts of W, or None where W is dense
    border   its tensors and those of ``parts`` are read at every launch, at the address they have now
    returns  a launch whose ``base`` says whether it writes W too: parts are NF4 in blocks of 64, double-quantised, and
             divide into tiles (``nf4_triton.tile_elements``)
    """
    tensors = [] if border.a is None else [border.a, *(block.weight for block in border.blocks)]
    device = tensors[0].device if tensors else _device(parts)
    if device is None or not use_triton(impl, torch.empty(0, dtype=dtype, device=device)):
        return None
    ranks = {block.weight.shape[1] for block in border.blocks}
    in_order = all(block.rank_at == n * block.weight.shape[1] for n, block in enumerate(border.blocks))
    plain = all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)
    if len(ranks) > 1 or not in_order or not plain:
        return None
    from deepdoctor.kernels.bordered_nf4_triton import BorderedLaunch

    return BorderedLaunch(parts, border, device)


def _device(parts: Sequence[NF4Weight | Tensor] | None) -> torch.device | None:
    if not parts:
        return None
    return parts[0].packed.device if isinstance(parts[0], NF4Weight) else parts[0].device
