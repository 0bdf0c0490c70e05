"""Bytes the engine will hold for given rungs and micro-batch, from the tables of ``engine/layout.py``.

The arena's size is exact (a test holds that a run uses all of it and no more). What the attention and the loss take
beside it is worked out from what these allocate, and so is what fp8 products hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from deepdoctor.engine.arena import aligned
from deepdoctor.engine.layout import (
    LayerShape,
    Rung,
    Shapes,
    backward_chunk,
    backward_layer,
    forward_chunk,
    forward_layer,
    saved,
)

__all__ = [
    "ArenaPlan",
    "attention_bytes",
    "fp8_bytes",
    "fp8_matrix_bytes",
    "host_layers",
    "loss_bytes",
    "plan_arena",
    "widest_row",
]

RING = 3
"""Inputs of offloaded layers that are on the GPU at a time: the one in use, the one that comes, the one that leaves."""


@dataclass(frozen=True)
class ArenaPlan:
    """nbytes: the arena's size. host_bytes: pinned host memory for offloaded inputs."""

    nbytes: int
    host_bytes: int


def host_layers(rungs: Sequence[Rung]) -> int:
    """Number of offloaded layers; they are the first ones."""
    count = sum(rung == "host" for rung in rungs)
    assert all(rung == "host" for rung in rungs[:count]), "offloaded layers come first"
    return count


def _total(shapes: Shapes, element: int) -> int:
    total = 0
    for sides in shapes.values():
        nbytes = element
        for side in sides:
            nbytes *= side
        total += aligned(nbytes)
    return total


def plan_arena(
    shape: LayerShape, rungs: Sequence[Rung], tokens: int, chunk: int, element: int, kept_matrices: bool
) -> ArenaPlan:
    """Return the memory for one micro-batch.

    rungs: one per layer. tokens: largest micro-batch. chunk: tokens at once. element: bytes of an activation.
    kept_matrices: whether the frozen matrices lie ready in the compute dtype, or are made in the arena at each use.
    """
    chunk = min(chunk, tokens)
    matrices = {name: _total({name: sides}, element) for name, sides in shape.matrices().items()}
    if kept_matrices:
        matrices = dict.fromkeys(matrices, 0)
    late = matrices["o"] + matrices["gate_up"] + matrices["down"]
    x = _total({"x": (tokens, shape.hidden)}, element)
    hosted = host_layers(rungs)
    needs = {rung: _layer_needs(shape, rung, tokens, chunk, element, matrices["qkv"], late) for rung in set(rungs)}
    level = _total({"stream": (tokens, shape.stream)}, element)
    level += RING * x if hosted else x
    most = level
    for number, rung in enumerate(rungs):
        if number + 1 >= hosted and not (number + 1 == len(rungs) == hosted):
            level += x
        lasting, scratch = needs[rung]
        level += lasting
        most = max(most, level + scratch)
    # A forward alone, for losses: two inputs in turns and a layer that keeps nothing.
    alone_shapes = forward_layer(shape, "layer", tokens)
    before, after = forward_chunk(shape, "layer", chunk)
    alone = matrices["qkv"] + _total({"qkv": alone_shapes["qkv"]}, element) + _total(before, element)
    alone = max(alone, late + _total(after, element)) + _total({"heads": alone_shapes["heads"]}, element)
    most = max(most, 2 * x + alone)
    return ArenaPlan(most, hosted * x)


@functools.cache
def _layer_needs(
    shape: LayerShape, rung: Rung, tokens: int, chunk: int, element: int, early: int, late: int
) -> tuple[int, int]:
    """Bytes a layer leaves on the arena for its backward, and its most scratch. early, late: matrices made anew."""
    across_shapes = forward_layer(shape, rung, tokens)
    before, after = forward_chunk(shape, rung, chunk)
    across = _total(across_shapes, element)
    qkv = _total({"qkv": across_shapes["qkv"]}, element) if across_shapes else 0
    again, middle, final = backward_chunk(shape, rung, chunk)
    backward = max(
        early + _total(again, element) if again else 0,
        late + _total(middle, element),
        early + _total(final, element),
    )
    scratch = max(
        across + early + _total(before, element),
        across - qkv + late + _total(after, element),
        _total(backward_layer(shape, rung, tokens), element) + backward,
    )
    return _total(saved(shape, rung, tokens), element), scratch


def attention_bytes(
    shape: LayerShape, rungs: Sequence[Rung], tokens: int, element: int, backend: str
) -> tuple[int, int]:
    """Bytes the attention holds beside the arena: factors kept for backward, and the temporaries of one layer."""
    kept = sum(rung not in ("layer", "host") for rung in rungs)
    lse = 4 * tokens * shape.heads
    queries, keys = tokens * shape.attended * element, tokens * shape.key_heads * shape.head_dim * element
    wide = tokens * shape.attended * 4
    groups = shape.heads // shape.key_heads
    temporary = {
        # dq, dk, dv; dq summed in fp32; dk and dv per query head before their group is summed, or in fp32 (fa4).
        "fa4": queries + 2 * keys + wide + (4 * keys if groups > 1 else 0) + 2 * lse,
        "flash": queries + 2 * keys + wide + (2 * queries if groups > 1 else 0) + lse,
        "efficient": 5 * queries + 2 * keys + wide + lse,
        "rows": queries + 2 * keys,
    }[backend]
    out = queries if backend in ("flash", "efficient") else 0
    return kept * lse, lse + max(temporary, out)


def loss_bytes(shape: LayerShape, tokens: int, vocab: int, logit_tokens: int, element: int, parts: int | None) -> int:
    """Bytes of the last norm, the head's product and its gradient. parts: rows of the head at once, None for all."""
    if parts is None:
        rows = min(logit_tokens, tokens)
        return rows * (vocab * element + 4 * shape.hidden * element + 16)
    logits = min(tokens, logit_tokens) * parts * (element + 4)
    return 2 * parts * shape.hidden * element + logits + tokens * shape.hidden * (4 * element + 8)


def widest_row(shape: LayerShape) -> int:
    """Columns of the widest row that enters a product, in either direction."""
    return max(max(sides) for sides in shape.matrices().values())


def fp8_bytes(shape: LayerShape, chunk: int) -> int:
    """Bytes of the quantised rows of one product, and their scales. chunk: tokens at once."""
    return aligned(chunk * widest_row(shape)) + aligned(4 * chunk)


def fp8_matrix_bytes(shape: LayerShape, element: int) -> int:
    """Bytes of one layer's fp8 copies, their scales, and A and B in the compute dtype (``engine/bordered_fp8.py``)."""
    total = 0
    for (height, width), rank in zip(shape.matrices().values(), shape.ranks, strict=True):
        out, inn = height - rank, width - rank
        parts = (out * width, inn * height, 4 * out, 4 * inn, element * rank * inn, element * rank * out)
        total += sum(aligned(part) for part in parts)
    return total
