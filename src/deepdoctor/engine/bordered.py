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
from typing import Protocol

import torch
from torch import Tensor

from deepdoctor.kernels.nf4 import NF4Weight, dequantize_nf4
from deepdoctor.model.decoder import FrozenLinear

__all__ = ["Bordered", "Masters", "accumulate"]


class Masters(Protocol):
    """Where the fp32 adapter and its gradients lie."""

    def a_block(self, layer: int, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return A matrices of projections that share an input, one (R, I) block, and its gradient."""

    def b(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """Return one B (O, R) and its gradient."""


@dataclass(frozen=True)
class _Block:
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
    memory the caller lends (``write``).
    """

    def __init__(
        self, linear: FrozenLinear, layer: int, names: Sequence[str], rank: int, scale: float, masters: Masters
    ):
        self.linear = linear
        self.rank = rank
        self.scale = scale
        self.out = sum(linear.sizes)
        self.inn = linear.in_features
        present = [name for name in linear.names if name in names]
        self.blocks: list[_Block] = []
        self.a: Tensor | None = None
        at = 0
        if present:
            self.a, self.a_gradient = masters.a_block(layer, present)
            for name in present:
                weight, gradient = masters.b(layer, name)
                start = linear.starts[linear.names.index(name)]
                self.blocks.append(_Block(start, at, weight, gradient))
                at += weight.shape[1]
        self.used = at
        self.kept: Tensor | None = None

    def keep_matrix(self) -> None:
        """Hold the matrix in the compute dtype from now on; a dense base moves in, so that it is not held twice."""
        dtype, device = self.linear.compute_dtype, self.linear.device
        kept = torch.zeros(self.out + self.rank, self.inn + self.rank, dtype=dtype, device=device)
        self._write_base(kept)
        if self.linear.parts is None:
            self.linear.weight = kept[: self.out, : self.inn]
        self.kept = kept
        self.write_adapter(kept)

    def drop_matrix(self) -> None:
        """Forget a kept matrix; a dense base moves out again."""
        if self.kept is not None and self.linear.parts is None:
            self.linear.weight = self.kept[: self.out, : self.inn].contiguous()
        self.kept = None

    def _write_base(self, matrix: Tensor) -> None:
        if self.linear.parts is None:
            assert self.linear.weight is not None
            matrix[: self.out, : self.inn] = self.linear.weight
            return
        parts: tuple[NF4Weight | Tensor, ...] = self.linear.parts
        for part, start, size in zip(parts, self.linear.starts, self.linear.sizes, strict=True):
            rows = matrix[start : start + size, : self.inn]
            if isinstance(part, NF4Weight):
                dequantize_nf4(part, matrix.dtype, out=rows)
            else:
                rows.copy_(part)

    def write_adapter(self, matrix: Tensor) -> None:
        """Copy the masters into the border."""
        if self.a is None:
            return
        torch.mul(self.a, self.scale, out=matrix[self.out : self.out + self.used, : self.inn])
        for block in self.blocks:
            ranks = slice(self.inn + block.rank_at, self.inn + block.rank_at + block.weight.shape[1])
            matrix[block.start : block.start + block.weight.shape[0], ranks] = block.weight

    def write(self, matrix: Tensor) -> Tensor:
        """Fill a borrowed (O + R, I + R) matrix and return it."""
        self._write_base(matrix)
        if self.rank:
            matrix[: self.out, self.inn :].zero_()
            matrix[self.out + self.used :].zero_()
            self.write_adapter(matrix)
        return matrix

    def inner(self, x: Tensor, matrix: Tensor, out: Tensor) -> None:
        """out (T, R) = u = x (sA)^T; x (T, I)."""
        if self.rank:
            torch.mm(x, matrix[self.out :, : self.inn].T, out=out)

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
