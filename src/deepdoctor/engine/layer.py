"""One decoder layer, forward and backward, chunk by chunk, on any rung of the recompute ladder.

Forward, chunk by chunk: norm, qkv, RoPE; attention over all tokens; then o, norm, gate/up, SwiGLU, down. Backward runs
the same three phases in reverse. What a rung has not saved is computed again by the same calls in the same order, so
every rung gives the same bits. Letters as in ``engine/layout.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from deepdoctor.engine.arena import Arena, aligned
from deepdoctor.engine.bordered import Bordered, Masters
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
from deepdoctor.kernels.flash_attention import Backend, PackedRows, attention_backward, attention_forward
from deepdoctor.kernels.rms_norm import add_rms_norm, normalise, rms_norm_backward
from deepdoctor.kernels.rope import rope_backward, rope_qkv_
from deepdoctor.kernels.swiglu import swiglu_backward_, swiglu_forward
from deepdoctor.kernels.swiglu_lora import swiglu_lora_backward_, swiglu_lora_forward
from deepdoctor.model.decoder import DecoderLayer

__all__ = ["Batch", "LayerEngine", "Saved"]

FUSE_THIN = True
"""Whether SwiGLU and the thin products that read its output share a pass (``kernels/swiglu_lora.py``)."""


@dataclass(frozen=True)
class Batch:
    """What every layer needs of the micro-batch. cos, sin (T, H/2) fp32."""

    tokens: int
    rows: PackedRows
    cos: Tensor
    sin: Tensor
    attention: Backend
    chunk: int

    def chunks(self) -> Iterator[slice]:
        """Cut the tokens into chunks."""
        for start in range(0, self.tokens, self.chunk):
            yield slice(start, min(start + self.chunk, self.tokens))


@dataclass
class Saved:
    """A layer's state between forward and backward. mark: arena level below it; x_in (T, D): the layer's input."""

    mark: int
    x_in: Tensor | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    attention: tuple[Tensor, ...] = ()
    rstd1: list[Tensor] = field(default_factory=list)
    rstd2: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Pass:
    """One forward or backward of a layer. across: its buffers that span all tokens, saved or borrowed."""

    x: Tensor
    across: dict[str, Tensor]
    kept: Saved
    batch: Batch
    arena: Arena

    def borrow(self, scratch: Shapes) -> dict[str, Tensor]:
        """Take buffers of one chunk."""
        return self.arena.take_all(scratch, self.x.dtype)

    def at(self, part: slice, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """A chunk's part of every buffer: of those across all tokens, and of the borrowed ones."""
        count = part.stop - part.start
        if count == self.batch.tokens:
            return self.across | buffers
        return {name: t[part] for name, t in self.across.items()} | {name: t[:count] for name, t in buffers.items()}


