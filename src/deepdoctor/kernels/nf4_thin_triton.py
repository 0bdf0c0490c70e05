"""The thin product in Triton: one kernel reads the packed weights once and writes y.

Bytes. A weight costs 4 bits and its block's scale 8/64 (and 32/16384): 0.516 bytes. At 3.35 TB/s, the floor of an
8B model's layer is 4 us for qkv (6144 x 4096), 2.6 us for o, 18 us for gate and up (28672 x 4096), 9 us for down. To
keep 3.35 TB/s busy over some 800 ns of latency, 2.7 MB must be under way, 20 KiB per multiprocessor.

Launch. A program is one warp with 16 or 32 rows of W and a stretch of columns, which it walks a span of 256 at a time;
the stretches are such that all programs run at once. What limits it is latency, not instructions: three ways to look
values up, two of them cheaper in instructions, took the same time, and the way the compiler spreads loads over the loop
made the difference. So weights come one or two spans before they are multiplied, codes of scales two and scales one,
and TILINGS are those whose loads come early.

Values. Each of the 16 is rounded to x's dtype, so that the tensor core takes it as it is; the fp32 scale is applied to
the sum over its block, in fp32. That rounds once where dequantising rounds the product of both: for bf16 the mean
error of a weight is 0.14 %, not 0.17 % (tests/kernels/test_nf4_thin.py). Values are put together from bytes by the
permute instruction. The sum over a block runs in an order in which the thread that reads a word is the one whose
registers the tensor core takes: of k = 8 word + 2 pair + half, the bits stand in the order word%2, pair/2, word/2,
pair%2, half. x is read in the same order, which costs nothing.

Stretches. Partial sums are (splits, B, O) fp32, in the cache. The program of a tile that comes last adds them up in the
order of the stretches, whoever it is, so the sum does not depend on who comes first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepdoctor.kernels.dependent_triton import dependent, start_next, wait
from deepdoctor.kernels.nf4 import NF4Weight
from deepdoctor.kernels.nf4_thin import SPAN, code_bits, pair_bits, part_table

__all__ = ["ThinLaunch", "ThinTiling", "lora"]

BATCHES = (8, 16, 32)
"""Rows of x that a kernel is made for: the tensor core takes eight at a time."""
MOST_SPLITS = 16
LORA_ROWS, LORA_BLOCK = 4, 2048
"""Rows and columns of x that a program of the thin adapter product takes at once."""


@dataclass(frozen=True)
class ThinTiling:
    """rows: of W in a program; programs: per multiprocessor, as near as stretches of the columns come to it; ahead:
    spans that weights are loaded ahead, 1 or 2; registers: most of a thread, None: as the compiler likes; splits:
    stretches of the columns, whatever programs says."""

    rows: int = 16
    programs: int = 15
    ahead: int = 2
    registers: int | None = None
    splits: int | None = None


TILINGS = {8: ThinTiling(16, 15, 2, 112), 16: ThinTiling(16, 15, 2, 136), 32: ThinTiling(32, 8, 1, None)}
"""By BATCHES."""


@dataclass(frozen=True)
class _Shape:
    """What is launched for so many rows of x.

    arrived (tiles,) int32: stretches done of each tile, zero between calls.
    """

    launch: Any
    table: Tensor
    arrived: Tensor
    constants: dict[str, Any]


class ThinLaunch:
    """The kernel for one matrix; see ``nf4_thin.ThinLinear``. splits: stretches that the columns are cut into.

    What is read has a fixed address, so the addresses stand in a table on the device. Table, int64: address of the
    values by byte, or in the interpreter by pair; ``part_table``.
    """

    def __init__(
        self,
        parts: Sequence[NF4Weight],
        dtype: torch.dtype,
        bias: Tensor | None,
        lora: Tensor | None,
        tiling: ThinTiling | None = None,
    ):
        device = parts[0].packed.device
        in_features = parts[0].shape[1]
        self._out_features = sum(part.shape[0] for part in parts)
        self._lora, self._bias = lora, bias
        self._rank = 0 if lora is None else lora.shape[1]
        # The interpreter knows no PTX.
        permute = device.type == "cuda"
        self._held = (tuple(parts), (_byte_tables if permute else _pair_table)(device, dtype))
        values = self._held[1].data_ptr()
        self.splits = 1
        self._shapes: dict[int, _Shape] = {}
        for batch in BATCHES:
            chosen = tiling or TILINGS[batch]
            table, tiles = part_table(parts, chosen.rows)
            spans = in_features // SPAN
            wanted = chosen.splits or round(chosen.programs * _multiprocessors(device) / tiles)
            per_split = triton.cdiv(spans, max(1, min(wanted, spans, MOST_SPLITS)))
            splits = triton.cdiv(spans, per_split)
            self.splits = max(self.splits, splits)
            constants = {
                "COLUMNS": in_features,
                "OUT": self._out_features,
                "PARTS": len(parts),
                "PER_SPLIT": per_split,
                "SPLITS": splits,
                "ROWS": chosen.rows,
                "BATCH": batch,
                "AHEAD": chosen.ahead,
                "PERMUTE": permute,
                "BIAS": bias is not None,
                "RANKS": max(16, triton.next_power_of_2(self._rank)),
                "num_warps": 1,
                "num_stages": 1,
                # Without tensor cores many more registers are needed.
                "maxnreg": chosen.registers if _has_products(device) else None,
                **dependent(device),
            }
            self._shapes[batch] = _Shape(
                _thin[(tiles, splits)],
                torch.tensor([values, *table], dtype=torch.int64, device=device),
                torch.zeros(tiles, dtype=torch.int32, device=device),
                constants,
            )

    def scratch_elements(self, rows: int) -> int:
        """Return how many fp32 elements the partial sums take."""
        return self.splits * rows * self._out_features

    def __call__(self, x: Tensor, out: Tensor, u: Tensor | None, scratch: Tensor) -> None:
        """Write y into out."""
        rows = x.shape[0]
        shape = self._shapes[next(batch for batch in BATCHES if batch >= rows)]
        with torch.cuda.device_of(x):
            shape.launch(
                x,
                out,
                scratch,
                shape.arrived,
                shape.table,
                scratch if self._bias is None else self._bias,
                scratch if u is None else u,
                scratch if u is None else self._lora,
                x.stride(0),
                out.stride(0),
                rows,
                RANK=0 if u is None else self._rank,
                **shape.constants,
            )


@functools.cache
def _pair_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    return pair_bits(dtype).to(device)


@functools.cache
def _byte_tables(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The low bytes of the 16 values, four to a number, then the high bytes: (32, 8) int32, equal rows."""
    bits = torch.tensor(code_bits(dtype))
    return torch.cat([bits & 255, bits >> 8]).to(torch.uint8).view(torch.int32).repeat(32, 1).to(device)


