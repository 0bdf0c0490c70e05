"""Held-out loss of both sides: token-weighted means, with the row as the unit that varies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deepdoctor.compare.stats import paired_mean, verdict
from deepdoctor.train.held_out import RowLoss

__all__ = ["compare_losses"]

_PARTS = {
    "all": lambda row: (row.total, row.tokens),
    "reasoning": lambda row: (row.reasoning, row.reasoning_tokens),
    "answer": lambda row: (row.answer, row.answer_tokens),
}


def compare_losses(base: Sequence[RowLoss], tuned: Sequence[RowLoss]) -> dict[str, dict[str, Any]]:
    """Return, for "all", "reasoning" and "answer": both losses (nats per token), perplexities, the difference (tuned
    minus base, lower is better) with its 95 % interval over rows, and the verdict. A part without tokens is left out.
    """
    compared: dict[str, dict[str, Any]] = {}
    for part, take in _PARTS.items():
        sums = [(take(one)[0], take(two)[0], take(one)[1]) for one, two in zip(base, tuned, strict=True)]
        sums = [entry for entry in sums if entry[2]]
        if not sums:
            continue
        tokens = [n for _, _, n in sums]
        paired = paired_mean([b / n for b, _, n in sums], [t / n for _, t, n in sums], weights=tokens)
        assert paired.base_mean is not None and paired.tuned_mean is not None
        compared[part] = {
            **asdict(paired),
            "base": paired.base_mean,
            "tuned": paired.tuned_mean,
            "n_rows": len(sums),
            "n_tokens": sum(tokens),
            "base_perplexity": math.exp(min(paired.base_mean, 700)),
            "tuned_perplexity": math.exp(min(paired.tuned_mean, 700)),
            "verdict": verdict(paired.ci_low, paired.ci_high, higher_is_better=False),
        }
    return compared
