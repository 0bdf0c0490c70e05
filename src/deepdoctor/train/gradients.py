"""The gradient of a step's rows: by autograd (CPU, dropout), or by the engine (GPU).

Both take rows, cut them into micro-batches and leave the summed gradient in the fp32 masters; how they cut does not
change the result. The engine works in memory laid out beforehand. Should the card be fuller than planned, it plans
anew with less, says so, and computes the same step again: nothing is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from deepdoctor.data.pack import MicroBatch, count_labels, micro_batches, pack
from deepdoctor.data.prompt import EncodedRow
from deepdoctor.engine.step import Engine, Rows, padded
from deepdoctor.errors import TrainingError
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import Decoder, PackedAttention
from deepdoctor.recipe import TrainSection
from deepdoctor.sizes import MIB
from deepdoctor.train.flat import FlatAdapter, Piece
from deepdoctor.train.held_out import RowLoss, held_out_losses
from deepdoctor.train.optimizer import can_flatten, clip_on_device
from deepdoctor.train.plan import ENGINE_SHARE, Plan

__all__ = ["AutogradGradients", "EngineGradients", "Gradients", "Prepared", "Replan", "make_gradients"]

log = logging.getLogger(__name__)

Replan = Callable[[float], Plan]
"""MiB to leave unused -> a plan that does."""
LONGEST_PROBE = 65_536
"""Tokens above which a micro-batch takes so long that the first step shows as much as a probe would."""
WARMED_SIZES = 48
"""Micro-batch sizes whose kernels are loaded before the first step; in mid-run each would stop the queue."""
STEP_DOWN = 0.07
"""Share of a plan's memory that the next plan down does without."""


@dataclass(frozen=True)
class Prepared:
    """A step's rows, packed. labels: label tokens of all rows. budget: tokens that a micro-batch may have had."""

    rows: Sequence[EncodedRow]
    batches: Sequence[MicroBatch]
    labels: int
    tokens: int
    budget: int = 0


class Gradients(Protocol):
    """What the loop asks for."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """For the optimizer."""

    @property
    def pieces(self) -> Sequence[Piece] | None:
        """For checkpoints, see ``FlatAdapter.pieces``."""

    @property
    def plan(self) -> Plan | None:
        """The plan that holds now, where there is one to hold to."""

    @property
    def ahead(self) -> bool:
        """Whether the update is to be queued before loss and norm are known."""

    def read(self, loss: Tensor | float, norm: Tensor | float) -> Callable[[], tuple[float, float]]:
        """Return a function that waits for both numbers, and for nothing that is queued after this call."""

    def probe(self, steps: Sequence[Sequence[EncodedRow]]) -> float | None:
        """Try what these steps will take before the first of them; return the peak in MiB where it was measured."""

    def prepare(self, rows: Sequence[EncodedRow]) -> Prepared:
        """Pack a step's rows on the host."""

    def compute(self, step: Prepared, scale: float) -> Tensor:
        """Add the gradient of ``scale`` times the mean loss; return the mean loss () without waiting for it."""

    def unscale(self, factor: float) -> None:
        """Multiply the gradient."""

    def clip(self, max_norm: float) -> Tensor:
        """Return the gradient's L2 norm () and scale it down to max_norm (0: leave it)."""

    def zero(self) -> None:
        """Forget the gradient."""

    def after_update(self) -> None:
        """Tell that the masters have changed."""

    def held_out(self, rows: Sequence[EncodedRow]) -> list[RowLoss]:
        """Return the losses of rows that do not train."""

    def close(self) -> None:
        """Give back memory."""


def make_gradients(
    decoder: Decoder,
    adapter: Adapter,
    section: TrainSection,
    token_budget: int,
    plan: Plan | None,
    replan: Replan | None,
) -> Gradients:
    """Return the engine where the plan has one, else autograd."""
    if plan is None or plan.engine is None:
        return AutogradGradients(decoder, adapter, section, token_budget)
    return EngineGradients(decoder, adapter, section, plan, replan)


def _filled(rows: Sequence[EncodedRow]) -> MicroBatch:
    """Pack rows, and one without labels up to a size that comes often; that one adds nothing to the gradient."""
    tokens = sum(len(row.input_ids) for row in rows)
    spare = padded(tokens) - tokens
    filler = [EncodedRow([0] * spare, [IGNORE_INDEX] * spare, (0, 0), (0, 0))] if spare else []
    return pack([*rows, *filler])


