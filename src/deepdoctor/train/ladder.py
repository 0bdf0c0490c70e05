"""Chooses how the engine runs: micro-batch, rungs and what stays on the GPU, so that memory is filled and no more.

The choice is a search over a few hundred settings. Each has an exact arena (``engine/memory.py``) and a cost in
operations: the products, what is computed again, and bytes moved, counted as the operations a card does meanwhile. The
cheapest setting that fits is taken. Costs only rank settings; speed is measured, not predicted from them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepdoctor.data.pack import micro_batches
from deepdoctor.engine.layout import LayerShape, Rung
from deepdoctor.engine.memory import attention_bytes, fp8_bytes, loss_bytes, plan_arena
from deepdoctor.engine.step import EngineSettings, Products, padded
from deepdoctor.kernels.flash_attention import Backend
from deepdoctor.model.adapter import projection_sizes
from deepdoctor.model.config import ModelConfig

__all__ = ["Choice", "Fixed", "choose", "smallest"]

OPERATIONS_PER_BYTE = 200.0
"""Products a card does while it moves one byte of its own memory: 250 on an H100, 180 on an RTX 4090, 200 on a T4."""
OPERATIONS_PER_HOST_BYTE = 20000.0
"""The same for a byte over PCIe, 25 GB/s on an H100."""
HALF_SPEED_TOKENS = 200
"""A product of this many tokens runs at half speed; 6,000 tokens at 97 %."""
FP8_SHARE = 0.68
"""Time of a product in fp8, its rows' quantising included, as a share of the same in 16 bits, on an H100."""
ELEMENTWISE_SHARE = 0.013
"""Norms and silu * up computed again, as a share of a layer's products; from their bytes."""
HOST_SHARE = 0.01
"""Slow-down by copies beside the arithmetic."""
WORKSPACE = 40 * 2**20
"""cuBLAS' workspace (32 MiB on Hopper, less elsewhere) and small tensors."""
HEAD_PART = 64 * 2**20
"""Bytes of the head that are on the GPU at a time where it lives in host memory."""
MIXES: tuple[tuple[Rung, Rung], ...] = (
    ("keep", "elementwise"),
    ("elementwise", "gate_up"),
    ("elementwise", "layer"),
    ("layer", "host"),
    ("elementwise", "host"),
)
"""Pairs of rungs that are mixed: the second for the first so-many layers."""


@dataclass(frozen=True)
class Fixed:
    """Bytes on the GPU whatever the micro-batch is.

    linears: as held (NF4 or dense). matrices: all bordered matrices in the compute dtype, or with fp8 products the fp8
    copies. dense: whether the linears are such matrices already. embedding, head: in the compute dtype; tied: the head
    is the embedding. fp8: the large products are in fp8.
    """

    linears: int
    matrices: int
    dense: bool
    vectors: int
    embedding: int
    head: int
    tied: bool
    masters: int
    optimizer: int
    fp8: bool = False


