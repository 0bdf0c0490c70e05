"""The thin product in Triton: one kernel reads the packed weights, a second adds its partial sums up.

Bytes. A weight costs 4 bits and its block's scale 8/64 (and 32/16384): 0.516 bytes. At 3.35 TB/s, the floor of an
8B model's layer is 4 us for qkv (6144 x 4096), 2.6 us for o, 18 us for gate and up (28672 x 4096), 9 us for down. To
keep 3.35 TB/s busy over some 800 ns of latency, 2.7 MB must be under way, 20 KiB per multiprocessor.

Launch. A program is one warp with 32 rows of W and a stretch of columns, which it walks 64 at a time: 1 KiB of packed
words under way while the 1 KiB before are multiplied. By their registers (95 up to 8 rows of x, 125 up to 16), 21 or 16
warps fit a multiprocessor, so 16 KiB and more are always under way there, twice that while all wait. ``_splits`` cuts
the columns so that up to 14 programs a multiprocessor exist: on 132 of them 1536 for qkv (192 tiles, 8 stretches of 8
blocks), 1664 for o, 1792 for gate and up, 1792 for down. Partial sums are (splits, B, O) fp32, in the cache: written
and read, 1.4 % of the bytes of a layer's W at B = 1, 22 % at 16.

Instructions are scarcer than bytes: at 5 a weight, a multiprocessor that issues 3 a clock reads 2.4 TB/s in all.

- The 16 values are held by the 16 lanes of half a warp, each in one register, and looked up by a shuffle: no address
  to compute, no bank to collide in. (``lookup="load"`` reads them from the cache; the interpreter knows no shuffle.)
- Nothing goes through shared memory but 32 scales. The sum over a block runs in an order in which the thread that
  reads a word is the one whose registers the tensor core takes: of k = 8 word + 2 pair + half, the bits stand in the
  order pair/2, word%2, word/2, pair%2, half. x is read in the same order, which costs nothing.

Product and sum of a scale are rounded one after the other: the launch turns floating-point contraction off.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepdoctor.kernels.nf4 import NESTED_BLOCK_SIZE, NF4Weight
from deepdoctor.kernels.nf4_triton import nf4_values

__all__ = ["ThinLaunch", "ThinTiling", "lora", "takes"]

BLOCK = 64
PROGRAMS = 14
"""Programs per multiprocessor that ``_splits`` aims at."""
MOST_SPLITS = 16
FINISH_COLUMNS = 32
"""Columns of y that a program of the second kernel writes."""
LORA_ROWS, LORA_BLOCK = 4, 2048
"""Rows and columns of x that a program of the thin adapter product takes at once."""


@dataclass(frozen=True)
class ThinTiling:
    """rows: of W in a program; splits: stretches of columns, 0: by the device; ahead: load a block before it is needed,
    for 32 registers more; lookup: how the 16 values are read, None: by the device."""

    rows: int = 32
    splits: int = 0
    ahead: bool = True
    lookup: Literal["shuffle", "load"] | None = None


def takes(parts: Sequence[NF4Weight], dtype: torch.dtype) -> bool:
    """Whether the kernels can read these parts into products of dtype."""
    return dtype in (torch.bfloat16, torch.float16) and all(
        part.double_quant
        and part.block_size == BLOCK
        and part.nested_block_size == NESTED_BLOCK_SIZE
        and part.shape[1] % BLOCK == 0
        and 0 < part.numel < 1 << 33
        and part.packed.is_contiguous()
        and part.packed.data_ptr() % 16 == 0
        for part in parts
    )


class ThinLaunch:
    """Both kernels for one matrix; see ``nf4_thin.ThinLinear``. splits: stretches that the columns are cut into.

    What is read has a fixed address, so the addresses stand in a table on the device. Table, int64: address of the
    16 NF4 values; of each part the addresses of packed bytes, absmax, nested absmax, nested offset and nested code, its
    first tile, its rows and its first row.
    """

    def __init__(
        self, parts: Sequence[NF4Weight], bias: Tensor | None, lora: Tensor | None, tiling: ThinTiling | None = None
    ):
        tiling = tiling or ThinTiling()
        device = parts[0].packed.device
        out_features, in_features = sum(part.shape[0] for part in parts), parts[0].shape[1]
        self._held: list[Tensor] = []
        table = [self._address(nf4_values(device))]
        tiles = start = 0
        for part in parts:
            for tensor in (part.packed, part.absmax, part.nested_absmax, part.nested_offset, part.nested_code):
                assert tensor is not None
                table.append(self._address(tensor))
            table += [tiles, part.shape[0], start]
            tiles += triton.cdiv(part.shape[0], tiling.rows)
            start += part.shape[0]
        blocks = in_features // BLOCK
        per_split = triton.cdiv(blocks, tiling.splits or _splits(tiles, blocks, device))
        self.splits = triton.cdiv(blocks, per_split)
        self._table = torch.tensor(table, dtype=torch.int64, device=device)
        self._lora, self._rank = lora, 0 if lora is None else lora.shape[1]
        self._bias = bias
        self._product = _thin[(tiles, self.splits)]
        self._finish = _finish[(triton.cdiv(out_features, FINISH_COLUMNS),)]
        self._product_constants: dict[str, Any] = {
            "COLUMNS": in_features,
            "OUT": out_features,
            "PARTS": len(parts),
            "PER_SPLIT": per_split,
            "ROWS": tiling.rows,
            "AHEAD": tiling.ahead,
            "LOOKUP": tiling.lookup or ("shuffle" if device.type == "cuda" else "load"),
            "num_warps": 1,
            "num_stages": 1,
            "enable_fp_fusion": False,
        }
        self._finish_constants: dict[str, Any] = {
            "OUT": out_features,
            "SPLITS": self.splits,
            "BIAS": bias is not None,
            "RANKS": max(16, triton.next_power_of_2(self._rank)),
            "COLUMNS": FINISH_COLUMNS,
            "num_warps": 4,
        }

    def _address(self, tensor: Tensor) -> int:
        """Return where tensor lies, and hold it."""
        assert tensor.is_contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def __call__(self, x: Tensor, out: Tensor, u: Tensor | None, scratch: Tensor) -> None:
        """Write y into out; scratch holds ``splits`` · B · O fp32."""
        rows = x.shape[0]
        # The tensor core takes 8 rows of x at a time.
        batch = 8 if rows <= 8 else 16 if rows <= 16 else 32
        with torch.cuda.device_of(x):
            self._product(x, scratch, self._table, x.stride(0), rows, BATCH=batch, **self._product_constants)
            self._finish(
                scratch,
                scratch if self._bias is None else self._bias,
                scratch if u is None else u,
                scratch if u is None else self._lora,
                out,
                out.stride(0),
                rows,
                BATCH=max(16, batch),
                RANK=0 if u is None else self._rank,
                **self._finish_constants,
            )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(tiles: int, blocks: int, device: torch.device) -> int:
    """Stretches of columns: as many as fill the device, at least four blocks each."""
    wanted = PROGRAMS * _multiprocessors(device) // tiles
    return max(1, min(wanted, blocks // 4, MOST_SPLITS))


def lora(x: Tensor, a: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """Write (x a^T) * mask into out, one program per row of ``a`` and LORA_ROWS rows of x."""
    rows, rank = out.shape
    with torch.cuda.device_of(x):
        _lora[(rank, triton.cdiv(rows, LORA_ROWS))](
            x, a, x if mask is None else mask, out, x.stride(0), rows, rank, MASK=mask is not None, COLUMNS=x.shape[1],
            ROWS=LORA_ROWS, BLOCK=LORA_BLOCK, num_warps=8,
        )  # fmt: skip


@triton.jit
def _own_value(values):
    """The value that this lane holds for all: number lane % 16. A scalar to the compiler, another one in each lane."""
    return tl.inline_asm_elementwise(
        "{ .reg .u32 lane; .reg .u64 from; mov.u32 lane, %laneid; and.b32 lane, lane, 15; "
        "mad.wide.u32 from, lane, 4, $1; ld.global.nc.f32 $0, [from]; }",
        "=f,l",
        [values],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _weights(word, values, scale, SHIFT: tl.constexpr, LOOKUP: tl.constexpr):
    """Elements SHIFT / 4 of the words, fp32."""
    if LOOKUP == "shuffle":
        # Within each half of the warp, from the lane that the lower four bits name.
        value = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x100f, 0xffffffff;",
            "=f,f,r",
            [values, word >> SHIFT],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        value = tl.load(values + ((word >> SHIFT) & 15))
    return value * scale


@triton.jit
def _half(word, values, scale, SHIFT: tl.constexpr, LOOKUP: tl.constexpr):
    """Every second element of the words: (ROWS, 8 words, pair / 2, pair % 2)."""
    even = tl.join(_weights(word, values, scale, SHIFT, LOOKUP), _weights(word, values, scale, SHIFT + 16, LOOKUP))
    odd = tl.join(_weights(word, values, scale, SHIFT + 8, LOOKUP), _weights(word, values, scale, SHIFT + 24, LOOKUP))
    return tl.join(even, odd)


@triton.jit
def _more(step, block, PER_SPLIT: tl.constexpr, BLOCKS: tl.constexpr):
    """Whether a block follows in this stretch."""
    return (step + 1 < PER_SPLIT) & (block + 1 < BLOCKS)


@triton.jit(do_not_specialize=["rows"])
def _thin(
    x, partials, table, x_stride, rows, COLUMNS: tl.constexpr, OUT: tl.constexpr, PARTS: tl.constexpr,
    PER_SPLIT: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, AHEAD: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """ROWS rows of W times PER_SPLIT blocks of all rows of x."""
    BLOCKS: tl.constexpr = COLUMNS // 64
    tile = tl.program_id(0)
    part = 0
    for other in tl.static_range(1, PARTS):
        part += (tile >= tl.load(table + 1 + 8 * other + 5).to(tl.int32)).to(tl.int32)
    entry = table + 1 + 8 * part
    packed = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
    absmax = tl.load(entry + 1).to(tl.pointer_type(tl.uint8))
    nested = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    offset = tl.load(tl.load(entry + 3).to(tl.pointer_type(tl.float32)))
    code = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    first = (tile - tl.load(entry + 5).to(tl.int32)) * ROWS
    height = tl.load(entry + 6).to(tl.int32)
    if LOOKUP == "shuffle":
        values = _own_value(tl.load(table))
    else:
        values = tl.load(table).to(tl.pointer_type(tl.float32))
    begin = tl.program_id(1) * PER_SPLIT
    # Rows past the end repeat the last one and are not stored.
    row = tl.minimum(first + tl.arange(0, ROWS), height - 1)
    # Two words a thread, so that four threads hold a row as the tensor core wants it.
    words = packed + row[:, None] * (COLUMNS // 8) + tl.max_contiguous(tl.arange(0, 8), 2)[None, :]
    # The even words of a block; the odd ones follow at a distance of eight.
    column = tl.arange(0, 32)
    column = tl.max_contiguous(tl.multiple_of(column // 8 * 16 + column % 8, 8), 8)
    batch = tl.arange(0, BATCH)
    columns = x + batch[:, None] * x_stride + column[None, :]
    there = (batch < rows)[:, None]
    acc = tl.zeros((ROWS, BATCH), tl.float32)
    # Codes and factors come a block ahead: a scale takes one load after another. The loop also keeps their 8 bits out
    # of the compiler's choice of a layout for the product.
    number = row * BLOCKS
    codes = tl.load(absmax + number + begin)
    factor = tl.load(nested + (number + begin) // 256)
    if AHEAD:
        coming = tl.load(words + begin * 8)
    for step in range(PER_SPLIT):
        block = begin + step
        here = there
        if BLOCKS % PER_SPLIT != 0:
            # Past the end x counts as zeros, whatever the weights are read as.
            here = there & (block < BLOCKS)
        even = tl.load(columns + block * 64, mask=here, other=0.0)
        odd = tl.load(columns + block * 64 + 8, mask=here, other=0.0)
        more = _more(step, block, PER_SPLIT, BLOCKS)
        scale = (tl.load(code + codes.to(tl.int32)) * factor + offset)[:, None]
        if AHEAD:
            word = coming
            coming = tl.load(words + (block + 1) * 8, mask=more, other=0)
        elif BLOCKS % PER_SPLIT != 0:
            word = tl.load(words + block * 8, mask=block < BLOCKS, other=0)
        else:
            word = tl.load(words + block * 8)
        codes = tl.load(absmax + number + block + 1, mask=more, other=0)
        factor = tl.load(nested + (number + block + 1) // 256, mask=more, other=0.0)
        # Element 2i is in the high half of byte i, and bytes count from the low end of the word.
        w = tl.join(_half(word, values, scale, 4, LOOKUP), _half(word, values, scale, 0, LOOKUP))
        # (row, word / 2, word % 2, pair / 2, pair % 2, half)
        w = tl.permute(tl.reshape(w, [ROWS, 4, 2, 2, 2, 2]), (0, 3, 2, 1, 4, 5))
        w = tl.reshape(w, [ROWS, 64]).to(x.dtype.element_ty)
        # (batch, word / 2, pair / 2, pair % 2, half, word % 2)
        rhs = tl.permute(tl.reshape(tl.join(even, odd), [BATCH, 4, 2, 2, 2, 2]), (0, 2, 5, 1, 3, 4))
        acc = tl.dot(w, tl.trans(tl.reshape(rhs, [BATCH, 64])), acc)
    at = first + tl.arange(0, ROWS)
    to = partials + (tl.program_id(1) * rows + batch)[None, :] * OUT + tl.load(entry + 7).to(tl.int32) + at[:, None]
    tl.store(to, acc, mask=(batch < rows)[None, :] & (at < height)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _finish(
    partials, bias, u, lora, out, out_stride, rows, OUT: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of y: partial sums in their order, bias, adapter, one rounding."""
    batch = tl.arange(0, BATCH)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (batch < rows) & (column < OUT)[None, :]
    total = tl.zeros((BATCH, COLUMNS), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials + (split * rows + batch) * OUT + column[None, :], mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
    if RANK > 0:
        rank = tl.arange(0, RANKS)
        left = tl.load(u + batch * RANK + rank[None, :], mask=(batch < rows) & (rank < RANK)[None, :], other=0.0)
        inside = (rank < RANK)[:, None] & (column < OUT)[None, :]
        right = tl.load(lora + column[None, :] * RANK + rank[:, None], mask=inside, other=0.0)
        total += tl.dot(left, right)
    tl.store(out + batch * out_stride + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _lora(
    x, a, mask, out, x_stride, rows, rank, MASK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One column of u for ROWS rows."""
    at = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        weight = tl.load(a + at * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total += value.to(tl.float32) * weight[None, :]
    u = tl.sum(total, axis=1)
    if MASK:
        u *= tl.load(mask + row, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * rank + at, u.to(out.dtype.element_ty), mask=there)