class AutogradGradients:
    """Forward through the decoder's modules, backward by PyTorch."""

    def __init__(self, decoder: Decoder, adapter: Adapter, section: TrainSection, token_budget: int):
        self.decoder, self.adapter = decoder, adapter
        self.token_budget, self.max_rows = token_budget, section.micro_batch_size
        self.parameters = list(adapter.parameters())
        self.pieces: Sequence[Piece] | None = None
        self.plan: Plan | None = None
        self.ahead = False

    def read(self, loss: Tensor | float, norm: Tensor | float) -> Callable[[], tuple[float, float]]:
        """Return a function that gives both numbers."""
        return lambda: (float(loss), float(norm))

    def probe(self, steps: Sequence[Sequence[EncodedRow]]) -> float | None:
        """Nothing to try: nothing is compiled, and memory is taken as it is needed."""
        return None

    def prepare(self, rows: Sequence[EncodedRow]) -> Prepared:
        """Pack a step's rows on the host."""
        lengths = [len(row.input_ids) for row in rows]
        groups = micro_batches(lengths, self.token_budget, self.max_rows)
        return Prepared(rows, [pack([rows[i] for i in group]) for group in groups], count_labels(rows), sum(lengths))

    def compute(self, step: Prepared, scale: float) -> Tensor:
        """Add the gradient of ``scale`` times the mean loss; return the mean loss."""
        total = torch.zeros((), dtype=torch.float64)
        for packed in step.batches:
            batch = packed.to(self.decoder.device)
            attend = PackedAttention(self.decoder.config.num_kv_heads, batch.row_lengths)
            hidden = self.decoder(batch.input_ids, batch.positions, attend, self.adapter.prepare(self.decoder))
            losses = linear_cross_entropy(hidden[batch.predict], self.decoder.head, batch.labels)
            loss = losses.sum() / step.labels
            (loss * scale).backward()
            total += losses.detach().double().sum().cpu() / step.labels
        return total

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def unscale(self, factor: float) -> None:
        """Multiply the gradient."""
        torch._foreach_mul_(self._gradients(), factor)

    def clip(self, max_norm: float) -> Tensor:
        """Return the gradient's L2 norm and scale it down to max_norm."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._gradients())))
        value = float(norm)
        if max_norm and value > max_norm:
            torch._foreach_mul_(self._gradients(), max_norm / value)
        return norm

    def zero(self) -> None:
        """Forget the gradient."""
        self.adapter.zero_grad(set_to_none=True)

    def after_update(self) -> None:
        """Nothing to do: the adapter is cast anew in every micro-batch."""

    def held_out(self, rows: Sequence[EncodedRow]) -> list[RowLoss]:
        """Return the losses of rows that do not train."""
        return held_out_losses(self.decoder, self.adapter, rows, self.token_budget)

    def close(self) -> None:
        """Nothing is held."""


class EngineGradients:
    """Forward and backward by ``engine``, with settings from the plan."""

    def __init__(self, decoder: Decoder, adapter: Adapter, section: TrainSection, plan: Plan, replan: Replan | None):
        self.decoder, self.adapter, self.section, self.plan, self.replan = decoder, adapter, section, plan, replan
        self.flat = FlatAdapter(adapter)
        flat = can_flatten(adapter, section.optimizer)
        self.parameters = [self.flat.parameter] if flat else list(adapter.parameters())
        self.pieces: Sequence[Piece] | None = self.flat.pieces if flat else None
        self.spare_mib = 0.0
        self.ahead = decoder.device.type == "cuda"
        self.engine: Engine | None = None
        self._build()

    def read(self, loss: Tensor | float, norm: Tensor | float) -> Callable[[], tuple[float, float]]:
        """Return a function that waits for both numbers, and for nothing that is queued after this call."""
        if not (self.ahead and isinstance(loss, Tensor) and isinstance(norm, Tensor)):
            return lambda: (float(loss), float(norm))
        both = torch.empty(2, dtype=torch.float64, pin_memory=True)
        both.copy_(torch.stack([loss.double(), norm.double()]), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> tuple[float, float]:
            arrived.synchronize()
            value, length = both.tolist()
            return value, length

        return wait

    def _build(self) -> None:
        """Take the engine's memory, with as many steps down as it needs."""
        while True:
            choice = self.plan.engine
            assert choice is not None
            try:
                self.decoder.place_embedding(choice.embedding_on_host)
                self.decoder.place_head(choice.head_rows is not None)
                if self.decoder.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.engine = Engine(self.decoder, self.flat, self.adapter.settings, choice.settings)
                return
            except torch.OutOfMemoryError:
                self._step_down()

    def _step_down(self) -> None:
        """Plan anew with less memory. Raises TrainingError where nothing smaller fits."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        torch.cuda.empty_cache()
        if self.replan is None:
            raise TrainingError("the GPU is out of memory", "close other programs on it, or set `--model.vram` lower")
        # Below what the plan wanted, not below the card: it may have left much of that unused.
        self.spare_mib += self.plan.available_mib - (1 - STEP_DOWN) * self.plan.predicted_peak_mib / ENGINE_SHARE
        before = self.plan.predicted_peak_mib
        self.plan = self.replan(self.spare_mib)
        log.warning(
            "out of GPU memory with a plan for %.0f MiB: stepping down to %.0f MiB and computing the step again",
            before,
            self.plan.predicted_peak_mib,
        )

    def _groups(self, rows: Sequence[EncodedRow]) -> list[list[int]]:
        """Cut a step's rows into micro-batches of the plan."""
        assert self.plan.engine is not None
        lengths = [len(row.input_ids) for row in rows]
        return micro_batches(lengths, self.plan.engine.max_tokens, self.section.micro_batch_size, balanced=True)

    def prepare(self, rows: Sequence[EncodedRow]) -> Prepared:
        """Pack a step's rows on the host."""
        assert self.plan.engine is not None
        batches = [_filled([rows[i] for i in group]) for group in self._groups(rows)]
        tokens = sum(len(row.input_ids) for row in rows)
        return Prepared(rows, batches, count_labels(rows), tokens, self.plan.engine.max_tokens)

    def compute(self, step: Prepared, scale: float) -> Tensor:
        """Add the gradient of ``scale`` times the mean loss; return the mean loss () on the device."""
        while True:
            assert self.plan.engine is not None
            if step.budget != self.plan.engine.max_tokens:
                step = self.prepare(step.rows)  # packed for the plan before
            try:
                assert self.engine is not None
                total = torch.zeros((), dtype=torch.float64, device=self.decoder.device)
                for packed in step.batches:
                    total += self.engine.gradients(self._rows(packed), scale / step.labels)
                return total / step.labels
            except torch.OutOfMemoryError:
                self._step_down()
            # Outside the except clause: the exception holds the frames, and with them the memory.
            self._build()
            self.flat.zero_grad()

    def _rows(self, packed: MicroBatch) -> Rows:
        batch = packed.to(self.decoder.device)
        on_host = self.decoder.embedding.device != self.decoder.device
        ids = packed.input_ids if on_host else batch.input_ids
        return Rows(ids, batch.positions, batch.row_lengths, batch.predict, batch.labels)

    def probe(self, steps: Sequence[Sequence[EncodedRow]]) -> float | None:
        """Run the largest micro-batch of these steps once and forget it; return the peak in MiB (None on a CPU).

        Compiles kernels and takes the libraries' workspaces, so that the first step is like any other.
        """
        device = self.decoder.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        state = self._optimizer_room()
        sizes = self._sizes(steps)
        tokens = max(sizes)
        if tokens > LONGEST_PROBE:
            return None
        rows, group = sizes[tokens]
        largest = _filled([rows[i] for i in group])
        assert self.plan.engine is not None
        labels = max(1, int(largest.labels.shape[0]))
        self.compute(Prepared(rows, [largest], labels, tokens, self.plan.engine.max_tokens), 1.0)
        peak = torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else None
        if device.type == "cuda":
            self._warm_up(steps)
        del state
        self.flat.zero_grad()
        return peak

    def _optimizer_room(self) -> Tensor:
        """Take what the optimizer's state will, which the first update allocates."""
        while True:
            try:
                return torch.empty(round(self.plan.optimizer_mib * MIB), dtype=torch.uint8, device=self.decoder.device)
            except torch.OutOfMemoryError:
                self._step_down()
            self._build()

    def _warm_up(self, steps: Sequence[Sequence[EncodedRow]]) -> None:
        """Load the kernels of every size that will come, through two layers."""
        sizes = self._sizes(steps)  # anew: the probe may have stepped down
        for rows, group in list(sizes.values())[:WARMED_SIZES]:
            assert self.engine is not None
            self.engine.gradients(self._rows(_filled([rows[i] for i in group])), 1.0, layers=2)
            torch.cuda.synchronize(self.decoder.device)

    def _sizes(self, steps: Sequence[Sequence[EncodedRow]]) -> dict[int, tuple[Sequence[EncodedRow], list[int]]]:
        """Tokens of every micro-batch that will come -> rows of a step that has one, and which of them are in it."""
        return {
            padded(sum(len(rows[i].input_ids) for i in group)): (rows, group)
            for rows in steps
            for group in self._groups(rows)
        }

    def unscale(self, factor: float) -> None:
        """Multiply the gradient."""
        self.flat.gradient.mul_(factor)

    def clip(self, max_norm: float) -> Tensor:
        """Return the gradient's L2 norm () on the device and scale it down to max_norm."""
        return clip_on_device(self.flat.gradient, max_norm)

    def zero(self) -> None:
        """Forget the gradient."""
        self.flat.zero_grad()

    def after_update(self) -> None:
        """Bring the new masters into the matrices."""
        assert self.engine is not None
        self.engine.refresh()

    def held_out(self, rows: Sequence[EncodedRow]) -> list[RowLoss]:
        """Return the losses of rows that do not train."""

        def losses_of(batch: MicroBatch) -> Tensor:
            assert self.engine is not None
            return self.engine.losses(self._rows(batch))

        while True:
            choice = self.plan.engine
            assert choice is not None
            try:
                return held_out_losses(self.decoder, self.adapter, rows, choice.max_tokens, losses_of=losses_of)
            except torch.OutOfMemoryError:
                self._step_down()
            self._build()

    def close(self) -> None:
        """Give back the engine's memory and the gradient; the head comes back to the GPU, which answering needs."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        for parameter in (self.flat.parameter, *self.adapter.parameters()):
            parameter.grad = None
        if self.decoder.device.type != "cuda":
            return
        torch.cuda.empty_cache()
        try:
            self.decoder.place_head(False)
        except torch.OutOfMemoryError:
            log.warning("the head stays in host memory: answering will be slow")