def _permutes() -> str:
    """PTX that turns the word $4 and the byte tables $5 to $12 into the four pairs $0 to $3.

    A permute reads four bytes out of eight by three bits each. Both halves of a table are read for all elements of a
    word, four at a time, and the fourth bit, spread over a byte by the permute's sign mode, chooses.
    """
    lines = [
        ".reg .b32 index, even, fourth, left, right, low, high;",
        "and.b32 index, $4, 0x77777777;",
        "shl.b32 even, $4, 4;",
    ]
    # Bit 3 of elements 0 and 2 of a half is the sign of a byte of ``even``, that of 1 and 3 of a byte of the word.
    for signs, first, second in ((0xD9C8, 0, 1), (0xFBEA, 2, 3)):
        lines.append(f"prmt.b32 fourth, even, $4, {signs:#x};")
        for table, into in ((5, "low"), (9, "high")):
            lines += [
                f"prmt.b32 left, ${table}, ${table + 1}, index;",
                f"prmt.b32 right, ${table + 2}, ${table + 3}, index;",
                f"lop3.b32 {into}, fourth, right, left, 0xCA;",
            ]
        # Element 2i is in the high half of byte i.
        lines += [f"prmt.b32 ${first}, low, high, 0x4051;", f"prmt.b32 ${second}, low, high, 0x6273;"]
        lines.append("shr.u32 index, index, 16;")
    return "{ " + " ".join(lines) + " }"


PERMUTES = tl.constexpr(_permutes())


