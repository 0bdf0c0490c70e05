"""One token per slot over a paged cache, with nothing on the host between the first operation and the logits.

Everything is written into buffers made once, and what changes from step to step (tokens, positions, lengths, block
table, adapter masks) is read on the device. So on a GPU a step is captured in a CUDA graph, one for each number of rows
in BUCKETS, and replayed. Rows beyond the slots in use are idle: token 0, position -1, length 0, no adapter.

Up to 32 rows an NF4 matrix is read as it is, adapter and bias joined to the product (``kernels/nf4_thin.py``). Any
other product is ``y = (u L^T + bias) + x W^T`` with the second sum in fp32: the adapter's part is rounded while it is
small, and x W^T is not rounded before the sum (docs/decisions/0009-adapters-round-once.md). W is then the dense matrix,
a dequantised copy, or one buffer that every matrix is dequantised into in turn.

D hidden, F feed-forward, N query heads, K key heads, H head dim, V vocabulary, O and I the sides of a weight, R the
ranks of the adapters of one matrix together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepdoctor.kernels.bordered_nf4 import write_base
from deepdoctor.kernels.choose import use_triton
from deepdoctor.kernels.nf4 import NF4Weight
from deepdoctor.kernels.nf4_thin import THIN_RANK, THIN_ROWS, ThinLinear, thin_lora
from deepdoctor.kernels.paged_attention import (
    no_eight_bits_because,
    paged_attention,
    paged_scratch_elements,
    rope_and_store,
)
from deepdoctor.kernels.rms_norm import add_rms_norm
from deepdoctor.kernels.rope import rope_tables
from deepdoctor.kernels.swiglu import swiglu_forward
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.block_pool import BLOCK, PagedCache, blocks_of
from deepdoctor.model.decoder import Decoder, DecoderLayer, FrozenLinear
from deepdoctor.model.sides import Adapters, LoraStack, by_side

__all__ = ["BUCKETS", "PagedStep", "bucket_of"]

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows a step is made for; beyond the last, multiples of 64."""
ATTENTION_PROGRAMS = 4
"""Programs per multiprocessor that attention is cut into."""
LORA_ROWS = 64
"""Most rows whose u is better summed by ``thin_lora`` than by a matrix product and a mask."""
MOST_SPLITS = 32