@dataclass(frozen=True)
class Choice:
    """Settings of the engine and what they cost. Bytes on the GPU, but host_bytes; cost in operations per step."""

    rungs: tuple[Rung, ...]
    max_tokens: int
    chunk_tokens: int
    logit_tokens: int
    keep_matrices: bool
    attention: Backend
    embedding_on_host: bool
    head_rows: int | None
    micro_batches: float
    parts: dict[str, int]
    host_bytes: int
    cost: float
    extra_work: float
    products: Products = "16bit"

    @property
    def peak_bytes(self) -> int:
        """Most bytes allocated at once."""
        return sum(self.parts.values())

    @property
    def settings(self) -> EngineSettings:
        """What the engine takes."""
        return EngineSettings(
            self.rungs,
            self.max_tokens,
            self.chunk_tokens,
            self.logit_tokens,
            self.keep_matrices,
            self.attention,
            self.head_rows,
            self.products,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; rungs as counts, in order."""
        values = asdict(self)
        values["rungs"] = [[rung, count] for rung, count in self.counts()]
        return values

    def counts(self) -> list[tuple[Rung, int]]:
        """Runs of equal rungs, in layer order."""
        found: list[tuple[Rung, int]] = []
        for rung in self.rungs:
            if found and found[-1][0] == rung:
                found[-1] = (rung, found[-1][1] + 1)
            else:
                found.append((rung, 1))
        return found


@dataclass(frozen=True)
class _Work:
    """Operations per token of one layer's products, by part, and of the head."""

    qkv: float
    o: float
    gate_up: float
    down: float
    head: float
    attention: float

    @property
    def layer(self) -> float:
        return self.qkv + self.o + self.gate_up + self.down

    def again(self, rung: Rung) -> float:
        """What a rung computes twice, per token."""
        if rung == "keep":
            return 0.0
        found = ELEMENTWISE_SHARE * 2 * self.layer
        if rung == "gate_up":
            found += self.gate_up
        if rung in ("layer", "host"):
            found += self.qkv + self.o + self.gate_up + self.attention
        if rung == "host":
            found += HOST_SHARE * 2 * self.layer
        return found


def _work(config: ModelConfig, mean_row: float, fp8: bool) -> _Work:
    share = FP8_SHARE if fp8 else 1.0
    size = {name: 2.0 * out * inn * share for name, (out, inn) in projection_sizes(config).items()}
    return _Work(
        size["q_proj"] + size["k_proj"] + size["v_proj"],
        size["o_proj"],
        size["gate_proj"] + size["up_proj"],
        size["down_proj"],
        2.0 * config.vocab_size * config.hidden_size,
        2.0 * config.num_heads * config.head_dim * mean_row,
    )


def choose(
    config: ModelConfig,
    shape: LayerShape,
    fixed: Fixed,
    steps: Sequence[Sequence[int]],
    room: int,
    *,
    element: int,
    attention: Backend,
    budget: int | None = None,
    max_rows: int | None = None,
    longest: int = 0,
    exact: bool = True,
) -> Choice | None:
    """Return the cheapest setting that takes at most ``room`` bytes, or None where none does.

    steps: row lengths of some or all optimizer steps. budget: a micro-batch's tokens, where the user set them.
    max_rows: most rows of a micro-batch. longest: tokens of the longest row of all. exact: whether ``steps`` are all
    steps, so that no micro-batch is larger than the largest of theirs.
    """
    best: Choice | None = None
    longest = max(longest, max(max(step) for step in steps))
    squares, tokens_seen = (sum(n**power for step in steps for n in step) for power in (2, 1))
    work = _work(config, squares / tokens_seen, fixed.fp8)
    for tokens in _budgets(steps, longest, budget):
        groups = [micro_batches(step, tokens, max_rows, balanced=True) for step in steps]
        sizes = [[sum(step[i] for i in g) for g in cut] for step, cut in zip(steps, groups, strict=True)]
        largest = padded(max(longest, max(max(cut) for cut in sizes)) if exact else tokens)
        for placed in _placements(fixed):
            setting = _Setting(config, shape, fixed, element, attention, largest, sizes, work, *placed)
            for candidate in setting.fits(room):
                if best is None or candidate.cost < best.cost:
                    best = candidate
    return best


def _budgets(steps: Sequence[Sequence[int]], longest: int, budget: int | None) -> list[int]:
    if budget is not None:
        return [max(budget, longest)]
    whole = max(sum(step) for step in steps)
    cuts = {max(longest, -(-whole // parts)) for parts in (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)}
    return sorted(cuts | {longest}, reverse=True)


def _placements(fixed: Fixed) -> Iterator[tuple[bool, bool, bool]]:
    """Ways to place things: (matrices kept, embedding on the host, head on the host)."""
    for keep in (True,) if fixed.dense or fixed.fp8 else (True, False):
        yield keep, False, False
        if not fixed.tied:
            yield keep, True, False
            yield keep, True, True


@dataclass(frozen=True)
class _Setting:
    """Everything that a mix of rungs, a chunk and a placement are weighed with."""

    config: ModelConfig
    shape: LayerShape
    fixed: Fixed
    element: int
    attention: Backend
    tokens: int
    sizes: Sequence[Sequence[int]]
    work: _Work
    keep: bool
    embedding_on_host: bool
    head_on_host: bool

    @property
    def base(self) -> dict[str, int]:
        """Bytes that no rung changes."""
        fixed, keep = self.fixed, self.keep
        return {
            "weights": (fixed.matrices if fixed.dense else fixed.linears) + fixed.vectors,
            "embedding": 0 if self.embedding_on_host else fixed.embedding,
            "head": 0 if self.head_on_host or fixed.tied else fixed.head,
            "matrices": fixed.matrices if keep and not fixed.dense else 0,
            "adapter": 2 * fixed.masters,
            "optimizer": fixed.optimizer,
            "workspace": WORKSPACE + self.tokens * (4 * self.shape.head_dim + 48),
        }

    @property
    def head_rows(self) -> int | None:
        """Rows of the head at once where it lies in host memory."""
        return max(1024, HEAD_PART // (self.shape.hidden * self.element)) if self.head_on_host else None

    def memory(self, rungs: tuple[Rung, ...], chunk: int, logit_tokens: int) -> tuple[dict[str, int], int]:
        """Bytes of one ladder by part, and in host memory."""
        shape, tokens, element = self.shape, self.tokens, self.element
        arena = plan_arena(shape, rungs, tokens, chunk, element, self.keep)
        factors, temporary = attention_bytes(shape, rungs, tokens, element, self.attention)
        loss = loss_bytes(shape, tokens, self.config.vocab_size, logit_tokens, element, self.head_rows)
        parts = {**self.base, "arena": arena.nbytes, "attention and loss": factors + max(temporary, loss)}
        if self.fixed.fp8:
            parts["fp8 rows"] = fp8_bytes(shape, min(chunk, tokens))
        return parts, arena.host_bytes

    def peak(self, rungs: tuple[Rung, ...], chunk: int, logit_tokens: int) -> int:
        """Bytes of one ladder."""
        return sum(self.memory(rungs, chunk, logit_tokens)[0].values())

    def choice(self, rungs: tuple[Rung, ...], chunk: int, logit_tokens: int) -> Choice:
        """Weigh one ladder."""
        tokens, fixed, head_rows = self.tokens, self.fixed, self.head_rows
        parts, arena_host = self.memory(rungs, chunk, logit_tokens)
        cost, extra = _cost(self.config, fixed, self.work, rungs, chunk, self.sizes, self.keep, head_rows, logit_tokens)
        host = arena_host + (fixed.embedding if self.embedding_on_host else 0)
        return Choice(
            rungs,
            tokens,
            chunk,
            logit_tokens,
            self.keep,
            self.attention,
            self.embedding_on_host,
            head_rows,
            sum(len(cut) for cut in self.sizes) / len(self.sizes),
            parts,
            host + (fixed.head if self.head_on_host else 0),
            cost * (1.002 if self.embedding_on_host else 1.0),
            extra,
            "fp8" if fixed.fp8 else "16bit",
        )

    def chunks(self) -> list[int]:
        """Chunks worth weighing, largest first."""
        sizes = {min(self.tokens, count) for count in (512, 2048, 8192)}
        return sorted(sizes, reverse=True)

    def fits(self, room: int) -> Iterator[Choice]:
        """For each mix of rungs and chunk, the ladder with the fewest layers on the leaner rung that fits."""
        left = room - sum(self.base.values())
        if left <= 0:
            return
        largest = _logit_tokens(left, self.config.vocab_size, self.element, self.tokens)
        layers = self.config.num_layers
        for chunk, logits in itertools.product(self.chunks(), _logit_choices(largest)):
            for dense, lean in MIXES:
                low, high = 0, layers
                if self.peak((lean,) * layers, chunk, logits) > room:
                    continue
                while low < high:
                    middle = (low + high) // 2
                    rungs = (lean,) * middle + (dense,) * (layers - middle)
                    if self.peak(rungs, chunk, logits) <= room:
                        high = middle
                    else:
                        low = middle + 1
                yield self.choice((lean,) * high + (dense,) * (layers - high), chunk, logits)


def _logit_tokens(left: int, vocab: int, element: int, tokens: int) -> int:
    """Tokens whose logits exist at once: as many as a twentieth of the free memory holds, 128 to 2,048."""
    wanted = left // 20 // (vocab * element)
    for count in (2048, 1024, 512, 256):
        if wanted >= count:
            return min(count, -(-tokens // 128) * 128)
    return 128


def _logit_choices(largest: int) -> list[int]:
    """Numbers of tokens up to ``largest`` that are worth weighing."""
    return sorted({largest, *(count for count in (128, 256, 512, 1024) if count < largest)}, reverse=True)


def _cost(
    config: ModelConfig,
    fixed: Fixed,
    work: _Work,
    rungs: Sequence[Rung],
    chunk: int,
    sizes: Sequence[Sequence[int]],
    keep: bool,
    head_rows: int | None,
    logit_tokens: int,
) -> tuple[float, float]:
    """Operations of a mean step, and the share that recompute adds to the products."""
    plain = config.num_layers * (2 * work.layer + 3.5 * work.attention) + 2 * work.head
    again = sum(work.again(rung) * count for rung, count in Counter(rungs).items())
    # Few tokens at once, and the head's product waits for the head to be read, once forward and once backward.
    waits = max(0.0, 2 * fixed.head * OPERATIONS_PER_BYTE / logit_tokens - 2 * work.head)
    per_micro_batch = 0.0
    if not keep:
        # Read as NF4 and written in the compute dtype, once forward and once backward.
        per_micro_batch += 2 * (fixed.linears + fixed.matrices) * OPERATIONS_PER_BYTE
    if head_rows is not None:
        per_micro_batch += 2 * fixed.head * OPERATIONS_PER_HOST_BYTE + work.head
    cuts = [tokens for cut in sizes for tokens in cut]
    # Tokens, and what small products take longer, as tokens too.
    seen, slower = sum(cuts), sum(HALF_SPEED_TOKENS * tokens / min(tokens, chunk) for tokens in cuts)
    total = (plain + again) * (seen + slower) + waits * seen + per_micro_batch * len(cuts)
    return total / len(sizes), again / plain


def smallest(
    config: ModelConfig, shape: LayerShape, fixed: Fixed, tokens: int, *, element: int, attention: Backend
) -> Choice:
    """Return the setting that takes least memory for micro-batches of ``tokens``, whatever it costs."""
    work = _work(config, tokens, fixed.fp8)
    found = []
    for placed in _placements(fixed):
        setting = _Setting(config, shape, fixed, element, attention, tokens, [[tokens]], work, *placed)
        for rung in ("layer", "host"):
            found.append(setting.choice((rung,) * config.num_layers, min(tokens, 512), 128))
    return min(found, key=lambda choice: choice.peak_bytes)
