"""What a request asks of the drawing of its tokens, and how that reaches the op that draws.

How a token follows from logits, settings, seed and number stands in ``kernels/sample.py``. A request draws the same
from the same logits whatever else is answered beside it, and whatever was drawn before it.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepdoctor.errors import UsageError
from deepdoctor.kernels.sample import SampleSettings, pack_settings

__all__ = ["Sampling", "check_sampling", "settings_of"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of one request.

    max_new_tokens: limit, thinking included. temperature: 0 is greedy. top_p 1, top_k 0, min_p 0 and
    repetition_penalty 1 are off. seed: two requests that differ in nothing else draw differently by it.
    max_thinking_tokens: where the model still thinks after as many, its thinking is closed for it (s1's budget forcing,
    arXiv 2501.19393); None never does. stop: texts that end an answer, and are not part of it. logprobs: keep the log
    probability of every token under the model's own distribution, before any of these settings.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    max_thinking_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False


def check_sampling(sampling: Sampling, name: str) -> None:
    """Raise UsageError for a setting out of its range. name: what the request is called in the message."""
    ranges = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "temperature": (0 <= sampling.temperature < float("inf"), "0 or more"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "top_k": (sampling.top_k >= 0, "0 or more"),
        "min_p": (0 <= sampling.min_p < 1, "at least 0 and below 1"),
        "repetition_penalty": (0 < sampling.repetition_penalty < float("inf"), "above 0"),
        "max_thinking_tokens": (
            sampling.max_thinking_tokens is None or sampling.max_thinking_tokens >= 1,
            "at least 1, or None",
        ),
        "stop": (all(sampling.stop), "texts that are not empty"),
    }
    for setting, (fits, expected) in ranges.items():
        if not fits:
            raise UsageError(f"{name}: {setting} is {getattr(sampling, setting)!r}, expected {expected}")


def settings_of(
    samplings: Sequence[Sampling],
    numbers: Sequence[int],
    device: torch.device | str,
    out: SampleSettings | None = None,
) -> SampleSettings:
    """Settings for ``kernels.sample.sample``, a row for each request, by one copy to the device.

    numbers: draws of each request before this one. out: settings to write into instead, for a CUDA graph.
    """
    return pack_settings(
        [s.temperature for s in samplings],
        top_k=[s.top_k for s in samplings],
        top_p=[s.top_p for s in samplings],
        min_p=[s.min_p for s in samplings],
        penalty=[s.repetition_penalty for s in samplings],
        seed=[s.seed for s in samplings],
        number=numbers,
        device=device,
        out=out,
    )
