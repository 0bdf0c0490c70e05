"""Paged attention in Triton: one program per key head, piece of the positions and slot.

A program reads each of its keys and values once, for all query heads that share them, block by block with a running
maximum and sum. Pieces are whole blocks, counted from the slot's own length, so that all pieces of a short slot that
have anything to read have about as much; the others write an empty sum. A second kernel adds the pieces up: with m the
maximum, l the sum and a the unscaled output of each, ``sum 2^(m - max m) a / sum 2^(m - max m) l``. With one piece the
first kernel writes the output itself. Scores are kept times log2(e), so that exp is a power of two.

The grid hangs on shapes alone. Bytes: at 8 key heads of 128 and 16 bits, a position costs 4 KiB a layer; 700 positions
are 2.9 MB, 0.9 us at 3.35 TB/s. One slot makes 8 programs, so it wants 16 or more pieces; 64 slots want 2 to 4.

Keys and values of 8 bits are converted to the dtype of q on their way to the products, which is exact; their absmax
goes into the scores, and into the weights of the values.

What is computed stands in ``paged_attention.py``; arguments are checked there. Offsets into a cache are int64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepdoctor.kernels.dependent_triton import dependent, start_next, wait
from deepdoctor.kernels.paged_attention import LARGEST

__all__ = ["attend", "rope_and_store"]

STAGES = 3
"""Numbers of blocks come two ahead, keys and values one: 38 KiB of shared memory at H 128 and block_size 64."""
# Elements of a half-head tile, as in rope_triton.py: eight for each thread of one warp.
TILE = 256
# As in paged_attention.py.
SMALLEST_HEAD = tl.constexpr(1e-30)
# Added to and taken off a fp32 below 2^22, it rounds to a whole number, to nearest even.
WHOLE = tl.constexpr(12582912.0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    absmax: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    out: Tensor,
    splits: int,
    scratch: Tensor,
    scale: float,
) -> None:
    """Write the attention of q into out; scratch holds the pieces' outputs, maxima and sums."""
    slots, heads, head_dim = q.shape
    key_heads, size = k.shape[1:3]
    group = heads // key_heads
    if not slots:
        return
    k_absmax, v_absmax = (None, None) if absmax is None else absmax
    largest = LARGEST.get(k.dtype, 1.0)
    with torch.cuda.device_of(q):
        _attend[(key_heads, splits, slots)](
            q, k, v, k_absmax, v_absmax, block_table, lengths, out if splits == 1 else scratch, scratch,
            scale * math.log2(math.e) / largest, q.stride(0), block_table.shape[1], slots, KEY_HEADS=key_heads,
            GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), SPLITS=splits, SIZE=size, HEAD=head_dim,
            LARGEST=largest, STAGES=STAGES, num_warps=4, **dependent(q.device),
        )  # fmt: skip
        if splits > 1:
            _combine[(heads, slots)](
                scratch, out, slots, HEADS=heads, SPLITS=splits, PIECES=triton.next_power_of_2(splits), HEAD=head_dim,
                num_warps=4 if splits * head_dim >= 1024 else 1, **dependent(q.device),
            )  # fmt: skip


