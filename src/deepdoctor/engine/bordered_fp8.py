"""A frozen matrix and its adapters as two fp8 copies: the large products at about twice the speed of 16 bits.

As ``engine/bordered.py``, with rows in e4m3 under a scale each (``kernels/fp8.py``). Rows are scaled along the sum of a
product, and forward and backward sum over different sides of W, so there are two copies::

    forward   y  = [x, u] [W, B]^T         rows of W      (O, I + R)
    backward  dx = [dy, v] [W^T, A^T s]^T  columns of W   (I, O + R)

The scales are those of W, so that an update of the adapter writes the border alone; entries of A and B beyond the range
of their row are limited to it. [x, u] and [dy, v] are quantised in the pass that computes u or v, or else as they enter
a product. u, v, dA and dB are taken in 16 bits from the 16-bit rows, and so is the gradient of the masters: rounding
the border is passed straight through. The base itself stays as it is held, since it answers after training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepdoctor.engine.bordered import Block, Bordered, Masters
from deepdoctor.errors import TrainingError
from deepdoctor.kernels.fp8 import (
    E4M3,
    WIDTH_STEP,
    fp8_matmul,
    quantize_rows,
    quantize_rows_lora,
    write_fp8_borders,
)
from deepdoctor.model.decoder import FrozenLinear

__all__ = ["BorderedFp8", "Fp8Rows"]


class Fp8Rows:
    """Memory for the rows of one product, ``tokens`` of up to ``columns``; every product uses it anew."""

    def __init__(self, tokens: int, columns: int, device: torch.device):
        self.values = torch.empty(tokens * columns, dtype=E4M3, device=device)
        self.scales = torch.empty(tokens, 1, device=device)
        # Which rows lie here for which product: addresses of its matrix and of the rows, number and stride of these.
        # No version counter: kernels that write rows do not count, and all buffers of the arena share one.
        self._held: tuple[int, int, int, int] | None = None

    def _room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        return self.values.as_strided((rows, width), (width, 1)), self.scales[:rows]

    def extend(self, x: Tensor, a: Tensor, weight: Tensor) -> None:
        """Fill u = x a in the last columns of x (T, K + R), quantise, and hold that for the next product with weight.

        Until then, x must not change.
        """
        quantize_rows_lora(x, a, *self._room(x))
        self._held = (weight.data_ptr(), x.data_ptr(), x.shape[0], x.stride(0))

    def quantize(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, K) -> e4m3 (T, K) and scales (T, 1) for a product with weight, valid until the next call.

        What ``extend`` holds for just these is used, once.
        """
        held, self._held = self._held, None
        values, scales = self._room(x)
        if held != (weight.data_ptr(), x.data_ptr(), x.shape[0], x.stride(0)):
            quantize_rows(x, values, scales)
        return values, scales


def _quantized(weight: Tensor, border: int) -> tuple[Tensor, Tensor]:
    """weight (O, I) -> e4m3 (O, I + border) with a border of zeros, and scales (1, O)."""
    rows, width = weight.shape
    values = torch.zeros(rows, width + border, dtype=torch.uint8, device=weight.device).view(E4M3)
    scales = torch.empty(1, rows, device=weight.device)
    quantize_rows(weight, values[:, :width], scales.view(rows, 1))
    return values, scales


class BorderedFp8(Bordered):
    """A ``Bordered`` whose matrix is always kept, as fp8 copies.

    ``kept``, and so every ``matrix`` below, is the 16-bit sA (R, I), which the thin product with x takes.
    rows: memory for the quantised rows of a product, shared by all matrices. Raises TrainingError for widths that fp8
    products do not take.
    """

    def __init__(
        self,
        linear: FrozenLinear,
        layer: int,
        names: Sequence[str],
        rank: int,
        scale: float,
        masters: Masters,
        *,
        rows: Fp8Rows,
    ):
        super().__init__(linear, layer, names, rank, scale, masters)
        self.rows = rows
        if self.out % WIDTH_STEP or self.inn % WIDTH_STEP or rank % WIDTH_STEP:
            raise TrainingError(
                f"{'/'.join(linear.names)} of layer {layer} is {self.out} x {self.inn}, but fp8 products take "
                f"multiples of {WIDTH_STEP}",
                "set `--model.precision bf16`",
            )

    def keep_matrix(self) -> None:
        """Quantise the base both ways and write the border; the base stays where it is."""
        weight = self.linear.dense()
        self.by_out, self.out_scales = _quantized(weight, self.rank)
        self.by_in, self.in_scales = _quantized(weight.T.contiguous(), self.rank)
        self.b16 = weight.new_zeros(self.out, self.rank)
        self.kept = weight.new_zeros(self.rank, self.inn)
        self.write_adapter(self.kept)

    def drop_matrix(self) -> None:
        """Forget the copies."""
        if self.kept is not None:
            del self.by_out, self.out_scales, self.by_in, self.in_scales, self.b16
        self.kept = None

    def write_adapter(self, matrix: Tensor) -> None:
        """Copy the masters into both borders and the 16-bit A and B."""
        write_fp8_borders(
            self.border,
            a16=matrix,
            b16=self.b16,
            by_out=self.by_out,
            out_scales=self.out_scales,
            by_in=self.by_in,
            in_scales=self.in_scales,
        )

    def write(self, matrix: Tensor) -> Tensor:
        """Raise TrainingError: quantising at each use would take longer than the products."""
        raise TrainingError("fp8 matrices are kept, and cannot be made at each use", "set keep_matrices")

    def a_rows(self, matrix: Tensor) -> Tensor:
        """Return sA (R, I)."""
        return matrix

    def b_block(self, matrix: Tensor, block: Block) -> Tensor:
        """Return one B (O', r) in 16 bits."""
        rows, rank = block.weight.shape
        return self.b16[block.start : block.start + rows, block.rank_at : block.rank_at + rank]

    def extend(self, x: Tensor, matrix: Tensor) -> None:
        """Fill u in the last R columns of x (T, I + R), and quantise x for ``forward``."""
        if self.rank:
            self.rows.extend(x, matrix.T, self.by_out)

    def forward(self, x: Tensor, matrix: Tensor, out: Tensor) -> None:
        """out (T, O) = [x, u] [W, B]^T, plus the bias; x (T, I + R)."""
        fp8_matmul(*self.rows.quantize(x, self.by_out), self.by_out, self.out_scales, out)
        if self.linear.bias is not None:
            out.add_(self.linear.bias)

    def extend_gradient(self, dy: Tensor, matrix: Tensor) -> None:
        """Fill v = dy B in columns O to O + R of dy, and quantise up to there for ``input_gradient``."""
        if self.rank:
            self.rows.extend(dy[:, : self.out + self.rank], self.b16, self.by_in)

    def input_gradient(self, dy: Tensor, matrix: Tensor, out: Tensor) -> None:
        """out (T, I) = [dy, v] [W^T, A^T s]^T; dy (T, O + R)."""
        fp8_matmul(*self.rows.quantize(dy, self.by_in), self.by_in, self.in_scales, out)