@functools.cache
def _has_products(device: torch.device) -> bool:
    """Whether Triton uses the tensor cores."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def lora(x: Tensor, a: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """Write (x a^T) * mask into out, one program per row of ``a`` and LORA_ROWS rows of x."""
    rows, rank = out.shape
    with torch.cuda.device_of(x):
        _lora[(rank, triton.cdiv(rows, LORA_ROWS))](
            x, a, x if mask is None else mask, out, x.stride(0), rows, rank, MASK=mask is not None, COLUMNS=x.shape[1],
            ROWS=LORA_ROWS, BLOCK=LORA_BLOCK, num_warps=8, **dependent(x.device),
        )  # fmt: skip


@triton.jit
def _own_tables(tables):
    """The byte tables in eight registers. Each lane reads a row of its own: of numbers that it knows to be the same in
    all lanes the compiler makes scalars, which a permute cannot take."""
    return tl.inline_asm_elementwise(
        "{ .reg .u32 lane; .reg .u64 from; mov.u32 lane, %laneid; mad.wide.u32 from, lane, 32, $8; "
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [from]; ld.global.nc.v4.b32 {$4, $5, $6, $7}, [from+16]; }",
        "=r,=r,=r,=r,=r,=r,=r,=r,l",
        [tables],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _pairs(word, tables, PERMUTE: tl.constexpr):
    """The four pairs of values in a word, each two 16-bit numbers in 32 bits, the first element in the low half."""
    if not PERMUTE:
        first = tl.load(tables + (word & 255))
        second = tl.load(tables + ((word >> 8) & 255))
        third = tl.load(tables + ((word >> 16) & 255))
        fourth = tl.load(tables + ((word >> 24) & 255))
    else:
        l0, l1, l2, l3, h0, h1, h2, h3 = tables
        first, second, third, fourth = tl.inline_asm_elementwise(
            PERMUTES,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [word, l0, l1, l2, l3, h0, h1, h2, h3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return first, second, third, fourth


@triton.jit
def _multiplied(
    word, x, there, tables, scale, acc, ROWS: tl.constexpr, BATCH: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """acc (ROWS, BATCH) with the products of a block: word (ROWS, 8), scale (ROWS,), x pointers (BATCH, 32) to the even
    words of its columns."""
    dtype: tl.constexpr = x.dtype.element_ty
    even = tl.load(x, mask=there, other=0.0)
    odd = tl.load(x + 8, mask=there, other=0.0)
    first, second, third, fourth = _pairs(word, tables, PERMUTE)
    pair = tl.join(tl.join(first, second), tl.join(third, fourth))
    low = (pair & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    # (row, word / 2, word % 2, pair % 2, pair / 2, half)
    w = tl.permute(tl.reshape(tl.join(low, high), [ROWS, 4, 2, 2, 2, 2]), (0, 2, 4, 1, 3, 5))
    # (batch, word / 2, pair / 2, pair % 2, half, word % 2)
    rhs = tl.permute(tl.reshape(tl.join(even, odd), [BATCH, 4, 2, 2, 2, 2]), (0, 5, 2, 1, 3, 4))
    return acc + tl.dot(tl.reshape(w, [ROWS, 64]), tl.trans(tl.reshape(rhs, [BATCH, 64]))) * scale[:, None]


@triton.jit
def _scales(codes, code, factor, offset):
    """Scales (ROWS,) of the four blocks whose codes are in a word."""
    s0 = tl.load(code + (codes & 255)) * factor + offset
    s1 = tl.load(code + ((codes >> 8) & 255)) * factor + offset
    s2 = tl.load(code + ((codes >> 16) & 255)) * factor + offset
    s3 = tl.load(code + ((codes >> 24) & 255)) * factor + offset
    return s0, s1, s2, s3


@triton.jit
def _span(words, there):
    """The words of four blocks, (ROWS, 8) each."""
    w0 = tl.load(words, mask=there, other=0)
    w1 = tl.load(words + 8, mask=there, other=0)
    w2 = tl.load(words + 16, mask=there, other=0)
    w3 = tl.load(words + 24, mask=there, other=0)
    return w0, w1, w2, w3


@triton.jit(do_not_specialize=["rows"])
def _thin(
    x, out, partials, arrived, table, bias, u, lora, x_stride, out_stride, rows, COLUMNS: tl.constexpr,
    OUT: tl.constexpr, PARTS: tl.constexpr, PER_SPLIT: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    BATCH: tl.constexpr, AHEAD: tl.constexpr, PERMUTE: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of W times PER_SPLIT spans of all rows of x; the last program of a tile writes its part of y."""
    start_next(DEPENDENT)
    SPANS: tl.constexpr = COLUMNS // 256
    tile = tl.program_id(0)
    part = 0
    for other in tl.static_range(1, PARTS):
        part += (tile >= tl.load(table + 1 + 8 * other + 5).to(tl.int32)).to(tl.int32)
    entry = table + 1 + 8 * part
    packed = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
    absmax = tl.load(entry + 1).to(tl.pointer_type(tl.int32))
    nested = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    offset = tl.load(tl.load(entry + 3).to(tl.pointer_type(tl.float32)))
    code = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    first = (tile - tl.load(entry + 5).to(tl.int32)) * ROWS
    height = tl.load(entry + 6).to(tl.int32)
    tables = tl.load(table).to(tl.pointer_type(tl.int32))
    if PERMUTE:
        tables = _own_tables(tables)
    begin = tl.program_id(1) * PER_SPLIT
    # Rows past the end repeat the last one and are not stored.
    row = tl.minimum(first + tl.arange(0, ROWS), height - 1)
    # Two words a thread, so that four threads hold a block of a row as the tensor core wants it.
    words = packed + row[:, None] * (COLUMNS // 8) + tl.max_contiguous(tl.arange(0, 8), 2)[None, :]
    # The even words of a block; the odd ones follow at a distance of eight.
    column = tl.arange(0, 32)
    column = tl.max_contiguous(tl.multiple_of(column // 8 * 16 + column % 8, 8), 8)
    batch = tl.arange(0, BATCH)
    columns = x + batch[:, None] * x_stride + column[None, :]
    there = (batch < rows)[:, None]
    acc = tl.zeros((ROWS, BATCH), tl.float32)
    # A scale takes one load after another: codes come two spans ahead, scales one. Weights come AHEAD spans ahead.
    number = row * SPANS
    codes = tl.load(absmax + number + begin)
    factor = tl.load(nested + (number + begin) // 64)
    w0, w1, w2, w3 = _span(words + begin * 32, True)
    second = (PER_SPLIT > 1) & (begin + 1 < SPANS)
    if AHEAD == 2:
        n0, n1, n2, n3 = _span(words + (begin + 1) * 32, second)
    s0, s1, s2, s3 = _scales(codes, code, factor, offset)
    codes = tl.load(absmax + number + begin + 1, mask=second, other=0)
    factor = tl.load(nested + (number + begin + 1) // 64, mask=second, other=0.0)
    wait(DEPENDENT)
    for step in range(PER_SPLIT):
        span = begin + step
        here = there
        if SPANS % PER_SPLIT != 0:
            # Past the end x counts as zeros, whatever the weights are read as.
            here = there & (span < SPANS)
        t0, t1, t2, t3 = _scales(codes, code, factor, offset)
        more = (step + 2 < PER_SPLIT) & (span + 2 < SPANS)
        codes = tl.load(absmax + number + span + 2, mask=more, other=0)
        factor = tl.load(nested + (number + span + 2) // 64, mask=more, other=0.0)
        from_x = columns + span * 256
        if AHEAD == 2:
            c0, c1, c2, c3 = _span(words + (span + 2) * 32, more)
        else:
            follows = (step + 1 < PER_SPLIT) & (span + 1 < SPANS)
            c0, c1, c2, c3 = _span(words + (span + 1) * 32, follows)
        acc = _multiplied(w0, from_x, here, tables, s0, acc, ROWS, BATCH, PERMUTE)
        acc = _multiplied(w1, from_x + 64, here, tables, s1, acc, ROWS, BATCH, PERMUTE)
        acc = _multiplied(w2, from_x + 128, here, tables, s2, acc, ROWS, BATCH, PERMUTE)
        acc = _multiplied(w3, from_x + 192, here, tables, s3, acc, ROWS, BATCH, PERMUTE)
        s0, s1, s2, s3 = t0, t1, t2, t3
        if AHEAD == 2:
            w0, w1, w2, w3 = n0, n1, n2, n3
            n0, n1, n2, n3 = c0, c1, c2, c3
        else:
            w0, w1, w2, w3 = c0, c1, c2, c3
    at = tl.load(entry + 7).to(tl.int32) + first + tl.arange(0, ROWS)
    inside = (batch < rows)[None, :] & (first + tl.arange(0, ROWS) < height)[:, None]
    if SPLITS == 1:
        _finish(acc, at, batch, inside, out, bias, u, lora, out_stride, rows, ROWS, BIAS, RANK, RANKS)
    else:
        to = partials + batch[None, :] * OUT + at[:, None]
        tl.store(to + tl.program_id(1) * rows * OUT, acc, mask=inside)
        tl.debug_barrier()
        # Whoever comes last adds the sums of all up, in their order. What it reads is made visible by the counter.
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived + tile, 0)
            total = tl.zeros((ROWS, BATCH), tl.float32)
            for split in tl.static_range(SPLITS):
                total += tl.load(to + split * rows * OUT, mask=inside, other=0.0, cache_modifier=".cg")
            _finish(total, at, batch, inside, out, bias, u, lora, out_stride, rows, ROWS, BIAS, RANK, RANKS)


@triton.jit
def _finish(
    total, at, batch, inside, out, bias, u, lora, out_stride, rows, ROWS: tl.constexpr, BIAS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A tile of y: bias, adapter, one rounding. total (ROWS, BATCH) fp32; at: its rows in W."""
    there = tl.max(inside.to(tl.int32), axis=1) > 0
    if BIAS:
        total += tl.load(bias + at, mask=there, other=0.0).to(tl.float32)[:, None]
    if RANK > 0:
        rank = tl.arange(0, RANKS)
        left = tl.load(
            lora + at[:, None] * RANK + rank[None, :], mask=there[:, None] & (rank < RANK)[None, :], other=0.0
        )
        real = (rank < RANK)[:, None] & (batch < rows)[None, :]
        total += tl.dot(left, tl.load(u + batch[None, :] * RANK + rank[:, None], mask=real, other=0.0))
    tl.store(out + batch[None, :] * out_stride + at[:, None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _lora(
    x, a, mask, out, x_stride, rows, rank, MASK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One column of u for ROWS rows."""
    start_next(DEPENDENT)
    wait(DEPENDENT)
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
