"""Loss on rows the adapter has not seen, reasoning and answer apart; logits are never kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepdoctor.data.pack import MicroBatch, micro_batches, pack
from deepdoctor.data.prompt import EncodedRow
from deepdoctor.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_by_vocabulary
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.decoder import Decoder, PackedAttention

__all__ = ["RowLoss", "held_out_losses", "mean_loss"]


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Summed loss (nats) and token counts of one row's labelled tokens; a prompt that trains (``all``) is left out."""

    reasoning: float
    reasoning_tokens: int
    answer: float
    answer_tokens: int

    @property
    def total(self) -> float:
        """Reasoning and answer together."""
        return self.reasoning + self.answer

    @property
    def tokens(self) -> int:
        """Label tokens."""
        return self.reasoning_tokens + self.answer_tokens


@torch.inference_mode()
def held_out_losses(
    decoder: Decoder,
    adapter: Adapter | None,
    rows: Sequence[EncodedRow],
    token_budget: int,
    on_rows: Callable[[int], None] | None = None,
    losses_of: Callable[[MicroBatch], Tensor] | None = None,
) -> list[RowLoss]:
    """Return the loss of every row, in order.

    adapter: None asks the base. token_budget: packed tokens run at once. on_rows: called with the rows just finished.
    losses_of: computes the loss of every label of a micro-batch on the host (L,), instead of decoder and adapter.
    """
    found: dict[int, RowLoss] = {}
    losses_of = losses_of or _by_decoder(decoder, adapter)
    for group in micro_batches([len(row.input_ids) for row in rows], token_budget):
        batch = pack([rows[i] for i in group])
        losses = losses_of(batch).double().cpu()
        owner = batch.row_of
        place = batch.positions[batch.predict] + 1
        for number, index in enumerate(group):
            mine = owner == number
            answer = mine & (place >= rows[index].answer[0])
            thought = mine & ~answer & (place >= rows[index].reasoning[0])
            found[index] = RowLoss(
                float(losses[thought].sum()), int(thought.sum()), float(losses[answer].sum()), int(answer.sum())
            )
        if on_rows:
            on_rows(len(group))
    return [found[i] for i in range(len(rows))]


def _by_decoder(decoder: Decoder, adapter: Adapter | None) -> Callable[[MicroBatch], Tensor]:
    """Return a function from a micro-batch to the loss of every label."""
    adapters = adapter.prepare(decoder) if adapter is not None else None

    def losses_of(packed: MicroBatch) -> Tensor:
        batch = packed.to(decoder.device)
        attend = PackedAttention(decoder.config.num_kv_heads, batch.row_lengths)
        hidden = decoder(batch.input_ids, batch.positions, attend, adapters)
        if decoder.head.device != decoder.device:
            return linear_cross_entropy_by_vocabulary(
                hidden[batch.predict], decoder.head_parts(), batch.labels, scale=None
            )[0]
        return linear_cross_entropy(hidden[batch.predict], decoder.head, batch.labels)

    return losses_of


def mean_loss(losses: Sequence[RowLoss]) -> float:
    """Loss per label token over all rows, nats."""
    tokens = sum(row.tokens for row in losses)
    return sum(row.total for row in losses) / tokens if tokens else float("nan")
