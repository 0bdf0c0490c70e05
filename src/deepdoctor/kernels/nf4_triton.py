"""NF4 in Triton: the bytes and values of `nf4.py`, bit for bit, in one launch each.

Reading back. Packed bytes are read as 32-bit words. A thread takes one word (8 elements) at a time: neighbouring
threads read neighbouring words, and each writes 8 neighbouring elements, 16 bytes in 16 bits, so that reads and writes
both fill whole sectors. The 16 values are looked up in shared memory, where 16 words never collide. Three kernels:

tiles     weights as published checkpoints have them (double-quantised, blocks of 64) whose size is a multiple of 1024.
          A tile is whole blocks of one nested block and may span rows, so nothing is masked and two of the three parts
          of a scale are the same for the whole tile; per element 6.5 instructions on sm_90, 10.8 by words
words     any blocks and tails: a program writes one tile of one row; a contiguous `out` is a single row of n elements
elements  rows that do not start on a word boundary (columns not a multiple of 8)

Product and sum of a scale are rounded one after the other: the launch turns floating-point contraction off.

Quantising. A program holds whole blocks. The largest magnitude is found on the bit patterns, which are ordered as
the magnitudes are, so that nan, the largest of all, is kept.

Offsets into a weight are int64; inside a tile they are int32.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepdoctor.kernels.nf4 import NESTED_BLOCK_SIZE, NF4_CODE, TINY_ABSMAX, NF4Weight

__all__ = [
    "WARPS",
    "Scales",
    "dequantize_nf4_triton",
    "nf4_values",
    "quantize_blocks_triton",
    "tile_elements",
    "write_tile",
]

Scales = Literal["word", "block", "products"]
"""How a tile comes by its scales: decoded per word, or once per block and handed on through shared memory, or handed on
as the 16 products of scale and value, already rounded."""
SCALES: Scales = "block"

WORD_ELEMENTS = 8
BLOCK = 64
NESTED_ELEMENTS = BLOCK * NESTED_BLOCK_SIZE
# 64 elements a thread at the largest; every one of them divides a nested block.
TILES = (8192, 4096, 2048, 1024)
# The largest tile that divides a row wins, or the last: 14336 columns are 7 tiles of 2048, 1536 are two of 1024.
WORD_TILES = (4096, 2048, 1024)
TILE_BY_ELEMENT = 1024
QUANTIZE_TILE = 2048
WARPS = 4


def tile_elements(weight: NF4Weight) -> int | None:
    """Return the elements of a tile for `write_tile`, or None where the weight does not divide into such tiles."""
    published = weight.double_quant and weight.block_size == BLOCK and weight.nested_block_size == NESTED_BLOCK_SIZE
    if not published or weight.packed.data_ptr() % 4 or not weight.packed.is_contiguous():
        return None
    return next((tile for tile in TILES if weight.numel % tile == 0), None)


def dequantize_nf4_triton(weight: NF4Weight, out: Tensor, scales: Scales = SCALES) -> None:
    """Write the values of weight into out: fp32 | bf16 | fp16, of weight.shape, contiguous or a 2-D row view.

    scales: what tiles do; it changes the time, not the values.
    """
    n, size = weight.numel, weight.block_size
    packed = weight.packed.reshape(-1)
    assert packed.numel() == (n + 1) // 2 and weight.absmax.numel() == -(-n // size)
    if n == 0:
        return
    rows, columns, stride = (1, n, n) if out.is_contiguous() else (*out.shape, out.stride(0))
    nested = weight.absmax if weight.nested_absmax is None else weight.nested_absmax
    code = weight.nested_code if weight.nested_code is not None else nested
    offset = weight.nested_offset if weight.nested_offset is not None else nested
    pointers = (weight.absmax, code, nested, offset, nf4_values(out.device), out)
    tile = tile_elements(weight)
    if tile and packed.storage_offset() % 4 == 0 and columns % WORD_ELEMENTS == 0 and stride % WORD_ELEMENTS == 0:
        with torch.cuda.device_of(out):
            _dequantize_tiles[(n // tile,)](
                packed.view(torch.int32),
                *pointers,
                # Rows of a contiguous matrix need no telling apart, and one kernel serves all lengths.
                COLUMNS=tile if rows == 1 else columns,
                STRIDE=tile if rows == 1 else stride,
                TILE=tile,
                SCALES=scales,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        return
    whole_words = columns % WORD_ELEMENTS == 0 and size % WORD_ELEMENTS == 0
    by_word = whole_words and packed.storage_offset() % 4 == 0 and packed.data_ptr() % 4 == 0
    with torch.cuda.device_of(out):
        constants = {
            "BLOCK": size,
            "NESTED_BLOCK": weight.nested_block_size,
            "DOUBLE_QUANT": weight.double_quant,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }
        if by_word:
            words = columns // WORD_ELEMENTS
            tile = next((tile for tile in WORD_TILES if columns % tile == 0), WORD_TILES[-1])
            tiles = triton.cdiv(columns, tile)
            unit = WORD_ELEMENTS if stride % WORD_ELEMENTS == 0 else 1
            _dequantize_words[(rows * tiles,)](
                packed.view(torch.int32),
                *pointers,
                words,
                stride // unit,
                tiles,
                UNIT=unit,
                WORDS=tile // WORD_ELEMENTS,
                **constants,
            )
        else:
            tiles = triton.cdiv(columns, TILE_BY_ELEMENT)
            _dequantize_elements[(rows * tiles,)](
                packed, *pointers, columns, stride, tiles, TILE=TILE_BY_ELEMENT, **constants
            )


def quantize_blocks_triton(flat: Tensor, packed: Tensor, absmax: Tensor, block_size: int) -> int:
    """Quantise the whole blocks of flat (n,), contiguous; returns how many elements those are.

    packed (ceil(n/2),) uint8 and absmax (ceil(n/block_size),) fp32 are filled as far. A block that holds nan gets an
    absmax of nan, one that holds infinity an infinite one.
    """
    blocks = flat.numel() // block_size
    if blocks:
        block_rows = max(1, QUANTIZE_TILE // block_size)
        with torch.cuda.device_of(flat):
            _quantize_blocks[(triton.cdiv(blocks, block_rows),)](
                flat,
                _middles(flat.device),
                packed,
                absmax,
                blocks,
                TINY=TINY_ABSMAX,
                BLOCK_ROWS=block_rows,
                BLOCK=block_size,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return blocks * block_size


@functools.cache
def nf4_values(device: torch.device) -> Tensor:
    """The 16 NF4 values on device."""
    return NF4_CODE.to(device)


@functools.cache
def _middles(device: torch.device) -> Tensor:
    return ((NF4_CODE[:-1] + NF4_CODE[1:]) / 2).to(device)


@triton.jit
def write_tile(
    packed,
    absmax,
    code,
    nested,
    offset,
    values,
    out,
    tile,
    at,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Write tile number `tile` of a weight in blocks of 64 where tile number `at` of the matrix `out` lies.

    COLUMNS and STRIDE, elements of a row and from row to row, are multiples of 8; TILE divides 16384.
    """
    WORDS: tl.constexpr = TILE // 8
    BLOCKS: tl.constexpr = TILE // 64
    ROW: tl.constexpr = COLUMNS // 8
    first = tile.to(tl.int64)
    # Declared scattered: the compiler then gives a thread single words, not 16 bytes that it would have to hand on.
    place = tl.max_contiguous(tl.arange(0, WORDS), 1)
    word = tl.load(packed + first * WORDS + place, eviction_policy="evict_first")
    factor = tl.load(nested + tile // (16384 // TILE))
    block = tl.arange(0, BLOCKS)
    if SCALES == "word":
        block = tl.arange(0, WORDS) // 8
    scale = tl.load(code + tl.load(absmax + first * BLOCKS + block).to(tl.int32)) * factor + tl.load(offset)
    # Element 2i is in the high half of byte i, and bytes count from the low end of the word.
    lane = tl.arange(0, 8)
    index = (word[:, None] >> ((lane ^ 1) * 4)[None, :]) & 15
    table = tl.load(values + tl.arange(0, 16))
    if SCALES == "products":
        table = tl.reshape((scale[:, None] * table[None, :]).to(out.dtype.element_ty), [BLOCKS * 16])
        index += (tl.arange(0, WORDS) // 8 * 16)[:, None]
    if SCALES == "block":
        scale = tl.gather(scale, tl.arange(0, WORDS) // 8, 0)
    value = tl.reshape(tl.gather(table, tl.reshape(index, [TILE]), 0), [WORDS, 8])
    if SCALES != "products":
        value = (value * scale[:, None]).to(out.dtype.element_ty)
    # In words: unsigned, so that dividing by a constant is one product.
    start = at.to(tl.uint32) * WORDS
    row = start // ROW
    column = (start - row * ROW).to(tl.int32) + tl.arange(0, WORDS)
    if COLUMNS % TILE != 0:
        column += (column.to(tl.uint32) // ROW).to(tl.int32) * ((STRIDE - COLUMNS) // 8)
    tl.store(out + row.to(tl.int64) * STRIDE + column[:, None] * 8 + lane[None, :], value)


@triton.jit
def _dequantize_tiles(
    packed,
    absmax,
    code,
    nested,
    offset,
    values,
    out,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One tile of TILE elements."""
    at = tl.program_id(0)
    write_tile(packed, absmax, code, nested, offset, values, out, at, at, COLUMNS, STRIDE, TILE, SCALES)


@triton.jit
def _scales(
    absmax,
    code,
    nested,
    offset,
    first,
    place,
    mask,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """fp32 scales of the elements first (int64, scalar) + place (int32, of mask's shape)."""
    start = first // BLOCK
    # Unsigned, so that dividing by a power of two is a shift.
    block = ((first % BLOCK).to(tl.int32) + place).to(tl.uint32) // BLOCK
    if DOUBLE_QUANT:
        value = tl.load(code + tl.load(absmax + start + block, mask=mask, other=0).to(tl.uint32))
        group = ((start % NESTED_BLOCK).to(tl.uint32) + block) // NESTED_BLOCK
        scale = value * tl.load(nested + start // NESTED_BLOCK + group, mask=mask, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + start + block, mask=mask, other=0.0)
    return scale


@triton.jit
def _dequantize_words(
    packed,
    absmax,
    code,
    nested,
    offset,
    values,
    out,
    words,
    stride,
    tiles,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """One tile of WORDS words; a row has `words` of them and starts stride · UNIT elements after the one before."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * WORDS
    left = tl.minimum(words - start, WORDS).to(tl.int32)
    first = row * words + start
    # Declared scattered: the compiler then gives a thread single words, not 16 bytes that it would have to hand on.
    place = tl.max_contiguous(tl.arange(0, WORDS), 1)
    mask = place < left
    word = tl.load(packed + first + place, mask=mask, other=0)
    scale = _scales(absmax, code, nested, offset, first * 8, place * 8, mask, BLOCK, NESTED_BLOCK, DOUBLE_QUANT)
    # Element 2i is in the high half of byte i, and bytes count from the low end of the word.
    lane = tl.arange(0, 8)
    index = (word[:, None] >> ((lane ^ 1) * 4)[None, :]) & 15
    table = tl.load(values + tl.arange(0, 16))
    value = tl.reshape(tl.gather(table, tl.reshape(index, [WORDS * 8]), 0), [WORDS, 8]) * scale[:, None]
    target = out + row * stride * UNIT + start * 8
    column = tl.arange(0, WORDS)
    tl.store(
        target + column[:, None] * 8 + lane[None, :], value.to(out.dtype.element_ty), mask=(column < left)[:, None]
    )


@triton.jit
def _dequantize_elements(
    packed,
    absmax,
    code,
    nested,
    offset,
    values,
    out,
    columns,
    stride,
    tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """One tile of TILE elements, whatever byte or half of a byte a row starts at."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * TILE
    left = tl.minimum(columns - start, TILE).to(tl.int32)
    first = row * columns + start
    place = tl.arange(0, TILE)
    mask = place < left
    half = (first % 2).to(tl.int32) + place
    byte = tl.load(packed + first // 2 + (half >> 1), mask=mask, other=0).to(tl.int32)
    index = tl.where((half & 1) == 1, byte & 15, byte >> 4)
    scale = _scales(absmax, code, nested, offset, first, place, mask, BLOCK, NESTED_BLOCK, DOUBLE_QUANT)
    value = tl.load(values + index) * scale
    tl.store(out + row * stride + start + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_blocks(
    w, middles, packed, absmax, blocks, TINY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Packed bytes and absmax of BLOCK_ROWS blocks."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    mask = row < blocks - first
    column = tl.arange(0, BLOCK)
    value = tl.load(w + first * BLOCK + row[:, None] * BLOCK + column[None, :], mask=mask[:, None], other=0.0)
    value = value.to(tl.float32)
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + first + row, largest, mask=mask)
    inverse = tl.div_rn(tl.full([BLOCK_ROWS], 1.0, tl.float32), tl.maximum(largest, tl.full([1], TINY, tl.float32)))
    scaled = value * inverse[:, None]
    index = tl.zeros([BLOCK_ROWS, BLOCK], tl.int32)
    for k in tl.static_range(15):
        index += (scaled > tl.load(middles + k)).to(tl.int32)
    high, low = tl.split(tl.reshape(index, [BLOCK_ROWS, BLOCK // 2, 2]))
    byte = tl.arange(0, BLOCK // 2)
    target = packed + first * (BLOCK // 2) + row[:, None] * (BLOCK // 2) + byte[None, :]
    tl.store(target, ((high << 4) | low).to(tl.uint8), mask=mask[:, None])