class LayerEngine:
    """Forward and backward of one layer; keeps no activations itself. make: builds the bordered matrices."""

    def __init__(
        self,
        layer: DecoderLayer,
        shape: LayerShape,
        names: tuple[str, ...],
        scale: float,
        masters: Masters,
        make: Callable[..., Bordered] = Bordered,
    ):
        self.layer = layer
        self.shape = shape
        self.eps = layer.eps
        self.qkv, self.o, self.gate_up, self.down = (
            make(linear, layer.number, names, rank, scale, masters)
            for linear, rank in zip(layer.linears, shape.ranks, strict=True)
        )

    @property
    def matrices(self) -> tuple[Bordered, Bordered, Bordered, Bordered]:
        """The four bordered matrices in the order they are used."""
        return self.qkv, self.o, self.gate_up, self.down

    def _matrix(self, bordered: Bordered, arena: Arena) -> Tensor:
        if bordered.kept is not None:
            return bordered.kept
        shape = (bordered.out + bordered.rank, bordered.inn + bordered.rank)
        return bordered.write(arena.take(shape, bordered.linear.compute_dtype))

    def forward(self, x: Tensor, pending: Tensor | None, out: Tensor, rung: Rung, batch: Batch, arena: Arena) -> Saved:
        """Run the layer.

        x (T, D): the layer's input, or what is still to be added to ``pending`` (T, D) to give it; holds the input
        afterwards. out (T, D): receives the layer's output, or, where the rung saves ``x_mid``, what is to be added to
        that. Buffers that backward needs stay on the arena above the mark at entry.
        """
        kept = Saved(arena.top, x, arena.take_all(saved(self.shape, rung, batch.tokens), x.dtype))
        mark = arena.top
        across = kept.buffers or arena.take_all(forward_layer(self.shape, rung, batch.tokens), x.dtype)
        below = arena.top if kept.buffers else arena.top - aligned(across["qkv"].nbytes)
        before, after = forward_chunk(self.shape, rung, min(batch.chunk, batch.tokens))
        run = _Pass(x, across, kept, batch, arena)
        self._project(run, pending, before)
        heads = across["heads"][:, : self.shape.attended]
        _, attention = attention_forward(
            self._by_head(across["qkv"]),
            self.shape.key_heads,
            batch.rows,
            backend=batch.attention,
            out=heads.unflatten(1, (self.shape.heads, self.shape.head_dim)),
        )
        if kept.buffers:
            kept.attention = attention
        del attention
        arena.release(below)
        self._feed_forward(run, out, after)
        arena.release(mark)
        return kept

    def _by_head(self, flat: Tensor) -> Tensor:
        return flat.unflatten(1, (-1, self.shape.head_dim))

    def _project(self, run: _Pass, pending: Tensor | None, scratch: Shapes) -> None:
        """Norm, qkv and RoPE of all chunks; in recompute ``kept`` collects nothing but the norm's factors."""
        mark = run.arena.top
        matrix = self._matrix(self.qkv, run.arena)
        buffers = run.borrow(scratch)
        hidden = self.shape.hidden
        run.kept.rstd1.clear()
        for part in run.batch.chunks():
            here = run.at(part, buffers)
            n1, qkv, x = here["n1"], here["qkv"], run.x[part]
            base, delta = (x, None) if pending is None else (pending[part], x)
            _, _, rstd = add_rms_norm(base, delta, self.layer.input_norm, self.eps, out=n1[:, :hidden])
            run.kept.rstd1.append(rstd)
            self.qkv.extend(n1, matrix)
            if "u1" in here:
                here["u1"].copy_(n1[:, hidden:])
            self.qkv.forward(n1, matrix, qkv)
            self._rotate(qkv, here.get("qk_raw"), run.batch.cos[part], run.batch.sin[part])
        run.arena.release(mark)

    def _rotate(self, qkv: Tensor, raw: Tensor | None, cos: Tensor, sin: Tensor) -> None:
        """Rotate q and k in place, normed before in Qwen3; ``raw`` (C, (N + K) H) keeps what they were before that."""
        rotated = self.shape.heads + self.shape.key_heads
        if self.layer.q_norm is not None and self.layer.k_norm is not None:
            plain = qkv[:, : rotated * self.shape.head_dim]
            raw = plain.clone() if raw is None else raw.copy_(plain)
            for columns, weight in self._normed():
                flat = raw[:, columns].reshape(-1, self.shape.head_dim)
                _, y, _ = add_rms_norm(flat, None, weight, self.eps)
                qkv[:, columns] = y.view(qkv.shape[0], -1)
        rope_qkv_(self._by_head(qkv), cos, sin, rotated)

    def _normed(self) -> list[tuple[slice, Tensor]]:
        """Columns of q and of k with their norm's weight (Qwen3)."""
        assert self.layer.q_norm is not None and self.layer.k_norm is not None
        query = self.shape.heads * self.shape.head_dim
        return [
            (slice(0, query), self.layer.q_norm),
            (slice(query, query + self.shape.key_heads * self.shape.head_dim), self.layer.k_norm),
        ]

    def _mlp_input(self, x: Tensor, x_mid: Tensor, heads: Tensor, n2: Tensor, matrix: Tensor) -> Tensor:
        """x_mid = x + o(heads), n2 = [norm(x_mid), u]; returns the norm's factors."""
        self.o.extend(heads, matrix)
        self.o.forward(heads, matrix, x_mid)
        _, _, rstd = add_rms_norm(x, x_mid, self.layer.post_attention_norm, self.eps, out=n2[:, : self.shape.hidden])
        return rstd

    def _feed_forward(self, run: _Pass, out: Tensor, scratch: Shapes) -> None:
        """From the attention's output to the layer's, chunk by chunk."""
        shape, wide = self.shape, 2 * self.shape.wide
        o, gate_up, down = (self._matrix(m, run.arena) for m in (self.o, self.gate_up, self.down))
        buffers = run.borrow(scratch)
        for part in run.batch.chunks():
            here = run.at(part, buffers)
            n2, gu, act, x_mid = here["n2"], here["gu"], here["act"], here["x_mid"]
            run.kept.rstd2.append(self._mlp_input(run.x[part], x_mid, here["heads"], n2, o))
            self.gate_up.extend(n2, gate_up)
            self.gate_up.forward(n2, gate_up, gu[:, :wide])
            self._activate(gu, act, down)
            self.down.forward(act, down, out[part])
            if "u2" in here:
                here["u2"].copy_(n2[:, shape.hidden :])
                here["ud"].copy_(act[:, shape.wide :])
            if "x_mid" not in run.across:
                out[part] += x_mid

    def _fuses(self) -> bool:
        """Whether SwiGLU takes u and v along: where one of them is there."""
        return FUSE_THIN and self.gate_up.rank + self.down.rank > 0

    def _activate(self, gu: Tensor, act: Tensor, down: Tensor) -> None:
        """act (C, F + R) = [silu(gate) * up, u], from gu (C, 2F + R)."""
        wide = self.shape.wide
        if self._fuses():
            a = self.down.a_rows(down)
            swiglu_lora_forward(gu[:, : 2 * wide], a, act=act[:, :wide], u=act[:, wide:])
        else:
            swiglu_forward(gu[:, : 2 * wide], out=act[:, :wide])
            self.down.extend(act, down)

    def _activation_gradient(
        self, gu: Tensor, d_act: Tensor, act: Tensor | None, u: Tensor | None, gate_up: Tensor, down: Tensor
    ) -> None:
        """gu (C, 2F + R) becomes [d_gate, d_up, v]; act (C, F) and u (C, R) are computed again where given."""
        wide = self.shape.wide
        halves = gu[:, : 2 * wide]
        if not self._fuses():
            swiglu_backward_(halves, d_act, act=act)
            if act is not None and u is not None:
                self.down.inner(act, down, u)
            self.gate_up.extend_gradient(gu, gate_up)
            return
        b = {block.start: self.gate_up.b_block(gate_up, block) for block in self.gate_up.blocks}
        a = None if u is None else self.down.a_rows(down)
        swiglu_lora_backward_(halves, d_act, b.get(0), b.get(wide), v=gu[:, 2 * wide :], act=act, a=a, u=u)

    def backward(self, kept: Saved, stream: Tensor, rung: Rung, batch: Batch, arena: Arena, last: bool = False) -> None:
        """Turn the gradient of the output in ``stream`` (T, D + R) into that of the input, adding to A's and B's.

        last: the layer below is the embedding, which is frozen, so that the input's gradient is left out.
        """
        shape = self.shape
        x = kept.x_in
        assert x is not None
        mark = arena.top
        across = {**kept.buffers, **arena.take_all(backward_layer(shape, rung, batch.tokens), x.dtype)}
        again, middle, final = backward_chunk(shape, rung, min(batch.chunk, batch.tokens))
        heads = across["heads"][:, : shape.attended].unflatten(1, (shape.heads, shape.head_dim))
        attention = kept.attention
        run = _Pass(x, across, kept, batch, arena)
        if rung in ("layer", "host"):
            self._project(run, None, again)
            _, attention = attention_forward(
                self._by_head(across["qkv"]), shape.key_heads, batch.rows, backend=batch.attention, out=heads
            )
        self._feed_forward_backward(run, stream, rung, middle)
        d_qkv = attention_backward(
            self._by_head(across["d_heads"]),
            self._by_head(across["qkv"]),
            heads,
            attention,
            shape.key_heads,
            batch.rows,
            backend=batch.attention,
        )
        self._project_backward(run, d_qkv, stream, final, last)
        arena.release(mark)

    def _feed_forward_backward(self, run: _Pass, stream: Tensor, rung: Rung, scratch: Shapes) -> None:
        """From the output's gradient to those of x_mid (in ``stream``) and of the attention's output (``d_heads``)."""
        shape, hidden, wide = self.shape, self.shape.hidden, 2 * self.shape.wide
        _, ro, rg, rd = shape.ranks
        mark = run.arena.top
        o, gate_up, down = (self._matrix(m, run.arena) for m in (self.o, self.gate_up, self.down))
        buffers = run.borrow(scratch)
        for number, part in enumerate(run.batch.chunks()):
            here = run.at(part, buffers)
            x_mid, n2, gu, act, d_act, d_n2 = (here[n] for n in ("x_mid", "n2", "gu", "act", "d_act", "d_n2"))
            dy = stream[part]
            if rung in ("layer", "host"):
                rstd = self._mlp_input(run.x[part], x_mid, here["heads"], n2, o)
            else:
                rstd = run.kept.rstd2[number]
                if rung != "keep":
                    normalise(x_mid, rstd, self.layer.post_attention_norm, out=n2[:, :hidden])
            if "u2" in here:
                u2 = here["u2"]
            else:
                if rung != "keep":
                    self.gate_up.extend(n2, gate_up)
                    self.gate_up.forward(n2, gate_up, gu[:, :wide])
                u2 = n2[:, hidden : hidden + rg]
            self.down.extend_gradient(dy, down)
            self.down.input_gradient(dy[:, : hidden + rd], down, d_act)
            ud = act[:, shape.wide :] if rung == "keep" else here["ud"]
            again = None if rung == "keep" else act[:, : shape.wide]
            self._activation_gradient(gu, d_act, again, None if rung in ("keep", "elementwise") else ud, gate_up, down)
            self.down.a_gradients(dy[:, : hidden + rd], act[:, : shape.wide])
            self.down.b_gradients(dy[:, : hidden + rd], ud)
            self.gate_up.input_gradient(gu, gate_up, d_n2)
            self.gate_up.a_gradients(gu, n2[:, :hidden])
            self.gate_up.b_gradients(gu, u2)
            rms_norm_backward(d_n2, x_mid, rstd, self.layer.post_attention_norm, add=dy[:, :hidden], out=dy[:, :hidden])
            heads = here["heads"]
            self.o.extend_gradient(dy, o)
            self.o.input_gradient(dy[:, : hidden + ro], o, here["d_heads"])
            self.o.a_gradients(dy[:, : hidden + ro], heads[:, : shape.attended])
            self.o.b_gradients(dy[:, : hidden + ro], heads[:, shape.attended :])
        run.arena.release(mark)

    def _project_backward(
        self, run: _Pass, d_qkv: tuple[Tensor, Tensor, Tensor], stream: Tensor, scratch: Shapes, last: bool
    ) -> None:
        """From the gradients of q, k and v to that of the layer's input."""
        hidden = self.shape.hidden
        mark = run.arena.top
        matrix = self._matrix(self.qkv, run.arena)
        buffers = run.borrow(scratch)
        dq, dk, dv = d_qkv
        for number, part in enumerate(run.batch.chunks()):
            here, x, rstd = run.at(part, buffers), run.x[part], run.kept.rstd1[number]
            dy, n1 = here["d_qkv"], here["n1"]
            rope_backward(dq[part], dk[part], dv[part], run.batch.cos[part], run.batch.sin[part], out=dy)
            if "qk_raw" in here:
                self._qk_norm_backward(dy, here["qk_raw"])
            if "n1" in buffers:
                normalise(x, rstd, self.layer.input_norm, out=n1)
                u1 = here["u1"]
            else:
                n1, u1 = n1[:, :hidden], n1[:, hidden:]
            self.qkv.extend_gradient(dy, matrix)
            self.qkv.a_gradients(dy, n1)
            self.qkv.b_gradients(dy, u1)
            if last:
                continue
            self.qkv.input_gradient(dy, matrix, here["d_n1"])
            into = stream[part][:, :hidden]
            rms_norm_backward(here["d_n1"], x, rstd, self.layer.input_norm, add=into, out=into)
        run.arena.release(mark)

    def _qk_norm_backward(self, dy: Tensor, raw: Tensor) -> None:
        """Take the gradient of q and k in ``dy`` back through their norms (Qwen3); raw (C, (N + K) H)."""
        for columns, weight in self._normed():
            flat = raw[:, columns].reshape(-1, self.shape.head_dim)
            # The factors again rather than kept: one fp32 number per head and token.
            _, _, rstd = add_rms_norm(flat, None, weight, self.eps)
            gradient = dy[:, columns].reshape(-1, self.shape.head_dim)
            dy[:, columns] = rms_norm_backward(gradient, flat, rstd, weight).view(dy.shape[0], -1)
