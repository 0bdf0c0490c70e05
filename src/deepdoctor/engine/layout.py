"""Which buffers a layer needs, by rung of the recompute ladder: the tables that both the engine and the plan read.

Letters: T tokens of the micro-batch, C tokens at once (a chunk), D hidden, Q columns of qkv, A = N H columns of the
attention's output, F feed-forward, R rows that the adapters add to a product. Buffers that feed a product are that much
wider: ``[x, x A^T]`` lies in one row, see ``engine/bordered.py``.

Rungs, from fastest to leanest; each drops more of what backward needs and computes it again:

keep         nothing
elementwise  the normalised inputs and silu(gate) * up
gate_up      + the gate/up product
layer        everything but the layer's input
host         as ``layer``, and the input waits in host memory
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from deepdoctor.model.config import ModelConfig
from deepdoctor.model.decoder import LINEARS

__all__ = [
    "RUNGS",
    "LayerShape",
    "Rung",
    "Shapes",
    "backward_chunk",
    "backward_layer",
    "forward_chunk",
    "forward_layer",
    "saved",
]

Rung = Literal["keep", "elementwise", "gate_up", "layer", "host"]
RUNGS: tuple[Rung, ...] = get_args(Rung)
RANK_STEP = 16
"""Adapter rows are padded to a multiple of this: fp8 products take such widths, and every row of a buffer starts at a
multiple of 16 bytes."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer. ranks: padded adapter rows of qkv, o, gate_up and down."""

    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    wide: int
    ranks: tuple[int, int, int, int]
    qk_norm: bool

    @classmethod
    def of(cls, config: ModelConfig, rank: int, targets: tuple[str, ...]) -> LayerShape:
        """Return the shape for a model and an adapter of ``rank`` on ``targets``."""
        rows = [sum(name in targets for name in names) * rank for names in LINEARS]
        qkv, o, gate_up, down = (-(-count // RANK_STEP) * RANK_STEP for count in rows)
        return cls(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            (qkv, o, gate_up, down),
            config.qk_norm,
        )

    @property
    def qkv(self) -> int:
        """Columns of q, k and v together."""
        return (self.heads + 2 * self.key_heads) * self.head_dim

    @property
    def attended(self) -> int:
        """Columns of the attention's output."""
        return self.heads * self.head_dim

    @property
    def stream(self) -> int:
        """Columns of the gradient stream: hidden, and room for the adapters of o and down."""
        return self.hidden + max(self.ranks[1], self.ranks[3])

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shapes (O + R, I + R) of the four bordered matrices."""
        rq, ro, rg, rd = self.ranks
        return {
            "qkv": (self.qkv + rq, self.hidden + rq),
            "o": (self.hidden + ro, self.attended + ro),
            "gate_up": (2 * self.wide + rg, self.hidden + rg),
            "down": (self.hidden + rd, self.wide + rd),
        }


def saved(shape: LayerShape, rung: Rung, tokens: int) -> Shapes:
    """Buffers that live from a layer's forward to its backward; its input comes on top."""
    if rung in ("layer", "host"):
        return {}
    rq, ro, rg, rd = shape.ranks
    found: Shapes = {
        "qkv": (tokens, shape.qkv),
        "heads": (tokens, shape.attended + ro),
        "x_mid": (tokens, shape.hidden),
    }
    if shape.qk_norm:
        found["qk_raw"] = (tokens, (shape.heads + shape.key_heads) * shape.head_dim)
    if rung == "keep":
        found["n1"] = (tokens, shape.hidden + rq)
        found["n2"] = (tokens, shape.hidden + rg)
        found["act"] = (tokens, shape.wide + rd)
    else:
        found["u1"] = (tokens, rq)
    if rung == "elementwise":
        found["u2"] = (tokens, rg)
        found["ud"] = (tokens, rd)
    if rung != "gate_up":
        found["gu"] = (tokens, 2 * shape.wide + rg)
    return found


def forward_layer(shape: LayerShape, rung: Rung, tokens: int) -> Shapes:
    """Scratch of a layer's forward that spans all tokens; ``qkv`` is given back after the attention."""
    if rung not in ("layer", "host"):
        return {}
    return {"heads": (tokens, shape.attended + shape.ranks[1]), "qkv": (tokens, shape.qkv)}


def forward_chunk(shape: LayerShape, rung: Rung, chunk: int) -> tuple[Shapes, Shapes]:
    """Scratch of one chunk in forward: before and after the attention."""
    rq, _, rg, rd = shape.ranks
    before: Shapes = {} if rung == "keep" else {"n1": (chunk, shape.hidden + rq)}
    after: Shapes = {}
    if rung != "keep":
        after["n2"] = (chunk, shape.hidden + rg)
        after["act"] = (chunk, shape.wide + rd)
    if rung in ("gate_up", "layer", "host"):
        after["gu"] = (chunk, 2 * shape.wide + rg)
    if rung in ("layer", "host"):
        after["x_mid"] = (chunk, shape.hidden)
    return before, after


def backward_layer(shape: LayerShape, rung: Rung, tokens: int) -> Shapes:
    """Scratch of a layer's backward that spans all tokens."""
    found: Shapes = {"d_heads": (tokens, shape.attended)}
    if rung in ("layer", "host"):
        found["heads"] = (tokens, shape.attended + shape.ranks[1])
        found["qkv"] = (tokens, shape.qkv)
        found["u1"] = (tokens, shape.ranks[0])
        if shape.qk_norm:
            found["qk_raw"] = (tokens, (shape.heads + shape.key_heads) * shape.head_dim)
    return found


def backward_chunk(shape: LayerShape, rung: Rung, chunk: int) -> tuple[Shapes, Shapes, Shapes]:
    """Scratch of one chunk in backward: recompute up to the attention, feed-forward and o, then qkv."""
    rq, _, rg, rd = shape.ranks
    again: Shapes = {"n1": (chunk, shape.hidden + rq)} if rung in ("layer", "host") else {}
    middle: Shapes = {"d_act": (chunk, shape.wide), "d_n2": (chunk, shape.hidden)}
    if rung != "keep":
        middle["n2"] = (chunk, shape.hidden + rg)
        middle["act"] = (chunk, shape.wide)
    if rung in ("gate_up", "layer", "host"):
        middle["gu"] = (chunk, 2 * shape.wide + rg)
        middle["ud"] = (chunk, rd)
    if rung in ("layer", "host"):
        middle["x_mid"] = (chunk, shape.hidden)
    last: Shapes = {"d_qkv": (chunk, shape.qkv + rq), "d_n1": (chunk, shape.hidden)}
    if rung != "keep":
        last["n1"] = (chunk, shape.hidden)
    return again, middle, last
