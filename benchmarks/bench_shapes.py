"""The shapes that the kernel benchmark runs at, what an item of it is, and its random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepdoctor.kernels.choose import use_triton

__all__ = ["Bench", "Call", "Item", "Shape"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Widths of the model; see the legend in engine/layout.py."""

    tokens: int = 6144
    hidden: int = 4096
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    wide: int = 14336
    vocab: int = 128256
    rank: int = 16

    @property
    def qkv(self) -> int:
        """Columns of q, k and v."""
        return (self.heads + 2 * self.key_heads) * self.head_dim

    def products(self) -> list[tuple[str, int, int, list[int]]]:
        """Name, output columns, input columns and widths of the adapted blocks of each frozen matrix."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        return [
            ("qkv", self.qkv, self.hidden, [queries, keys, keys]),
            ("o", self.hidden, queries, [self.hidden]),
            ("gate_up", 2 * self.wide, self.hidden, [self.wide, self.wide]),
            ("down", self.hidden, self.wide, [self.hidden]),
        ]


@dataclass(frozen=True)
class Item:
    """One thing to time. make: returns a call with inputs of its own, ``held`` bytes of them."""

    group: str
    name: str
    variant: str
    shape: str
    make: Callable[[], Call]
    held: int
    nbytes: int | None = None
    flop: float | None = None


class Bench:
    """Makes the items; ``device`` and ``dtype`` are those of every input."""

    def __init__(self, shape: Shape, device: str, quick: bool):
        self.shape = shape
        self.device = device
        self.dtype = torch.bfloat16
        self.quick = quick

    def random(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values."""
        return torch.randn(*size, device=self.device, dtype=dtype or self.dtype)

    def impls(self) -> tuple[str, ...]:
        """What can run here."""
        return ("torch", "triton") if use_triton("auto", self.random(1)) else ("torch",)

    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin, (T, H/2) fp32."""
        angles = torch.rand(self.shape.tokens, self.shape.head_dim // 2, device=self.device)
        return angles.cos(), angles.sin()
