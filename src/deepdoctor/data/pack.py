"""Rows of an optimizer step -> micro-batches of packed tokens.

Rows are laid one after another without padding. How they are cut into micro-batches changes memory and speed, never the
result: the loss is normalised over the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX

__all__ = ["MicroBatch", "micro_batches", "pack"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed rows. input_ids, positions (T,) int64; predict (L,) int64: tokens whose next token trains; labels (L,).

    row_lengths: tokens of each row in order. row_of (L,) int64: which row a label belongs to.
    """

    input_ids: Tensor
    positions: Tensor
    row_lengths: tuple[int, ...]
    predict: Tensor
    labels: Tensor
    row_of: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device without waiting."""
        moved = (t.to(device, non_blocking=True) for t in (self.input_ids, self.positions, self.predict, self.labels))
        input_ids, positions, predict, labels = moved
        return MicroBatch(input_ids, positions, self.row_lengths, predict, labels, self.row_of.to(device))


def micro_batches(lengths: Sequence[int], token_budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Group rows, longest first, each into the fullest micro-batch it still fits.

    lengths: tokens of each row. Returns lists of row numbers; every row appears once. A row longer than the budget gets
    a micro-batch of its own. The order of rows inside a micro-batch follows their numbers.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [
            g for g in range(len(groups)) if room[g] >= lengths[row] and len(groups[g]) < (max_rows or len(lengths))
        ]
        if fits:
            best = min(fits, key=lambda g: room[g])
            groups[best].append(row)
            room[best] -= lengths[row]
        else:
            groups.append([row])
            room.append(token_budget - lengths[row])
    return [sorted(group) for group in groups]


def pack(rows: Sequence[EncodedRow]) -> MicroBatch:
    """Lay rows one after another. The first token of a row is never predicted from the row before it."""
    input_ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    labels: list[int] = []
    row_of: list[int] = []
    for number, row in enumerate(rows):
        base = len(input_ids)
        input_ids += row.input_ids
        positions += range(len(row.input_ids))
        for at, label in enumerate(row.labels[1:]):
            if label != IGNORE_INDEX:
                predict.append(base + at)
                labels.append(label)
                row_of.append(number)
    tensors = (torch.tensor(values, dtype=torch.int64) for values in (input_ids, positions, predict, labels, row_of))
    ids, places, where, wanted, owner = tensors
    return MicroBatch(ids, places, tuple(len(row.input_ids) for row in rows), where, wanted, owner)
