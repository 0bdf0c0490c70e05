"""The next tokens of the answers in slots: settings and seen tokens beside the logits, one op for all of them.

n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepdoctor.errors import ModelError
from deepdoctor.kernels.sample import BROKEN, SampleSettings, pack_settings, sample, weaken
from deepdoctor.model.sampling import Sampling, settings_of

__all__ = ["Drawer"]


class Drawer:
    """Draws for slots whose numbers the caller keeps. A GPU is waited for once a draw, for its tokens."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        self.slots, self.vocab_size, self.device = slots, vocab_size, device
        self._seen: _SeenMask | _SeenIds | None = None
        """What stands in prompt and answer, made for the first slot with a repetition penalty."""
        self._greedy: dict[int, SampleSettings] = {}
        """Settings of so many greedy rows."""

    def begin(self, slot: int, ids: Sequence[int], sampling: Sampling) -> None:
        """A slot starts with a prompt of these tokens."""
        if sampling.repetition_penalty == 1:
            return
        if self._seen is None:
            cpu = self.device.type == "cpu"
            self._seen = _SeenIds(self.slots) if cpu else _SeenMask(self.slots, self.vocab_size, self.device)
        self._seen.begin(slot, ids)

    def move(self, source: int, target: int) -> None:
        """A slot gets another number."""
        if self._seen is not None:
            self._seen.move(source, target)

    def draw(
        self,
        logits: Tensor,
        first: int,
        samplings: Sequence[Sampling],
        numbers: Sequence[int],
        forced: Mapping[int, int],
    ) -> tuple[list[int], list[float]]:
        """Return the tokens of the slots from ``first`` on, and their log probabilities where any request wants them.

        logits (n, V). numbers: draws of each request before this one. forced: rows whose token is given. Raises
        ModelError for logits that are nan or infinite.
        """
        rows = len(samplings)
        settings = self._settings(samplings, numbers)
        seen = self._seen if any(s.repetition_penalty != 1 for s in samplings) else None
        logprobs = None
        if any(s.logprobs for s in samplings):
            logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
        if isinstance(seen, _SeenIds):
            drawn = sample(seen.penalise(logits.float(), first, settings.penalty), settings)
        else:
            # On a CPU the largest of 16-bit numbers takes longer to find than to widen them.
            logits = logits.float() if logits.device.type == "cpu" else logits
            mask = None if seen is None else seen.of(first, rows)
            drawn = sample(logits, settings, mask, logprobs=logprobs)
        tokens = drawn.tolist()
        for row, token in forced.items():
            tokens[row] = token
        if BROKEN in tokens:
            raise ModelError("the model gave logits that are nan or infinite", "check its weights, or run it in fp32")
        if seen is not None:
            seen.add(first, torch.tensor(tokens, device=logits.device) if forced else drawn)
        if logprobs is None:
            return tokens, []
        found = logprobs.tolist()
        for row in range(rows) if isinstance(seen, _SeenIds) else forced:
            found[row] = float(logits[row].float().log_softmax(-1)[tokens[row]])
        return tokens, found

    def _settings(self, samplings: Sequence[Sampling], numbers: Sequence[int]) -> SampleSettings:
        if any(s.repetition_penalty != 1 or s.temperature > 0 for s in samplings):
            return settings_of(samplings, numbers, self.device)
        rows = len(samplings)
        if rows not in self._greedy:
            self._greedy[rows] = pack_settings([0.0] * rows, device=self.device)
        return self._greedy[rows]


class _SeenMask:
    """(slots, V) bool on the device; rows of slots without a penalty hold whatever was drawn."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        self.mask = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)

    def begin(self, slot: int, ids: Sequence[int]) -> None:
        self.mask[slot] = False
        self.mask[slot, torch.tensor(ids, device=self.mask.device)] = True

    def move(self, source: int, target: int) -> None:
        self.mask[target] = self.mask[source]

    def of(self, first: int, rows: int) -> Tensor:
        """That of some slots (rows, V)."""
        return self.mask[first : first + rows]

    def add(self, first: int, tokens: Tensor) -> None:
        self.of(first, len(tokens)).scatter_(1, tokens[:, None], True)


class _SeenIds:
    """Ids (slots, places), for a CPU: a few hundred logits of a row are looked at, not V.

    A row's free places repeat its first id, so that a token is penalised with the same result several times.
    """

    def __init__(self, slots: int):
        self.ids = torch.zeros(slots, 0, dtype=torch.int64)
        self.counts = torch.ones(slots, dtype=torch.int64)

    def begin(self, slot: int, ids: Sequence[int]) -> None:
        self._hold(len(ids))
        self.ids[slot] = ids[0]
        self.ids[slot, : len(ids)] = torch.tensor(ids)
        self.counts[slot] = len(ids)

    def move(self, source: int, target: int) -> None:
        self.ids[target], self.counts[target] = self.ids[source], self.counts[source]

    def add(self, first: int, tokens: Tensor) -> None:
        slots = torch.arange(first, first + len(tokens))
        self._hold(int(self.counts[slots].max()) + 1)
        self.ids[slots, self.counts[slots]] = tokens
        self.counts[slots] += 1

    def penalise(self, logits: Tensor, first: int, penalty: Tensor) -> Tensor:
        """``kernels.sample.penalise`` of logits (n, V) fp32; penalty (n,)."""
        slots = slice(first, first + len(logits))
        ids = self.ids[slots, : int(self.counts[slots].max())]
        return logits.scatter(1, ids, weaken(logits.gather(1, ids), penalty[:, None]))

    def _hold(self, places: int) -> None:
        """Have so many places at least."""
        missing = places - self.ids.shape[1]
        if missing > 0:
            more = self.ids[:, :1] if self.ids.shape[1] else self.ids.new_zeros(len(self.ids), 1)
            self.ids = torch.cat([self.ids, more.expand(-1, missing + 256)], dim=1)