def bucket_of(slots: int) -> int:
    """Rows of the smallest step that holds so many slots."""
    return next((rows for rows in BUCKETS if rows >= slots), -(-slots // 64) * 64)


def _buckets_to(most: int) -> list[int]:
    """Every bucket up to this one."""
    return [rows for rows in (*BUCKETS, *range(BUCKETS[-1] + 64, most + 1, 64)) if rows <= most]


@dataclass(frozen=True)
class _Piece:
    """A thin product and the columns of y that it writes."""

    linear: ThinLinear
    lora: LoraStack | None
    columns: slice


class _Masks:
    """Which rows each column of u counts for, in the compute dtype: 1 where the row has the column's adapter.

    With one adapter all columns are alike, and one mask (rows, 1) serves all products; with several there is one
    (rows, R) for every order of columns.
    """

    def __init__(self, rows: int, adapters: int, dtype: torch.dtype, device: torch.device):
        self.several = adapters > 1
        self.numbers = torch.full((rows,), -1, device=device)
        """Of each row's adapter, int64, -1 for none."""
        self._owners: dict[tuple[int, ...], Tensor] = {}
        self._of: dict[tuple[int, ...], Tensor] = {}
        self._dtype = dtype

    def add(self, stack: LoraStack) -> None:
        """Make the mask of these columns, once and before the first step."""
        owners = self._key(stack)
        if owners not in self._of:
            self._owners[owners] = torch.tensor(owners, device=self.numbers.device)
            self._of[owners] = torch.zeros(
                len(self.numbers), len(owners), dtype=self._dtype, device=self.numbers.device
            )

    def of(self, stack: LoraStack) -> Tensor:
        """The mask of these columns, the same tensor at every call."""
        return self._of[self._key(stack)]

    def set(self, numbers: Tensor) -> None:
        """numbers (rows,) int64, on the host: of each row's adapter, -1 for none."""
        self.numbers.copy_(numbers, non_blocking=True)
        for owners, mask in self._of.items():
            mask.copy_(self.numbers[:, None] == self._owners[owners])

    def _key(self, stack: LoraStack) -> tuple[int, ...]:
        return stack.owners if self.several else (0,)


class _Buffers:
    """What all products share: masks, u, fp32 scratch of the kernels, a place for one dequantised matrix."""

    def __init__(self, rows: int, adapters: int, dtype: torch.dtype, device: torch.device):
        self.masks = _Masks(rows, adapters, dtype, device)
        self.u = self.dense = torch.empty(0, dtype=dtype, device=device)
        self.scratch = torch.empty(0, dtype=torch.float32, device=device)

    def reserve(self, u: int, dense: int, scratch: int) -> None:
        """Make the buffers large enough for so many elements of each."""
        self.u, self.dense = self.u.new_empty(u), self.u.new_empty(dense)
        self.scratch = self.scratch.new_empty(scratch)

    def u_of(self, rows: int, rank: int) -> Tensor:
        """A contiguous (rows, rank)."""
        return self.u[: rows * rank].view(rows, rank)


class _Product:
    """y = x W^T (+ bias) (+ u L^T) for one frozen matrix."""

    def __init__(
        self, linear: FrozenLinear, number: int, adapters: Sequence[Adapter], buffers: _Buffers, keep_dense: bool
    ):
        self.frozen, self.buffers = linear, buffers
        whole = range(len(linear.names))
        self.lora = LoraStack.of(linear, whole, number, adapters)
        self.late = False
        """Whether the ranks are too many for a thin product, so that the adapter is added to a y that is rounded."""
        self.pieces: list[_Piece] = []
        self.kept: Tensor | None = None
        if linear.parts is not None:
            if all(isinstance(part, NF4Weight) for part in linear.parts):
                self.pieces = self._pieces(number, adapters)
            if keep_dense:
                self.kept = linear.dense()
        for lora in (self.lora, *(piece.lora for piece in self.pieces)):
            if lora is not None:
                buffers.masks.add(lora)

    def _pieces(self, number: int, adapters: Sequence[Adapter]) -> list[_Piece]:
        """The whole matrix as one thin product, or one for each projection where together they have too many ranks."""
        linear, whole = self.frozen, range(len(self.frozen.names))
        groups: list[range] = [whole]
        loras: list[LoraStack | None] = [self.lora]
        if self.lora is not None and len(self.lora.owners) > THIN_RANK:
            single = [range(n, n + 1) for n in whole]
            of_single = [LoraStack.of(linear, group, number, adapters) for group in single]
            self.late = any(lora is not None and len(lora.owners) > THIN_RANK for lora in of_single)
            loras = [None] if self.late else of_single
            groups = groups if self.late else single
        pieces = []
        for group, lora in zip(groups, loras, strict=True):
            first, last = linear.starts[group[0]], linear.starts[group[-1]] + linear.sizes[group[-1]]
            parts = [part for part in linear.parts[group.start : group.stop] if isinstance(part, NF4Weight)]  # type: ignore[index]
            bias = None if linear.bias is None else linear.bias[first:last]
            thin = ThinLinear(parts, linear.compute_dtype, bias=bias, lora=None if lora is None else lora.b)
            pieces.append(_Piece(thin, lora, slice(first, last)))
        if linear.device.type == "cuda" and not all(piece.linear.fused for piece in pieces):
            # A width that the kernel does not take: dequantising and multiplying is faster than its reference.
            return []
        return pieces

    def sizes(self, rows: int) -> tuple[int, int, int]:
        """Elements of u, dense and scratch that up to ``rows`` rows need."""
        few = _buckets_to(min(rows, THIN_ROWS))
        scratch = max((piece.linear.scratch_elements(n) for piece in self.pieces for n in few), default=0)
        written = self.frozen.parts is not None and self.kept is None and (rows > THIN_ROWS or not self.pieces)
        dense = sum(self.frozen.sizes) * self.frozen.in_features if written else 0
        return (0 if self.lora is None else rows * self.lora.a.shape[0]), dense, scratch

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x (n, I) -> out (n, O), both contiguous."""
        if self.pieces and x.shape[0] <= THIN_ROWS:
            self._thin(x, out)
            return
        weight, bias = self._weight(), self.frozen.bias
        if self.lora is None:
            _multiply(x, weight, bias, out)
        else:
            _multiply(self._u(x, self.lora), self.lora.b, bias, out)
            out.addmm_(x, weight.T)

    def _thin(self, x: Tensor, out: Tensor) -> None:
        for piece in self.pieces:
            u = None if piece.lora is None else self._u(x, piece.lora)
            piece.linear(x, out[:, piece.columns], u, self.buffers.scratch)
        if self.late and self.lora is not None:
            out.addmm_(self._u(x, self.lora), self.lora.b.T)

    def _u(self, x: Tensor, lora: LoraStack) -> Tensor:
        """(x A^T) · mask, (n, R); zero in the columns of other adapters than the row's."""
        rows, rank = x.shape[0], lora.a.shape[0]
        u, mask = self.buffers.u_of(rows, rank), self.buffers.masks.of(lora)[:rows]
        if rows > LORA_ROWS or rank > THIN_RANK:
            return torch.mm(x, lora.a.T, out=u).mul_(mask)
        if self.buffers.masks.several:
            return thin_lora(x, lora.a, u).mul_(mask)
        return thin_lora(x, lora.a, u, mask)

    def _weight(self) -> Tensor:
        """W (O, I)."""
        if self.kept is not None:
            return self.kept
        if self.frozen.parts is None:
            return self.frozen.dense()
        shape = (sum(self.frozen.sizes), self.frozen.in_features)
        weight = self.buffers.dense[: shape[0] * shape[1]].view(shape)
        write_base(weight, self.frozen.parts)
        return weight


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x W^T (+ bias)."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


class _Layer:
    """A layer's products and norms; head_norm (N + K, H): the weights of Qwen3's q and k norms, head by head."""

    def __init__(self, layer: DecoderLayer, products: Sequence[_Product]):
        self.qkv, self.o, self.gate_up, self.down = products
        self.input_norm, self.post_attention_norm = layer.input_norm, layer.post_attention_norm
        self.head_norm: Tensor | None = None
        if layer.q_norm is not None and layer.k_norm is not None:
            heads, key_heads, _ = layer.heads
            self.head_norm = torch.cat([layer.q_norm.expand(heads, -1), layer.k_norm.expand(key_heads, -1)])


class PagedStep:
    """The decoder for one new token per slot.

    slots: most slots. positions: most of a slot. keep_dense: keep dequantised weights for more than 32 rows. graphs:
    replay CUDA graphs where the kernels can be captured, which is on a GPU in 16 bits.

    Before a call, the caller fills inputs (3, rows) int32: tokens, their positions, and lengths with the new token;
    block_table (rows, M) int32; and calls ``switch`` where sides have changed.
    """

    def __init__(
        self,
        decoder: Decoder,
        adapters: Adapters,
        cache: PagedCache,
        slots: int,
        positions: int,
        keep_dense: bool = False,
        graphs: bool = True,
    ):
        config, device = decoder.config, decoder.device
        self.decoder, self.config, self.cache, self.device = decoder, config, cache, device
        self.rows = rows = bucket_of(slots)
        self.inputs = torch.zeros(3, rows, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(rows, blocks_of(positions), dtype=torch.int32, device=device)
        of_side = by_side(adapters)
        self.adapters = {side: number for number, side in enumerate(of_side)}
        """Numbers by side."""
        self._buffers = _Buffers(rows, len(of_side), decoder.compute_dtype, device)
        self.layers: list[_Layer] = []
        sizes = [(0, 0, self._attention_scratch())]
        for number, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            kept = keep_dense and rows > THIN_ROWS
            products = [_Product(li, number, [*of_side.values()], self._buffers, kept) for li in layer.linears]
            sizes += [product.sizes(rows) for product in products]
            self.layers.append(_Layer(layer, products))
        self._buffers.reserve(*map(max, zip(*sizes, strict=True)))
        new = self._buffers.u.new_empty
        # The residual stream lies in one of the two by turns, what is added to it in the other.
        self._residual = new(2, rows, config.hidden_size)
        self._normed = new(rows, config.hidden_size)
        heads = config.num_heads + 2 * config.num_kv_heads
        self._qkv, self._normed_heads = (new(rows, heads, config.head_dim) for _ in range(2))
        self._attended = new(rows, config.num_heads, config.head_dim)
        self._gate_up, self._act = new(rows, 2 * config.intermediate_size), new(rows, config.intermediate_size)
        self._ones = self._buffers.u.new_ones(config.head_dim)
        places = torch.arange(blocks_of(positions) * BLOCK, device=device)
        tables = rope_tables(places, decoder.inverse_frequencies, decoder.rope_factor)
        self._cos_sin = torch.cat(tables, dim=1)
        # An embedding or head in host memory is used outside the graph.
        self._embedded = None if decoder.embedding.device == device else new(rows, config.hidden_size)
        self._logits = new(rows, config.vocab_size) if decoder.head.device == device else None
        self._graphs: dict[int, torch.cuda.CUDAGraph] | None = None
        if graphs and self._can_capture():
            self._graphs, self._pool, self._aside = {}, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def _can_capture(self) -> bool:
        """Whether every operation of a step is a kernel that needs no host."""
        size = self.config.head_dim
        kernel = 16 <= size <= 256 and size & (size - 1) == 0 and self._normed.dtype != torch.float32
        kernel = kernel and no_eight_bits_because(self.device, self.cache.kv.dtype) is None
        return self.device.type == "cuda" and kernel and use_triton("auto", self._normed)

    def _splits(self, rows: int) -> int:
        """Pieces that a slot's positions are cut into, a power of two: enough to fill the device."""
        if self.device.type != "cuda":
            return 1
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        wanted = ATTENTION_PROGRAMS * processors // (rows * self.config.num_kv_heads)
        return 1 << max(0, min(wanted, self.block_table.shape[1], MOST_SPLITS).bit_length() - 1)

    def _attention_scratch(self) -> int:
        heads, size = self.config.num_heads, self.config.head_dim
        return max(paged_scratch_elements(rows, heads, size, self._splits(rows)) for rows in _buckets_to(self.rows))

    def switch(self, numbers: Tensor) -> None:
        """Say which adapter acts on each row: numbers (rows,) int64 on the host, by ``adapters``, -1 for none."""
        self._buffers.masks.set(numbers)

    def __call__(self, count: int) -> Tensor:
        """Return logits (count, V) of the next token; valid until the next call."""
        rows = bucket_of(count)
        if self._embedded is not None:
            self._embedded[:rows] = self.decoder.embed(self.inputs[0, :rows])
        if self._graphs is None:
            self._run(rows)
        else:
            if rows not in self._graphs:
                self._graphs[rows] = self._capture(rows)
            self._graphs[rows].replay()
        if self._logits is None:
            return self.decoder.logits(self._normed[:count])
        return self._logits[:count]

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        """A graph of a step. The run before it compiles the kernels, and writes what the replay writes again."""
        current = torch.cuda.current_stream(self.device)
        self._aside.wait_stream(current)
        with torch.cuda.stream(self._aside):
            self._run(rows)
        current.wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU while this one captures.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"):
            self._run(rows)
        return graph

    def _run(self, rows: int) -> None:
        """Everything from the tokens to the logits, ``rows`` rows of the buffers."""
        config, eps = self.config, self.config.rms_norm_eps
        tokens, positions, lengths = self.inputs[:, :rows].unbind(0)
        table = self.block_table[:rows]
        residual, delta = self._residual[0, :rows], self._residual[1, :rows]
        normed, qkv, attended = self._normed[:rows], self._qkv[:rows], self._attended[:rows]
        gate_up, act = self._gate_up[:rows], self._act[:rows]
        flat_qkv, flat_attended, queries = qkv.view(rows, -1), attended.view(rows, -1), qkv[:, : config.num_heads]
        splits, scratch = self._splits(rows), self._buffers.scratch
        if self._embedded is None:
            torch.index_select(self.decoder.embedding, 0, tokens, out=residual)
        else:
            residual.copy_(self._embedded[:rows])
        for number, layer in enumerate(self.layers):
            keys, values = self.cache.kv[number]
            absmax = None if self.cache.absmax is None else self.cache.absmax[number]
            if number:
                add_rms_norm(residual, delta, layer.input_norm, eps, out=normed)
                residual, delta = delta, residual
            else:
                add_rms_norm(residual, None, layer.input_norm, eps, out=normed)
            layer.qkv(normed, flat_qkv)
            if layer.head_norm is not None:
                self._norm_heads(qkv, layer.head_norm)
            rope_and_store(qkv, self._cos_sin, positions, keys, values, table, absmax=absmax)
            paged_attention(
                queries, keys, values, table, lengths, out=attended, absmax=absmax, splits=splits, scratch=scratch
            )
            layer.o(flat_attended, delta)
            add_rms_norm(residual, delta, layer.post_attention_norm, eps, out=normed)
            residual, delta = delta, residual
            layer.gate_up(normed, gate_up)
            swiglu_forward(gate_up, out=act)
            layer.down(act, delta)
        add_rms_norm(residual, delta, self.decoder.norm, eps, out=normed)
        if self._logits is not None:
            torch.mm(normed, self.decoder.head.T, out=self._logits[:rows])

    def _norm_heads(self, qkv: Tensor, weight: Tensor) -> None:
        """Norm q and k of qkv (n, N + 2K, H) in place: rows of all heads first, then each by its own weight."""
        normed = self._normed_heads[: qkv.shape[0]]
        add_rms_norm(qkv.flatten(0, 1), None, self._ones, self.config.rms_norm_eps, out=normed.flatten(0, 1))
        rotated = weight.shape[0]
        torch.mul(normed[:, :rotated], weight, out=qkv[:, :rotated])
