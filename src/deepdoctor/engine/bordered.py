"""A frozen matrix and its adapters in one buffer, so that LoRA costs no pass over memory of its own.

For W (O, I), A (R, I) and B (O, R), with s = alpha / R folded into A::

    M = [[W, B],        y  = [x, u] M[:O]^T        u = x (sA)^T
         [sA, 0]]       dx = [dy, v] M[:, :I]      v = dy B

Both products accumulate base and adapter in the fp32 of one matrix product, and since the producers of x and dy leave
room for u and v in their rows, nothing is copied. What remains are thin products: u, v, dA = s v^T x and dB = dy^T u.
Several projections share one input: their B lie block-diagonal in the border, their A below each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from deepdoctor.kernels.bordered_nf4 import Border, bordered_launch, write_base, write_border
from deepdoctor.kernels.choose import Impl
from deepdoctor.model.decoder import FrozenLinear

if TYPE_CHECKING:
    from deepdoctor.kernels.bordered_nf4_triton import BorderedLaunch

__all__ = ["Block", "Bordered", "Masters", "accumulate"]


class Masters(Protocol):
    """Where the fp32 adapter and its gradients lie."""

    def a_block(self, layer: int, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return A matrices of projections that share an input, one (R, I) block, and its gradient."""

    def b(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """Return one B (O, R) and its gradient."""


@dataclass(frozen=True)
class Block:
    """One B: weight (O', r) and gradient, fp32, at row ``start`` and column ``rank_at`` of the border."""

    start: int
    rank_at: int
    weight: Tensor
    gradient: Tensor


def accumulate(gradient: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """gradient (n, m) fp32 += scale * left^T right; left (T, n), right (T, m), summed over T in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(gradient, left.T, right, out_dtype=torch.float32, alpha=scale, out=gradient)
    else:
        gradient.addmm_(left.T, right, alpha=scale)


class Bordered:
    """One frozen linear layer of the decoder with the adapters on it.

    rank: padded adapter rows (``LayerShape.ranks``). The matrix is kept (``keep_matrix``) or made anew at each use in
    memory the caller lends (``write``). impl: what writes it, see ``kernels.choose``.
    """

    def __init__(
        self,
        linear: FrozenLinear,
        layer: int,
        names: Sequence[str],
        rank: int,
        scale: float,
        masters: Masters,
        impl: Impl = "auto",
    ):
        self.linear = linear
        self.impl = impl
        self.rank = rank
        self.scale = scale
        self.out = sum(linear.sizes)
        self.inn = linear.in_features
        present = [name for name in linear.names if name in names]
        self.blocks: list[Block] = []
        self.a: Tensor | None = None
        at = 0
        if present:
            self.a, self.a_gradient = masters.a_block(layer, present)
            for name in present:
                weight, gradient = masters.b(layer, name)
                start = linear.starts[linear.names.index(name)]
                self.blocks.append(Block(start, at, weight, gradient))
                at += weight.shape[1]
        self.used = at
        self.kept: Tensor | None = None
        self.border = Border(self.out, self.inn, rank, scale, self.a, self.blocks)

    def keep_matrix(self) -> None:
        """Hold the matrix in the compute dtype from now on; a dense base moves in, so that it is not held twice."""
        dtype, device = self.linear.compute_dtype, self.linear.device
        kept = torch.empty(self.out + self.rank, self.inn + self.rank, dtype=dtype, device=device)
        self.write(kept)
        if self.linear.parts is None:
            self.linear.weight = kept[: self.out, : self.inn]
        self.kept = kept

    def drop_matrix(self) -> None:
        """Forget a kept matrix; a dense base moves out again."""
        if self.kept is not None and self.linear.parts is None:
            self.linear.weight = self.kept[: self.out, : self.inn].contiguous()
        self.kept = None

    @cached_property
    def _launch(self) -> BorderedLaunch | None:
        # At first use: linear's parts must not move from then on.
        return bordered_launch(self.linear.parts, self.border, self.linear.compute_dtype, self.impl)

    def _write_base(self, matrix: Tensor) -> None:
        if self.linear.parts is None:
            assert self.linear.weight is not None
            matrix[: self.out, : self.inn] = self.linear.weight
        else:
            write_base(matrix, self.linear.parts)

    def write_adapter(self, matrix: Tensor) -> None:
        """Copy the masters into the border."""
        if self._launch is not None:
            self._launch.write_border(matrix)
        else:
            write_border(matrix, self.border)

    def write(self, matrix: Tensor) -> Tensor:
        """Fill a borrowed (O + R, I + R) matrix and return it."""
        if self._launch is not None and self._launch.base:
            self._launch.write(matrix)
        else:
            self._write_base(matrix)
            self.write_adapter(matrix)
        return matrix

    def a_rows(self, matrix: Tensor) -> Tensor:
        """Return sA (R, I)."""
        return matrix[self.out :, : self.inn]

    def b_block(self, matrix: Tensor, block: Block) -> Tensor:
        """Return one B (O', r) in the compute dtype."""
        rows, rank = block.weight.shape
        at = self.inn + block.rank_at
        return matrix[block.start : block.start + rows, at : at + rank]

    def inner(self, x: Tensor, matrix: Tensor, out: Tensor) -> None:
        """out (T, R) = u = x (sA)^T; x (T, I)."""
        if self.rank:
            torch.mm(x, self.a_rows(matrix).T, out=out)

    def extend(self, x: Tensor, matrix: Tensor) -> None:
        """Fill u in the last R columns of x (T, I + R)."""
        self.inner(x[:, : self.inn], matrix, x[:, self.inn :])

    def forward(self, x: Tensor, matrix: Tensor, out: Tensor) -> None:
        """out (T, O) = [x, u] M[:O]^T, plus the bias; x (T, I + R)."""
        torch.mm(x, matrix[: self.out].T, out=out)
        if self.linear.bias is not None:
            out.add_(self.linear.bias)

    def extend_gradient(self, dy: Tensor, matrix: Tensor) -> None:
        """Fill v = dy B in the last R columns of dy (T, O + R)."""
        if self.rank:
            torch.mm(dy[:, : self.out], matrix[: self.out, self.inn :], out=dy[:, self.out : self.out + self.rank])

    def input_gradient(self, dy: Tensor, matrix: Tensor, out: Tensor) -> None:
        """out (T, I) = [dy, v] M[:, :I]; dy (T, O + R)."""
        torch.mm(dy, matrix[:, : self.inn], out=out)

    def a_gradients(self, dy: Tensor, x: Tensor) -> None:
        """dA += s v^T x; dy (T, O + R) with v filled, x (T, I)."""
        if self.a is not None:
            accumulate(self.a_gradient, dy[:, self.out : self.out + self.used], x, self.scale)

    def b_gradients(self, dy: Tensor, u: Tensor) -> None:
        """dB += dy^T u, block by block; u (T, R)."""
        for block in self.blocks:
            rows, rank = block.weight.shape
            columns = slice(block.start, block.start + rows)
            accumulate(block.gradient, dy[:, columns], u[:, block.rank_at : block.rank_at + rank], 1.0)
