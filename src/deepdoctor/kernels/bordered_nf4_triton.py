"""The bordered matrix in Triton: one launch, whatever the number of parts and adapters.

A program writes a piece of a row of sA, some rows of B, or one tile of W (``nf4_triton.write_tile``). All that is read
has a fixed address as long as an engine lives, so the addresses stand in a small table on the device: the host passes
that table and the matrix, not a pointer for each of up to 20 tensors, and parts need not be copied together.

Table, int64: address of A, of the 16 NF4 values; of each B the address, first row and row behind the last; of each part
of W the addresses of packed bytes, absmax, nested absmax, nested offset and nested code, and its first tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepdoctor.kernels.bordered_nf4 import Border
from deepdoctor.kernels.nf4 import NF4Weight
from deepdoctor.kernels.nf4_triton import SCALES, WARPS, Scales, nf4_values, tile_elements, write_tile

__all__ = ["BorderedLaunch"]

PIECE = 2048
"""Elements of a row of sA that a program writes."""
PATCH = 1024
"""Elements of B that a program writes, all columns of some rows; more would take registers from the tiles of W."""


class BorderedLaunch:
    """Fills matrices (O + R, I + R), contiguous, of any one dtype; see ``bordered_nf4.bordered_launch``.

    base: whether ``write`` can write W too.
    """

    def __init__(
        self,
        parts: Sequence[NF4Weight | Tensor] | None,
        border: Border,
        device: torch.device,
        scales: Scales = SCALES,
    ):
        rank = border.blocks[0].weight.shape[1] if border.blocks else 1
        used = 0 if border.a is None else border.a.shape[0]
        self.shape = (border.out + border.rank, border.inn + border.rank)
        quantised = [part for part in parts or () if isinstance(part, NF4Weight)]
        tile = _tile(quantised) if parts and len(quantised) == len(parts) else None
        self.base = tile is not None and border.inn % 8 == 0 and border.rank % 8 == 0
        self._held: list[Tensor] = []
        table = [0 if border.a is None else self._address(border.a), self._address(nf4_values(device))]
        for block in border.blocks:
            table += [self._address(block.weight), block.start, block.start + block.weight.shape[0]]
        tiles = 0
        if self.base:
            assert tile is not None
            for part in quantised:
                for tensor in (part.packed, part.absmax, part.nested_absmax, part.nested_offset, part.nested_code):
                    assert tensor is not None
                    table.append(self._address(tensor))
                table.append(tiles)
                tiles += part.numel // tile
        columns = triton.next_power_of_2(max(border.rank, 1))
        rows = max(1, PATCH // columns)
        pieces = border.rank * triton.cdiv(self.shape[1], PIECE)
        patches = triton.cdiv(border.out, rows) if border.rank else 0
        self._arguments = (torch.tensor(table, dtype=torch.int64, device=device), float(border.scale))
        self._constants = {
            "OUT": border.out,
            "COLUMNS": border.inn,
            "RANKS": border.rank,
            "USED": used,
            "RANK": rank,
            "BLOCKS": len(border.blocks),
            "PIECES": pieces,
            "PIECE": PIECE,
            "PATCH_ROWS": rows,
            "PATCH_COLUMNS": columns,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }
        self._border = _write_border[(pieces + patches,)] if border.rank else None
        self._whole = _write_bordered[(pieces + patches + tiles,)] if self.base else None
        self._tiles = {
            **self._constants,
            "BORDER": pieces + patches,
            "PARTS": len(quantised),
            "TILE": tile or 0,
            "SCALES": scales,
        }

    def _address(self, tensor: Tensor) -> int:
        """Return where tensor lies, and hold it."""
        assert tensor.is_contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def write(self, matrix: Tensor) -> None:
        """Fill matrix; only where ``base``."""
        assert self._whole is not None and matrix.shape == self.shape and matrix.is_contiguous()
        with torch.cuda.device_of(matrix):
            self._whole(matrix, *self._arguments, **self._tiles)

    def write_border(self, matrix: Tensor) -> None:
        """Fill all but W."""
        assert matrix.shape == self.shape and matrix.is_contiguous()
        if self._border is not None:
            with torch.cuda.device_of(matrix):
                self._border(matrix, *self._arguments, **self._constants)


def _tile(parts: Sequence[NF4Weight]) -> int | None:
    """Return the largest tile that all parts divide into."""
    found = [tile_elements(part) for part in parts]
    sizes = [size for size in found if size is not None]
    # Tiles are powers of two, so that the greatest common divisor is the smallest.
    return reduce(gcd, sizes) if len(sizes) == len(found) else None


@triton.jit
def _write_a(
    out,
    table,
    scale,
    program,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    USED: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """A piece of a row of sA, or of the zeros below it."""
    row = program // (PIECES // RANKS)
    column = program % (PIECES // RANKS) * PIECE + tl.arange(0, PIECE)
    a = tl.load(table).to(tl.pointer_type(tl.float32))
    value = tl.load(a + row * COLUMNS + column, mask=(column < COLUMNS) & (row < USED), other=0.0) * scale
    target = out + (row + OUT).to(tl.int64) * (COLUMNS + RANKS) + column
    tl.store(target, value.to(out.dtype.element_ty), mask=column < COLUMNS + RANKS)


@triton.jit
def _write_b(
    out,
    table,
    patch,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    PATCH_COLUMNS: tl.constexpr,
):
    """PATCH_ROWS rows of B, all columns."""
    row = patch * PATCH_ROWS + tl.arange(0, PATCH_ROWS)[:, None]
    column = tl.arange(0, PATCH_COLUMNS)[None, :]
    value = tl.zeros([PATCH_ROWS, PATCH_COLUMNS], tl.float32)
    for number in tl.static_range(BLOCKS):
        entry = table + 2 + 3 * number
        b = tl.load(entry).to(tl.pointer_type(tl.float32))
        start = tl.load(entry + 1).to(tl.int32)
        at = column - number * RANK
        inside = (row >= start) & (row < tl.load(entry + 2).to(tl.int32)) & (at >= 0) & (at < RANK)
        value = tl.where(inside, tl.load(b + (row - start) * RANK + at, mask=inside, other=0.0), value)
    target = out + row.to(tl.int64) * (COLUMNS + RANKS) + COLUMNS + column
    tl.store(target, value.to(out.dtype.element_ty), mask=(row < OUT) & (column < RANKS))


@triton.jit
def _write_border(
    out,
    table,
    scale,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    USED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    PATCH_COLUMNS: tl.constexpr,
):
    """PIECES programs for A, the rest for B."""
    program = tl.program_id(0)
    if program < PIECES:
        _write_a(out, table, scale, program, OUT, COLUMNS, RANKS, USED, PIECES, PIECE)
    else:
        _write_b(out, table, program - PIECES, OUT, COLUMNS, RANKS, RANK, BLOCKS, PATCH_ROWS, PATCH_COLUMNS)


@triton.jit
def _write_bordered(
    out,
    table,
    scale,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    USED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    PATCH_COLUMNS: tl.constexpr,
    BORDER: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """BORDER programs for the border, as ``_write_border``, then one for each tile of W."""
    program = tl.program_id(0)
    if program < BORDER:
        if RANKS > 0:
            _write_border(
                out,
                table,
                scale,
                OUT,
                COLUMNS,
                RANKS,
                USED,
                RANK,
                BLOCKS,
                PIECES,
                PIECE,
                PATCH_ROWS,
                PATCH_COLUMNS,
            )
    else:
        at = program - BORDER
        first = table + 2 + 3 * BLOCKS
        part = 0
        for other in tl.static_range(1, PARTS):
            part += (at >= tl.load(first + 6 * other + 5).to(tl.int32)).to(tl.int32)
        entry = first + 6 * part
        write_tile(
            tl.load(entry).to(tl.pointer_type(tl.int32)),
            tl.load(entry + 1).to(tl.pointer_type(tl.uint8)),
            tl.load(entry + 4).to(tl.pointer_type(tl.float32)),
            tl.load(entry + 2).to(tl.pointer_type(tl.float32)),
            tl.load(entry + 3).to(tl.pointer_type(tl.float32)),
            tl.load(table + 1).to(tl.pointer_type(tl.float32)),
            out,
            at - tl.load(entry + 5).to(tl.int32),
            at,
            COLUMNS,
            COLUMNS + RANKS,
            TILE,
            SCALES,
        )
