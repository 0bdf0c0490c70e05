"""Which rows train and which are held out: decided by each row's question, never by its place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby

from deepdoctor.data.rows import Row
from deepdoctor.errors import DataError

__all__ = ["split_rows"]


def split_rows(rows: Sequence[Row], held_out: int | float, seed: int) -> tuple[list[Row], list[Row]]:
    """Divide rows into (train, held out), both in source order.

    held_out: a share in [0, 1) or a count >= 0. seed: another seed, another division.

    Each row has one number in [0, 1) made from the seed and its question. A share holds out the rows whose number is
    below it, so adding, removing or reordering rows never moves another row across (the number held out is then only
    near the share). A count holds out the rows with the smallest numbers: exact, but adding or removing a row can move
    one other row across. Rows with the same question share a side, so that no held-out question was trained on; a count
    is exceeded where its last row has such twins.

    Raises DataError when nothing is left to train on, or for a held_out out of range.
    """
    if held_out < 0 or (isinstance(held_out, float) and held_out >= 1):
        raise DataError(f"data.held_out is {held_out}, expected a share below 1 or a count", "set 0.05 or 16")
    numbers = [_number(seed, row) for row in rows]
    limit = held_out if isinstance(held_out, float) else _limit_for_count(numbers, held_out)
    train = [row for row, number in zip(rows, numbers, strict=True) if number >= limit]
    held = [row for row, number in zip(rows, numbers, strict=True) if number < limit]
    if not train:
        raise DataError(
            f"data.held_out {held_out} keeps all {len(rows)} rows out of training",
            "hold out fewer (`--data.held_out 0.05`), or give more rows",
        )
    return train, held


def _number(seed: int, row: Row) -> float:
    digest = hashlib.sha256(f"{seed}:{row.question_hash}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: exact in a float, never 1.0


def _limit_for_count(numbers: Sequence[float], count: int) -> float:
    """Return the smallest limit with at least count numbers below it; equal questions have equal numbers."""
    below = 0
    for number, equal in groupby(sorted(numbers)):
        if below >= count:
            return number
        below += len(list(equal))
    return 1.0
