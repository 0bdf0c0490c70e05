"""The engine: loss and gradient of one micro-batch of packed rows, without autograd.

Embedding, layers, loss; then the layers backwards. What each layer keeps for its backward is its rung's business
(``engine/layout.py``); where it lies is the arena's. Gradients are added to the fp32 masters' own buffers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from deepdoctor.engine.arena import Arena
from deepdoctor.engine.bordered import Bordered, Masters
from deepdoctor.engine.bordered_fp8 import BorderedFp8, Fp8Rows
from deepdoctor.engine.layer import Batch, LayerEngine, Saved
from deepdoctor.engine.layout import LayerShape, Rung
from deepdoctor.engine.memory import RING, host_layers, plan_arena, widest_row
from deepdoctor.engine.offload import HostInputs
from deepdoctor.errors import TrainingError
from deepdoctor.kernels.flash_attention import Backend, PackedRows
from deepdoctor.kernels.linear_cross_entropy import (
    linear_cross_entropy_backward_chunks,
    linear_cross_entropy_by_vocabulary,
)
from deepdoctor.kernels.rms_norm import add_rms_norm, rms_norm_backward
from deepdoctor.kernels.rope import rope_tables
from deepdoctor.model.adapter import LoraSettings
from deepdoctor.model.decoder import Decoder, DecoderLayer

__all__ = ["Engine", "EngineSettings", "Products", "Rows", "padded"]

Products = Literal["16bit", "fp8"]
"""Format of the large products."""


def padded(tokens: int) -> int:
    """Round up to a size that comes often: multiples of 128, of 16 below 1,024."""
    step = 128 if tokens > 1024 else 16
    return -(-tokens // step) * step


@dataclass(frozen=True)
class EngineSettings:
    """What the plan chose.

    rungs          one per layer
    max_tokens     largest micro-batch
    chunk_tokens   tokens at once in everything but attention
    logit_tokens   tokens at once whose logits exist
    keep_matrices  hold the frozen matrices in the compute dtype, or make them anew at each use
    attention      backend, see ``kernels.flash_attention``
    head_rows      rows of the head at once where it lies in host memory, else None
    products       "fp8" keeps the frozen matrices in fp8 beside the base
    """

    rungs: tuple[Rung, ...]
    max_tokens: int
    chunk_tokens: int
    logit_tokens: int
    keep_matrices: bool
    attention: Backend
    head_rows: int | None = None
    products: Products = "16bit"


@dataclass(frozen=True)
class Rows:
    """A micro-batch on the device, as ``data.pack.MicroBatch`` has it."""

    input_ids: Tensor
    positions: Tensor
    row_lengths: tuple[int, ...]
    predict: Tensor
    labels: Tensor


class Engine:
    """Computes gradients for one decoder and one adapter.

    Takes its memory at once. ``close`` gives it back and leaves the decoder as it was.
    """

    def __init__(self, decoder: Decoder, masters: Masters, lora: LoraSettings, settings: EngineSettings):
        config = decoder.config
        self.decoder = decoder
        self.settings = settings
        self.shape = LayerShape.of(config, lora.rank, lora.targets)
        self.dtype = decoder.compute_dtype
        make: type[Bordered] | partial[BorderedFp8] = Bordered
        if settings.products == "fp8":
            at_once = min(settings.chunk_tokens, settings.max_tokens)
            make = partial(BorderedFp8, rows=Fp8Rows(at_once, widest_row(self.shape), decoder.device))
        self.layers: list[LayerEngine] = []
        for module in decoder.layers:
            assert isinstance(module, DecoderLayer)
            self.layers.append(LayerEngine(module, self.shape, lora.targets, lora.scale, masters, make))
        if len(settings.rungs) != len(self.layers):
            raise TrainingError(f"the plan has {len(settings.rungs)} rungs for {len(self.layers)} layers")
        if settings.keep_matrices:
            for layer in self.layers:
                for matrix in layer.matrices:
                    matrix.keep_matrix()
        planned = plan_arena(
            self.shape,
            settings.rungs,
            settings.max_tokens,
            settings.chunk_tokens,
            self.dtype.itemsize,
            settings.keep_matrices,
        )
        self.hosted = host_layers(settings.rungs)
        self.arena = Arena(planned.nbytes, decoder.device)
        self.host = HostInputs(self.hosted, settings.max_tokens, config.hidden_size, self.dtype, decoder.device)

    def close(self) -> None:
        """Give back the memory."""
        for layer in self.layers:
            for matrix in layer.matrices:
                matrix.drop_matrix()
        self.host.close()
        del self.arena

    def refresh(self) -> None:
        """Copy the masters into matrices that are kept; call after every update."""
        for layer in self.layers:
            for matrix in layer.matrices:
                if matrix.kept is not None:
                    matrix.write_adapter(matrix.kept)

    def _batch(self, rows: Rows) -> Batch:
        decoder = self.decoder
        tokens = sum(rows.row_lengths)
        if tokens > self.settings.max_tokens:
            raise TrainingError(
                f"a micro-batch has {tokens} tokens, the plan has room for {self.settings.max_tokens}",
                "raise train.micro_batch_tokens, or leave it out",
            )
        cos, sin = rope_tables(rows.positions, decoder.inverse_frequencies, decoder.rope_factor)
        lengths = tuple(length for length in rows.row_lengths if length)
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        if decoder.device.type == "cuda":
            # Through pinned memory: an ordinary copy would wait for the micro-batch before this one.
            starts = starts.pin_memory().to(decoder.device, non_blocking=True)
        packed = PackedRows(lengths, starts, max(lengths, default=0))
        return Batch(tokens, packed, cos, sin, self.settings.attention, self.settings.chunk_tokens)

    @torch.no_grad()
    def gradients(self, rows: Rows, scale: float, layers: int | None = None) -> Tensor:
        """Add the gradient of ``scale`` times the summed loss to the masters'; return the summed loss, () fp32.

        layers: run only the first so-many, which gives no meaningful loss but warms every kernel of this size up.
        """
        batch = self._batch(rows)
        arena, rungs = self.arena, self.settings.rungs[:layers]
        arena.release(0)
        hidden = self.shape.hidden
        stream = arena.take((batch.tokens, self.shape.stream), self.dtype)
        ring = [arena.take((batch.tokens, hidden), self.dtype) for _ in range(RING if self.hosted else 0)]
        kept: list[Saved] = []
        marks: list[int] = []
        x, pending = self._input(0, ring, batch), None
        x.copy_(self.decoder.embed(rows.input_ids))
        for number, layer in enumerate(self.layers[:layers]):
            marks.append(arena.top)
            out = self._input(number + 1, ring, batch)
            if rungs[number] == "host":
                self.host.send(number, x)
                self.host.wait_until_sent(number + 1 - RING)
            kept.append(layer.forward(x, pending, out, rungs[number], batch, arena))
            x, pending = out, kept[-1].buffers.get("x_mid")
        if pending is not None:
            x.add_(pending)
        loss = self._loss(x, rows, stream, scale)
        del x, pending, out
        for number in reversed(range(len(rungs))):
            state, kept[number] = kept[number], Saved(0)
            if rungs[number] == "host":
                state.x_in = self.host.fetch(number, ring, first=number == min(self.hosted, len(rungs)) - 1)
            self.layers[number].backward(state, stream, rungs[number], batch, arena, last=number == 0)
            self.host.done(number)
            del state
            arena.release(marks[number])
        return loss

    def _input(self, number: int, ring: list[Tensor], batch: Batch) -> Tensor:
        """Memory for the input of layer ``number`` (of the last norm, where there is no such layer)."""
        if number < self.hosted or number == self.hosted == len(self.layers):
            return ring[number % RING]
        return self.arena.take((batch.tokens, self.shape.hidden), self.dtype)

    @torch.no_grad()
    def losses(self, rows: Rows) -> Tensor:
        """Return the loss of every label (L,) fp32; nothing is kept for a backward."""
        batch = self._batch(rows)
        arena = self.arena
        arena.release(0)
        buffers = [arena.take((batch.tokens, self.shape.hidden), self.dtype) for _ in range(2)]
        x = buffers[0]
        x.copy_(self.decoder.embed(rows.input_ids))
        for number, layer in enumerate(self.layers):
            out = buffers[(number + 1) % 2]
            layer.forward(x, None, out, "layer", batch, arena)
            x = out
        return self._head(x, rows, None, None)

    def _loss(self, x: Tensor, rows: Rows, stream: Tensor, scale: float) -> Tensor:
        """Sum of the losses; ``stream`` receives the gradient of x, zero where no label is."""
        stream.zero_()
        return self._head(x, rows, stream[:, : self.shape.hidden], scale).sum()

    def _head(self, x: Tensor, rows: Rows, stream: Tensor | None, scale: float | None) -> Tensor:
        """Last norm, head and loss of the tokens that have a label, a chunk of them at a time."""
        decoder, eps = self.decoder, self.decoder.config.rms_norm_eps
        parts = self.settings.head_rows and decoder.head_parts(self.settings.head_rows)
        at_once = max(1, len(rows.predict) if parts else self.settings.logit_tokens)
        found = []
        for where, labels in zip(rows.predict.split(at_once), rows.labels.split(at_once), strict=True):
            count = len(where)
            if not parts and count < at_once:
                # Products of few sizes: each new one makes cuBLAS load kernels, and that waits for the whole queue.
                spare = where.new_zeros(min(at_once, padded(count)) - count)
                where, labels = torch.cat([where, spare]), torch.cat([labels, spare])
            chosen = x.index_select(0, where)
            _, h, rstd = add_rms_norm(chosen, None, decoder.norm, eps)
            if parts:
                losses, dh = linear_cross_entropy_by_vocabulary(h, parts, labels, scale=scale)
            else:
                losses, dh = linear_cross_entropy_backward_chunks(
                    h, decoder.head, labels, scale=scale, chunk_tokens=at_once, out_dh=h
                )
            found.append(losses[:count])
            if stream is not None and dh is not None:
                dx = rms_norm_backward(dh, chosen, rstd, decoder.norm, out=dh)
                stream.index_copy_(0, where[:count], dx[:count])
        return torch.cat(found)