def rope_and_store(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k: Tensor,
    v: Tensor,
    absmax: Tensor | None,
    block_table: Tensor,
) -> None:
    """Rotate q in place, and write the rotated k, and v, to their blocks."""
    slots, heads, head_dim = qkv.shape
    key_heads, size = k.shape[1:3]
    if not slots:
        return
    block = triton.next_power_of_2(head_dim // 2)
    step = max(1, TILE // block)
    k_absmax, v_absmax = (None, None) if absmax is None else absmax
    with torch.cuda.device_of(qkv):
        _rope_and_store[(triton.cdiv(heads, step), slots)](
            qkv, cos_sin, positions, k, v, k_absmax, v_absmax, block_table, block_table.shape[1],
            HEADS=heads - 2 * key_heads, KEY_HEADS=key_heads, SIZE=size, HALF=head_dim // 2, STEP=step, BLOCK=block,
            LARGEST=LARGEST.get(k.dtype, 1.0), num_warps=1, **dependent(qkv.device),
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride", "slots"])
def _attend(
    q, k, v, k_absmax, v_absmax, block_table, lengths, out, scratch, scale, q_stride, table_stride, slots,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr,
    HEAD: tl.constexpr, LARGEST: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """k_absmax, v_absmax: None for a cache in the dtype of q. scale: with log2(e), and 1 / LARGEST."""
    start_next(DEPENDENT)
    wait(DEPENDENT)
    key_head = tl.program_id(0)
    split = tl.program_id(1)
    slot = tl.program_id(2)
    length = tl.load(lengths + slot)
    blocks = (length + SIZE - 1) // SIZE
    share = (blocks + SPLITS - 1) // SPLITS
    begin = split * share
    end = tl.minimum(begin + share, blocks)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HEAD)
    place = tl.arange(0, SIZE)
    # A group that is not a power of two is padded; a piece without positions reads nothing.
    within = row < GROUP
    query = q + slot.to(tl.int64) * q_stride + (key_head * GROUP + row)[:, None] * HEAD + column[None, :]
    heads = tl.load(query, mask=within[:, None] & (begin < end), other=0.0)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    table = block_table + slot.to(tl.int64) * table_stride
    inside = place[:, None] * HEAD + column[None, :]
    for number in tl.range(begin, end, num_stages=STAGES):
        block = tl.load(table + number).to(tl.int64)
        filled = number * SIZE + place < length
        start = (block * KEY_HEADS + key_head) * (SIZE * HEAD)
        keys = tl.load(k + start + inside, mask=filled[:, None], other=0.0)
        values = tl.load(v + start + inside, mask=filled[:, None], other=0.0)
        if k_absmax is None:
            scores = tl.dot(heads, tl.trans(keys)) * scale
        else:
            at = (block * KEY_HEADS + key_head) * SIZE + place
            k_largest = tl.load(k_absmax + at, mask=filled, other=0.0)
            v_largest = tl.load(v_absmax + at, mask=filled, other=0.0)
            values = values.to(heads.dtype)
            scores = tl.dot(heads, tl.trans(keys.to(heads.dtype))) * (k_largest * scale)[None, :]
        scores = tl.where(filled[None, :], scores, -float("inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp2(largest - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if v_absmax is not None:
            weights = weights * v_largest[None, :]
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
        largest = higher
    if v_absmax is not None:
        acc = acc * (1 / LARGEST)
    head = slot.to(tl.int64) * (KEY_HEADS * GROUP) + key_head * GROUP + row
    if SPLITS == 1:
        # An idle slot has no sum: zeros.
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        target = out + head[:, None] * HEAD + column[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=within[:, None])
    else:
        piece = head * SPLITS + split
        tl.store(out + piece[:, None] * HEAD + column[None, :], acc, mask=within[:, None] & (begin < end))
        pieces = slots.to(tl.int64) * (KEY_HEADS * GROUP * SPLITS)
        tl.store(scratch + pieces * HEAD + piece, largest, mask=within)
        tl.store(scratch + pieces * (HEAD + 1) + piece, total, mask=within)


@triton.jit(do_not_specialize=["slots"])
def _combine(
    scratch, out, slots, HEADS: tl.constexpr, SPLITS: tl.constexpr, PIECES: tl.constexpr, HEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One head of one slot."""
    start_next(DEPENDENT)
    wait(DEPENDENT)
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.program_id(0)
    split = tl.arange(0, PIECES)
    column = tl.arange(0, HEAD)
    pieces = slots.to(tl.int64) * (HEADS * SPLITS)
    piece = head * SPLITS + split
    total = tl.load(scratch + pieces * (HEAD + 1) + piece, mask=split < SPLITS, other=0.0)
    filled = total > 0
    largest = tl.load(scratch + pieces * HEAD + piece, mask=filled, other=-float("inf"))
    highest = tl.max(largest, axis=0)
    factor = tl.where(filled, tl.exp2(largest - tl.where(highest > -float("inf"), highest, 0.0)), 0.0)
    acc = tl.load(scratch + piece[:, None] * HEAD + column[None, :], mask=filled[:, None], other=0.0)
    whole = tl.sum(factor * total, axis=0)
    result = tl.sum(acc * factor[:, None], axis=0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out + head * HEAD + column, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["table_stride"])
def _rope_and_store(
    qkv, cos_sin, positions, k, v, k_absmax, v_absmax, block_table, table_stride, HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """STEP heads of one slot."""
    start_next(DEPENDENT)
    wait(DEPENDENT)
    dtype = qkv.dtype.element_ty
    HEAD: tl.constexpr = 2 * HALF
    slot = tl.program_id(1)
    position = tl.load(positions + slot)
    live = position >= 0
    head = tl.program_id(0) * STEP + tl.arange(0, STEP)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < HEADS + 2 * KEY_HEADS) & (column < HALF) & live
    angles = cos_sin + position.to(tl.int64) * HEAD + column
    c = tl.load(angles, mask=(column < HALF) & live, other=0.0).to(dtype).to(tl.float32)
    s = tl.load(angles + HALF, mask=(column < HALF) & live, other=0.0).to(dtype).to(tl.float32)
    at = qkv + slot.to(tl.int64) * ((HEADS + 2 * KEY_HEADS) * HEAD) + head * HEAD + column
    a = tl.load(at, mask=mask, other=0.0)
    b = tl.load(at + HALF, mask=mask, other=0.0)
    left, right = a.to(tl.float32), b.to(tl.float32)
    first, second = (left * c - right * s).to(dtype), (right * c + left * s).to(dtype)
    is_query, is_value = head < HEADS, head >= HEADS + KEY_HEADS
    tl.store(at, first, mask=mask & is_query)
    tl.store(at + HALF, second, mask=mask & is_query)
    block = tl.load(block_table + slot.to(tl.int64) * table_stride + position // SIZE, mask=live, other=0).to(tl.int64)
    key_head = tl.where(is_value, head - HEADS - KEY_HEADS, head - HEADS)
    row = (block * KEY_HEADS + key_head) * SIZE + position % SIZE
    is_key = (head >= HEADS) & (head < HEADS + KEY_HEADS)
    if k_absmax is not None:
        largest = tl.maximum(_largest(tl.where(is_value, a, first)), _largest(tl.where(is_value, b, second)))
        largest = tl.where(largest < float("inf"), tl.maximum(largest, SMALLEST_HEAD), float("nan"))
        there = live & (head < HEADS + 2 * KEY_HEADS)
        tl.store(k_absmax + row, largest, mask=there & is_key)
        tl.store(v_absmax + row, largest, mask=there & is_value)
        factor = tl.div_rn(LARGEST, largest)
        a, b = _stored(a, factor, v.dtype.element_ty), _stored(b, factor, v.dtype.element_ty)
        first, second = _stored(first, factor, k.dtype.element_ty), _stored(second, factor, k.dtype.element_ty)
    to = row * HEAD + column
    tl.store(k + to, first, mask=mask & is_key)
    tl.store(k + to + HALF, second, mask=mask & is_key)
    tl.store(v + to, a, mask=mask & is_value)
    tl.store(v + to + HALF, b, mask=mask & is_value)


@triton.jit
def _largest(half):
    """The largest magnitude of each row (STEP, 1) in fp32; inf where there is a nan."""
    wide = half.to(tl.float32)
    return tl.max(tl.where(wide == wide, tl.abs(wide), float("inf")), axis=1, keep_dims=True)


@triton.jit
def _stored(half, factor, dtype: tl.constexpr):
    scaled = half.to(tl.float32) * factor
    return ((scaled + WHOLE) - WHOLE).to(dtype) if dtype == tl.int8 else scaled.to(dtype)
