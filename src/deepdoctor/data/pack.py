"""Rows of an optimizer step -> micro-batches of packed tokens.

Rows are laid one after another without padding. How they are cut into micro-batches changes memory and speed, never the
result: the loss is normalised over the whole step.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX

__all__ = ["MicroBatch", "count_labels", "micro_batches", "pack"]

_ALIGNMENT = 16
"""Every tensor starts at a multiple of 16 elements (128 bytes), so that kernels see the same alignment in every one."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed rows. input_ids, positions (T,) int64; predict (L,) int64: tokens whose next token trains; labels (L,).

    row_lengths: tokens of each row in order. row_of (L,) int64: which row a label belongs to. buffer: int64, holds all
    five tensors, which are views of it, so that one copy moves them.
    """

    input_ids: Tensor
    positions: Tensor
    row_lengths: tuple[int, ...]
    predict: Tensor
    labels: Tensor
    row_of: Tensor
    buffer: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 without rows."""
        return max(self.row_lengths, default=0)

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device without waiting: to CUDA through pinned memory."""
        buffer = self.buffer
        if device.type == "cuda" and not buffer.is_cuda:
            buffer = buffer.pin_memory()
        return _views(buffer.to(device, non_blocking=True), self.row_lengths, self.labels.shape[0])


def _starts(tokens: int, labels: int) -> tuple[list[int], int]:
    """Return where input_ids, positions, predict, labels and row_of start in the buffer, and its size."""
    starts = [0]
    for size in (tokens, tokens, labels, labels, labels):
        starts.append(starts[-1] - (-size // _ALIGNMENT) * _ALIGNMENT)
    return starts[:-1], starts[-1]


def _views(buffer: Tensor, row_lengths: tuple[int, ...], labels: int) -> MicroBatch:
    tokens = sum(row_lengths)
    ids, places, where, wanted, owner = _starts(tokens, labels)[0]
    return MicroBatch(
        input_ids=buffer[ids : ids + tokens],
        positions=buffer[places : places + tokens],
        row_lengths=row_lengths,
        predict=buffer[where : where + labels],
        labels=buffer[wanted : wanted + labels],
        row_of=buffer[owner : owner + labels],
        buffer=buffer,
    )


def micro_batches(
    lengths: Sequence[int], token_budget: int, max_rows: int | None = None, balanced: bool = False
) -> list[list[int]]:
    """Group rows, longest first, each into the fullest micro-batch it still fits.

    lengths: tokens of each row. Returns lists of row numbers; every row appears once. A row longer than the budget gets
    a micro-batch of its own. The order of rows inside a micro-batch follows their numbers.

    balanced: as many micro-batches, but each row goes into the emptiest one, so that they take the same time; where
    the rows do not fit that way, the fullest-first grouping stays.
    """
    at_most = max_rows or len(lengths)
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    room: list[int] = []
    for row in longest_first:
        fits = [g for g in range(len(groups)) if room[g] >= lengths[row] and len(groups[g]) < at_most]
        if fits:
            best = min(fits, key=lambda g: room[g])
            groups[best].append(row)
            room[best] -= lengths[row]
        else:
            groups.append([row])
            room.append(token_budget - lengths[row])
    if balanced:
        groups = _balanced(lengths, longest_first, len(groups), token_budget, at_most) or groups
    return [sorted(group) for group in groups]


def _balanced(
    lengths: Sequence[int], longest_first: Sequence[int], n: int, token_budget: int, max_rows: int
) -> list[list[int]] | None:
    """Spread rows over ``n`` groups, each into the one with the fewest tokens; None where a row fits in none."""
    groups: list[list[int]] = [[] for _ in range(n)]
    tokens = [0] * n
    for row in longest_first:
        fits = [
            g
            for g in range(n)
            if not groups[g] or (tokens[g] + lengths[row] <= token_budget and len(groups[g]) < max_rows)
        ]
        if not fits:
            return None
        emptiest = min(fits, key=lambda g: tokens[g])
        groups[emptiest].append(row)
        tokens[emptiest] += lengths[row]
    return groups


def count_labels(rows: Sequence[EncodedRow]) -> int:
    """Number of label tokens ``pack`` makes of these rows: the first token of a row is never predicted."""
    return sum(len(row.labels) - row.labels.count(IGNORE_INDEX) - (row.labels[0] != IGNORE_INDEX) for row in rows)


def pack(rows: Sequence[EncodedRow]) -> MicroBatch:
    """Lay rows one after another. The first token of a row is never predicted from the row before it."""
    ids: list[int] = []
    targets: list[int] = []
    for row in rows:
        assert len(row.input_ids) == len(row.labels) > 0
        ids += row.input_ids
        targets += row.labels
    row_lengths = tuple(len(row.input_ids) for row in rows)
    lengths = np.array(row_lengths, dtype=np.int64)
    first = np.cumsum(lengths) - lengths
    wanted = _int64(targets)
    trains = wanted != IGNORE_INDEX
    trains[first] = False
    at = np.flatnonzero(trains)
    (ids_at, places_at, where_at, wanted_at, owner_at), size = _starts(len(ids), len(at))
    buffer = np.zeros(size, dtype=np.int64)
    buffer[ids_at : ids_at + len(ids)] = _int64(ids)
    np.subtract(np.arange(len(ids)), np.repeat(first, lengths), out=buffer[places_at : places_at + len(ids)])
    np.subtract(at, 1, out=buffer[where_at : where_at + len(at)])
    np.take(wanted, at, out=buffer[wanted_at : wanted_at + len(at)])
    buffer[owner_at : owner_at + len(at)] = np.repeat(np.arange(len(rows)), lengths)[at]
    return _views(torch.from_numpy(buffer), row_lengths, len(at))


def _int64(values: list[int]) -> np.ndarray:
    """Return a list as int64, read-only. ``struct`` takes half the time of ``np.array``."""
    return np.frombuffer(struct.pack(f"{len(values)}q", *values), dtype=np.int64)
