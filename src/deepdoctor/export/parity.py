"""Whether merged weights are base + adapter: as close as rounding them lets them be, with the adapter's effect in them.

What rounding explains is first reckoned from the number of layers. A model may make more of it than that: where an
adapter is large, attention is sharp, and a small step in a weight moves the logits far. So where the reckoning does
not suffice, it is measured: weights and adapter are moved by as much as rounding may move them, and base + adapter
answer again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.export.measure import kept_effect, logits_of
from deepdoctor.export.merge import MergedWeights
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.config import ModelConfig
from deepdoctor.model.decoder import Decoder

__all__ = ["Parity", "ShakenWeights", "check_parity", "compare_logits", "first_tokens", "shaken_adapter"]

PARITY_ROWS = 2
PARITY_TOKENS = 256
"""First tokens of each row that are compared."""
DRAWS = 3
"""Times that rounding is measured. Of 72 sound merges under adapters far too large, a tiny model's logits were off by
at most 1.4 times the root mean square of three measurements, by 5.2 times a single one."""


@dataclass(frozen=True)
class Parity:
    """How far the merged model is from base + adapter, beside what the adapter itself changes.

    Logit differences are root mean squares over all positions and words. allowed: what rounding every merged weight
    once to its dtype, and computing, explain. effect_kept: slope of (merged - base) on (base + adapter - base), 1
    where the adapter acts in full and 0 where it was lost. greedy_agreement: share of positions with the same most
    likely token. rounding: how far moving weights and adapter by their rounding moved the logits; None where
    the reckoning sufficed.
    """

    logit_difference: float
    allowed: float
    adapter_effect: float
    effect_kept: float
    max_difference: float
    greedy_agreement: float
    positions: int
    dtype: str
    rounding: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the merged model is as close as rounding allows, with the adapter's effect in it.

        The slope is asked only where the effect stands out of the rounding, which alone pulls it down to one half.
        """
        kept = self.adapter_effect < self.allowed / 2 or 0.5 <= self.effect_kept <= 1.5
        return self.logit_difference <= self.allowed and kept


class ShakenWeights:
    """A base whose projections are moved, up or down by chance, by half a unit in the last place of the merged weight.

    Rounding to the nearest moves a weight by 0.58 times that (root mean square), and never by more. weights: the base.
    adapter: on the CPU; it decides how large a merged weight is, and is not added. dtypes: of the merged model and of
    the computation; the coarsest counts.
    """

    def __init__(self, weights: MergedWeights, adapter: Adapter, dtypes: Sequence[torch.dtype], seed: int):
        self.weights = weights
        self.config = weights.config
        self._adapter = adapter
        self._dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self._generator = torch.Generator().manual_seed(seed)

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, a projection in fp32."""
        tensor = self.weights.read(name)
        if name not in self.weights.projections:
            return tensor
        delta = self._adapter.delta(*self.weights.projections[name])
        return tensor + _steps(tensor if delta is None else tensor + delta, self._dtype, self._generator)


def shaken_adapter(adapter: Adapter, dtype: torch.dtype, seed: int) -> Adapter:
    """A copy of an adapter on the CPU, its matrices moved likewise; dtype: in which they are used."""
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(adapter)
    with torch.no_grad():
        for matrix in moved.parameters():
            matrix.add_(_steps(matrix, dtype, generator))
    return moved


def _steps(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Half a unit in the last place that fp32 ``values`` have in ``dtype``, up or down by chance; 0 for a 0."""
    info = torch.finfo(dtype)
    power = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 1)
    half = power.clamp_(min=info.smallest_normal) * (info.eps / 2)
    up = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8)
    return half * (2 * up - 1) * (values != 0)


def first_tokens(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """The first PARITY_TOKENS tokens of the first PARITY_ROWS rows."""
    n = PARITY_TOKENS
    return [EncodedRow(row.input_ids[:n], row.labels[:n], row.reasoning, row.answer) for row in rows[:PARITY_ROWS]]


def check_parity(
    reference: Decoder, adapter: Adapter, merged: Decoder, rows: Sequence[EncodedRow], dtype: torch.dtype
) -> Parity:
    """Compare merged weights with base + adapter on the same tokens, both computed in the reference's dtype.

    dtype: of the merged weights. What rounding explains is reckoned, not measured.
    """
    rows = first_tokens(rows)
    sides: tuple[tuple[Decoder, Adapter | None], ...] = ((merged, None), (reference, adapter), (reference, None))
    found, tuned, base = (logits_of(decoder, one, rows) for decoder, one in sides)
    return compare_logits(found, tuned, base, reference.config, reference.compute_dtype, dtype)


def compare_logits(
    found: Tensor,
    tuned: Tensor,
    base: Tensor,
    config: ModelConfig,
    computed: torch.dtype,
    dtype: torch.dtype,
    shaken: Callable[[int], Tensor] | None = None,
) -> Parity:
    """Compare logits (positions, V) fp32 of the merged weights, of base + adapter, and of the base alone.

    computed: dtype of the activations of all three. dtype: of the merged weights. shaken: gives the logits of base +
    adapter with both moved by rounding (``ShakenWeights``, ``shaken_adapter``) by a seed; called only where the
    reckoning does not suffice.

    Rounding to a dtype moves a weight by at most eps / 2 of itself, and moves the logits of L layers by about
    eps / 2 * sqrt(4 L) of their own size, four products a layer adding up independently. Sums of F terms in fp32 add
    their own eps / 2 * sqrt(F) a product, which only shows where everything is fp32. Twice that is allowed, or twice
    what was measured, but never half the spread of the logits, at which it is another model.
    """
    spread = _rms(tuned - tuned.mean(-1, keepdim=True))
    coarsest = max(torch.finfo(dtype).eps, torch.finfo(computed).eps)
    summing = torch.finfo(torch.float32).eps * config.intermediate_size**0.5
    allowed = (coarsest + summing) * (4 * config.num_layers) ** 0.5 * spread
    difference, rounding = _rms(found - tuned), None
    if difference > allowed and shaken is not None:
        rounding = (sum(_rms(shaken(seed) - tuned) ** 2 for seed in range(DRAWS)) / DRAWS) ** 0.5
        allowed = max(allowed, min(2 * rounding * (1 + summing / coarsest), spread / 2))
    return Parity(
        logit_difference=difference,
        allowed=allowed,
        adapter_effect=_rms(tuned - base),
        effect_kept=kept_effect(found, tuned, base),
        max_difference=float((found - tuned).abs().max()),
        greedy_agreement=float((found.argmax(-1) == tuned.argmax(-1)).float().mean()),
        positions=found.shape[0],
        dtype=str(dtype).removeprefix("torch."),
        rounding=rounding,
    )


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
