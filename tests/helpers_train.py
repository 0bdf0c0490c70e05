"""Synthetic rows and short training runs on a tiny model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.model.adapter import Adapter, LoraSettings
from deepdoctor.model.decoder import Decoder
from deepdoctor.recipe import TrainSection
from deepdoctor.train.loop import TrainResult, train

TOKENS = 500
"""Ids that synthetic rows use; every tiny model has more."""


def synthetic_rows(n: int, seed: int = 0, shortest: int = 10, longest: int = 50) -> list[EncodedRow]:
    """Rows of random tokens: a third prompt, a third reasoning, the rest answer."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        length = draw.randint(shortest, longest)
        ids = [draw.randrange(TOKENS) for _ in range(length)]
        begin, split = length // 3, 2 * length // 3
        labels = [IGNORE_INDEX] * begin + ids[begin:]
        rows.append(EncodedRow(ids, labels, (begin, split), (split, length)))
    return rows


def short_section(**settings: Any) -> TrainSection:
    """Rank 4, batches of 8, a large learning rate and no checkpoint before the end, unless told otherwise."""
    defaults = {
        "lora_rank": 4,
        "lora_alpha": 8,
        "global_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "save_steps": 0,
    }
    return TrainSection(**{**defaults, **settings})


def new_adapter(decoder: Decoder, section: TrainSection, seed: int = 7) -> Adapter:
    """A fresh adapter as the recipe section says."""
    settings = LoraSettings(
        section.lora_rank, section.lora_alpha, section.lora_dropout, section.rslora, section.target_modules
    )
    return Adapter(decoder.config, settings, seed)


def run_training(
    decoder: Decoder, rows: list[EncodedRow], section: TrainSection, folder: Path, **settings: Any
) -> tuple[TrainResult, Adapter]:
    """Train a fresh adapter; returns the result and the adapter."""
    adapter = new_adapter(decoder, section)
    options: dict[str, Any] = {"seed": 7, "folder": folder, "token_budget": 10_000, "fingerprint": "f", **settings}
    return train(decoder, adapter, rows, section, **options), adapter


def losses(result: TrainResult) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in result.metrics]
