"""An adapter's masters and gradients in one buffer each, so that zeroing, clipping and the update are one call each.

R is the rank, I and O the sides of a projection. The A matrices of projections that share their input lie one after
another, so that they are one (R*, I) matrix without a copy, R* being the sum of their ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import LINEARS

__all__ = ["FlatAdapter", "Piece"]


class Piece(NamedTuple):
    """Where a parameter lies in the buffer. key: its name, e.g. "a.0_q_proj"; start: first element."""

    key: str
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class FlatAdapter:
    """Lays the masters of ``adapter`` into one fp32 buffer, where the adapter is; its parameters become views of it.

    Order: that of ``adapter.parameters()``, but A matrices with a shared input follow one another in projection order.
    parameter  the whole buffer, for the optimizer; ``parameter.grad`` is the whole gradient
    gradient   (n,) fp32; every ``adapter.a[...].grad`` and ``adapter.b[...].grad`` is a view of it, zero at first
    pieces     where each parameter lies, in the order of ``adapter.parameters()``

    Move the adapter to its device before. Gradients are zeroed with ``zero_grad`` of this class: setting a single
    parameter's to None would part it from the buffer.
    """

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        named = dict(adapter.named_parameters())
        order = dict.fromkeys(member for name in named for member in _neighbours(name) if member in named)
        starts, total = {}, 0
        for name in order:
            starts[name] = total
            total += named[name].numel()
        self.pieces = [Piece(name, starts[name], tuple(p.shape)) for name, p in named.items()]
        device = next(iter(named.values())).device
        self.gradient = torch.zeros(total, device=device)
        self.parameter = nn.Parameter(torch.empty(total, device=device))
        self.parameter.grad = self.gradient
        self._views: dict[str, tuple[Tensor, Tensor]] = {}
        self._blocks: dict[tuple[int, tuple[str, ...]], tuple[Tensor, Tensor]] = {}
        for piece in self.pieces:
            weight, gradient = self._cut(piece.start, piece.shape)
            own = named[piece.key]
            weight.copy_(own.detach())
            own.data, own.grad = weight, gradient
            self._views[piece.key] = weight, gradient
        self._starts = starts

    def _cut(self, start: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        end = start + math.prod(shape)
        return self.parameter.data[start:end].view(shape), self.gradient[start:end].view(shape)

    def a_block(self, layer: int, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return weights and gradients, each a view (R*, I), of the A matrices of ``names`` that the adapter has.

        names: projections with a shared input, as in ``FrozenLinear.names``. Raises KeyError where none is adapted.
        """
        at = layer, tuple(names)
        if at not in self._blocks:
            keys = [key for name in names if (key := f"a.{layer}_{name}") in self._views]
            if not keys:
                raise KeyError(f"layer {layer} has no adapter on {', '.join(names)}")
            parts = [self._views[key][0] for key in keys]
            rows, start = sum(len(part) for part in parts), self._starts[keys[0]]
            for key, part in zip(keys, parts, strict=True):
                assert self._starts[key] == start, f"{key} does not follow the A matrices before it"
                start += part.numel()
            self._blocks[at] = self._cut(self._starts[keys[0]], (rows, parts[0].shape[1]))
        return self._blocks[at]

    def b(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """Return weight and gradient, each a view (O, R), of one projection. Raises KeyError where it has none."""
        return self._views[f"b.{layer}_{name}"]

    def zero_grad(self) -> None:
        """Zero the whole gradient in place, and give it back to ``parameter`` where an optimizer took it away."""
        self.gradient.zero_()
        self.parameter.grad = self.gradient


def _neighbours(name: str) -> list[str]:
    """Return the names of the A matrices that share this one's input, itself included; a B stands alone."""
    kind, key = name.split(".")
    layer, projection = key.split("_", 1)
    if kind == "a":
        group = next(names for names in LINEARS if projection in names)
        return [f"a.{layer}_{member}" for member in group]
    return [name]
