"""How the next token is drawn from logits: greedy, or temperature, then top-k, top-p and min-p.

Randomness has no state: the noise of a token follows from the request's seed, the number of the draw and the token's
id, by a hash. So a request draws the same from the same logits whatever else is answered beside it, and whatever was
drawn before it. The token with the largest ``probability / -log(noise)`` is taken, which draws from the probabilities
(the Gumbel-max trick; Maddison et al. 2014, arXiv 1411.0030).

V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepdoctor.errors import UsageError

__all__ = ["Sampling", "check_sampling", "draw", "penalise", "uniform"]

FIRST_CANDIDATES = 512
"""Most likely tokens looked at first; the rest is sorted only where they do not hold top_p of the mass."""
_MASK = 0xFFFFFFFF


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


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens seen before less likely: positive logits divided by the penalty, negative ones multiplied.

    logits (n, V) fp32; seen (n, V) bool; penalty (n, 1) fp32; returns (n, V). Source: CTRL (arXiv 1909.05858).
    """
    weaker = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, weaker, logits)


def _mixed(h: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) in which every input bit reaches every output bit.

    Constants: lowbias32, C. Wellons, public domain.
    """
    h = (h ^ (h >> 16)) * 0x7FEB352D & _MASK
    h = (h ^ (h >> 15)) * 0x846CA68B & _MASK
    return h ^ (h >> 16)


def uniform(seed: int, number: int, tokens: Tensor) -> Tensor:
    """Numbers in (0, 1), (n,) fp64, that look independent for every seed (64 bits), draw and token (n,) int64."""
    key = torch.tensor([seed & _MASK, (seed >> 32) & _MASK, number & _MASK], device=tokens.device)
    h = _mixed(tokens & _MASK)
    for part in key:
        h = _mixed((h + part + 0x9E3779B9) & _MASK)
    return (h.double() + 0.5) / 2**32


def draw(logits: Tensor, sampling: Sampling, number: int) -> int:
    """Draw a token from one row of logits (V,) fp32 on any device. number: draws of this request before this one."""
    if not sampling.temperature:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    kept, tokens = _kept(probabilities.cpu(), sampling)
    noise = -uniform(sampling.seed, number, tokens).log()
    return int(tokens[(kept / noise).argmax()])


def _kept(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (n,) and ids (n,) of the tokens that top-k, then top-p, then min-p leave."""
    size = probabilities.shape[0]
    top_k = min(sampling.top_k or size, size)
    if top_k == size and sampling.top_p == 1 and not sampling.min_p:
        return probabilities, torch.arange(size)
    total = None if top_k < size else float(probabilities.sum())
    count = min(top_k, FIRST_CANDIDATES)
    kept, tokens = probabilities.topk(count)
    enough = sampling.top_p < 1 and total is not None and float(kept.sum()) >= sampling.top_p * total
    enough = enough or (sampling.min_p > 0 and bool(kept[-1] < sampling.min_p * kept[0]))
    if count < top_k and not enough:
        kept, tokens = probabilities.topk(top_k)
    if sampling.top_p < 1:
        mass = float(kept.sum()) if total is None else total
        # A token stays while the mass before it is below top_p, so the first always stays.
        within = kept.cumsum(-1) - kept < sampling.top_p * mass
        kept, tokens = kept[within], tokens[within]
    if sampling.min_p:
        within = kept >= sampling.min_p * kept[0]
        kept, tokens = kept[within], tokens[within]
    return kept, tokens
