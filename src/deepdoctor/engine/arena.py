"""One allocation for a whole micro-batch, handed out as a stack.

Forward pushes what backward will need, layer upon layer, with scratch on top; backward pops in reverse order. So the
most that is ever in use is known before the first kernel runs (``engine/memory.py`` works it out from the same tables),
nothing fragments, and no step allocates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "Arena", "aligned"]

ALIGNMENT = 512
"""Bytes every buffer starts at a multiple of."""


def aligned(nbytes: int) -> int:
    """Round up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """A stack of tensors in one block of ``nbytes`` on ``device``."""

    def __init__(self, nbytes: int, device: torch.device):
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.top = 0
        self.high_water = 0
        """Most bytes ever in use."""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised contiguous tensor on top of the stack."""
        nbytes = math.prod(shape) * dtype.itemsize
        end = self.top + aligned(nbytes)
        if end > self.memory.numel():
            raise MemoryError(f"the arena has {self.memory.numel():,} bytes, {end:,} are needed")
        view = self.memory[self.top : self.top + nbytes].view(dtype).view(shape)
        self.top = end
        self.high_water = max(self.high_water, end)
        return view

    def take_all(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
        """Take every named buffer, in order."""
        return {name: self.take(shape, dtype) for name, shape in shapes.items()}

    def release(self, mark: int) -> None:
        """Give back everything above ``mark``, an earlier value of ``top``."""
        assert mark <= self.top
        self.top = mark
