"""Which rows each optimizer step trains on: a pure function of the seed, so a resumed run sees the same rows."""

from __future__ import annotations

import math

import torch

__all__ = ["step_rows", "total_steps"]


def total_steps(n_rows: int, batch: int, max_steps: int | None, epochs: float) -> int:
    """Number of optimizer steps; an epoch is ceil(n_rows / batch), its last step may have fewer rows."""
    return max_steps or max(1, math.ceil(epochs * math.ceil(n_rows / batch)))


def step_rows(n_rows: int, batch: int, steps: int, seed: int, shuffle: bool = True) -> list[list[int]]:
    """Return the row numbers of every step, in order.

    Each epoch is a permutation drawn from (seed, epoch), or 0..n-1 where shuffle is off. Ranks take their share of a
    step from this one list, so the order does not depend on how many there are.
    """
    wanted: list[list[int]] = []
    epoch = 0
    while len(wanted) < steps:
        order = list(range(n_rows))
        if shuffle:
            order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        wanted += [order[at : at + batch] for at in range(0, n_rows, batch)]
        epoch += 1
    return wanted[:steps]
