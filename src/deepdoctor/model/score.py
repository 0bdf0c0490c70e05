"""How likely given continuations are: log probabilities without drawing a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from deepdoctor.errors import UsageError
from deepdoctor.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_by_vocabulary
from deepdoctor.model.adapter import Adapter, RowSwitch
from deepdoctor.model.decoder import Decoder, PackedAttention

__all__ = ["Continuation", "score"]


@dataclass(frozen=True, slots=True)
class Continuation:
    """What is scored: ids after prompt_ids. tuned: whether the adapter acts."""

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    tuned: bool = False


@torch.inference_mode()
def score(
    decoder: Decoder, adapter: Adapter | None, continuations: Sequence[Continuation], token_budget: int = 4096
) -> list[list[float]]:
    """Return the log probability (nats) of every continuation's every token, given all tokens before it.

    token_budget: packed tokens run at once; a longer continuation runs alone. Logits are never kept. Raises UsageError
    for an empty prompt, one that fills the model's positions, or a tuned continuation without an adapter.
    """
    limit = decoder.config.max_position_embeddings
    for number, c in enumerate(continuations):
        if not c.prompt_ids:
            raise UsageError(f"continuation {number} has an empty prompt")
        if len(c.prompt_ids) + len(c.ids) > limit:
            raise UsageError(
                f"continuation {number} has {len(c.prompt_ids) + len(c.ids)} tokens with its prompt; the model takes "
                f"at most {limit}"
            )
        if c.tuned and adapter is None:
            raise UsageError(f"continuation {number} asks the tuned side, but no adapter was given")
    switch = RowSwitch()
    adapters = adapter.prepare(decoder, switch) if adapter is not None else None
    scores: list[list[float]] = [[] for _ in continuations]
    device = decoder.device
    for group in _groups(continuations, token_budget):
        rows = [[*continuations[i].prompt_ids, *continuations[i].ids] for i in group]
        lengths = [len(row) for row in rows]
        tuned = torch.tensor([continuations[i].tuned for i in group])
        switch.mask = tuned.to(decoder.compute_dtype)[:, None].repeat_interleave(torch.tensor(lengths), 0).to(device)
        ids = torch.tensor([token for row in rows for token in row], device=device)
        places = torch.cat([torch.arange(n) for n in lengths]).to(device)
        attend = PackedAttention(decoder.config.num_kv_heads, lengths)
        hidden = decoder(ids, places, attend, adapters if bool(tuned.any()) else None)
        starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        predict = torch.cat(
            [
                torch.arange(len(continuations[i].ids)) + start + len(continuations[i].prompt_ids) - 1
                for i, start in zip(group, starts.tolist(), strict=True)
            ]
        ).to(device)
        labels = ids[predict + 1]
        if decoder.head.device == device:
            losses = linear_cross_entropy(hidden[predict], decoder.head, labels)
        else:
            losses = linear_cross_entropy_by_vocabulary(hidden[predict], decoder.head_parts(), labels, scale=None)[0]
        counts = [len(continuations[i].ids) for i in group]
        for i, part in zip(group, losses.double().cpu().split(counts), strict=True):
            scores[i] = (-part).tolist()
    return scores


def _groups(continuations: Sequence[Continuation], token_budget: int) -> Iterator[list[int]]:
    """Cut the continuations that have tokens into groups of at most so many, in order."""
    group: list[int] = []
    tokens = 0
    for number, c in enumerate(continuations):
        if not c.ids:
            continue
        size = len(c.prompt_ids) + len(c.ids)
        if group and tokens + size > token_budget:
            yield group
            group, tokens = [], 0
        group.append(number)
        tokens += size
    if group:
        yield group
