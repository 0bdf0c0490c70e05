"""One token per slot, with as few and as small operations as possible.

A decode step of a small batch is bound by reading the weights once and by the count of operations, so what does not
change from token to token is prepared: block-diagonal adapters with the scale folded in, and on a CPU copies of the
weights in layouts that take fewer bytes or faster arithmetic than fp32 (``cpu_weights``). There the residual stream,
the norms, the rotation and the adapters stay in fp32; the cache, and what lies between the two products of the
feed-forward, are fp16 where the copies are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.kernels.rope import rope_tables
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.cpu_weights import PackedWeight, has_fp16_products, has_packed_kernels
from deepdoctor.model.decoder import Attend, Decoder, DecoderLayer, FrozenLinear

log = logging.getLogger(__name__)

__all__ = ["PACKED_SLOTS", "DecodeStep", "can_pack"]

PACKED_SLOTS = 32
"""Slots up to which packed copies are used. At 32 rows fp16 takes three quarters of the time of fp32 and bf16 about as
long; at 64 fp16 and fp32 are even (two cores without AMX)."""

Norm = Callable[[Tensor], Tensor]


def can_pack(decoder: Decoder) -> bool:
    """Whether the base may be read through packed copies: dense weights on a CPU that has oneDNN's bf16 kernels."""
    first = decoder.layers[0]
    assert isinstance(first, DecoderLayer)
    dense = all(linear.parts is None for linear in first.linears)
    return decoder.device.type == "cpu" and dense and has_packed_kernels()


class _Linear:
    """A frozen matrix with its adapters: y = x W^T + b + (x A^T * mask) (scale B)^T."""

    def __init__(self, linear: FrozenLinear, number: int, adapter: Adapter | None, dtype: torch.dtype, packed: bool):
        if packed:
            assert linear.weight is not None
            linear.packed = linear.packed or PackedWeight(linear.weight, linear.bias)
            self.base: Callable[..., Tensor] = linear.packed
        elif linear.parts is None:
            weight, bias = linear.dense(), linear.bias
            self.base = lambda x, wide: functional.linear(x, weight, bias)
        else:
            self.base = lambda x, wide: linear(x)
        self.a: Tensor | None = None
        keys = [f"{number}_{name}" for name in linear.names]
        if adapter is None or not any(key in adapter.a for key in keys):
            return
        present = [(key, start) for key, start in zip(keys, linear.starts, strict=True) if key in adapter.a]
        self.a = torch.cat([adapter.a[key].detach() for key, _ in present]).to(dtype)
        rank = adapter.settings.rank
        b = torch.zeros(rank * len(present), sum(linear.sizes), device=linear.device)
        for at, (key, start) in enumerate(present):
            block = adapter.b[key].detach() * adapter.settings.scale
            b[at * rank : (at + 1) * rank, start : start + block.shape[0]] = block.T
        self.b = b.to(dtype)

    def __call__(self, x: Tensor, switch: _Switch, wide: bool) -> Tensor:
        y = self.base(x, wide)
        if self.a is None or not switch.on:
            return y
        y = y.to(self.a.dtype)
        part, x = y, x.to(self.a.dtype)
        if switch.rows is not None:
            part, x = y[switch.rows], x[switch.rows]
        u = functional.linear(x, self.a)
        part.addmm_(u if switch.mask is None else u.mul_(switch.mask), self.b)
        return y


@dataclass(frozen=True)
class _Switch:
    """Where the adapter acts: nowhere, on a run of rows, or on some of them by mask (n, 1)."""

    on: bool
    rows: slice | None
    mask: Tensor | None

    @staticmethod
    def of(tuned: bool, mask: Tensor | None, dtype: torch.dtype) -> _Switch:
        """Say so for a mask; on a CPU one whose ones lie together becomes a run."""
        if mask is None or not tuned:
            return _Switch(tuned, None, None)
        if mask.device.type == "cpu":
            ones = mask.flatten().nonzero().flatten().tolist()
            if not ones:
                return _Switch(False, None, None)
            if ones[-1] - ones[0] + 1 == len(ones):
                return _Switch(True, slice(ones[0], ones[-1] + 1), None)
        return _Switch(True, None, mask.to(dtype))


@dataclass(frozen=True)
class _Layer:
    qkv: _Linear
    o: _Linear
    gate_up: _Linear
    down: _Linear
    input_norm: Norm
    post_attention_norm: Norm
    q_norm: Norm | None
    k_norm: Norm | None


class DecodeStep:
    """The decoder for one new token per slot.

    packed: read the weights through ``cpu_weights`` (see ``can_pack``), whatever the decoder's own dtype. dtype: of the
    cache that ``attend`` writes.
    """

    def __init__(self, decoder: Decoder, adapter: Adapter | None, packed: bool = False):
        self.config = decoder.config
        self.decoder = decoder
        self.work_dtype = torch.float32 if packed else decoder.compute_dtype
        self.dtype = torch.float16 if packed and has_fp16_products() else self.work_dtype
        self.device = decoder.device
        self.packed = packed
        self.wide = False
        """Whether fp16 products overflowed, so that they are done without."""
        self.layers: list[_Layer] = []
        for number, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            linears = [_Linear(linear, number, adapter, self.work_dtype, packed) for linear in layer.linears]
            norms = (layer.input_norm, layer.post_attention_norm, layer.q_norm, layer.k_norm)
            self.layers.append(_Layer(*linears, *(None if n is None else self._norm(n) for n in norms)))  # type: ignore[arg-type]
        self.norm = self._norm(decoder.norm)
        self.head: Callable[..., Tensor] = lambda x, wide: decoder.logits(x)
        if packed:
            decoder.packed_head = decoder.packed_head or PackedWeight(decoder.head)
            self.head = decoder.packed_head

    def _norm(self, weight: Tensor) -> Norm:
        """RMS norm with a weight (I,); packed, in four operations where PyTorch's takes twelve (7 us, not 14)."""
        eps, width = self.config.rms_norm_eps, weight.shape[0]
        weight = weight.to(self.work_dtype)
        if not self.packed:
            return lambda x: functional.rms_norm(x, (width,), weight, eps)
        # x w / sqrt(|x|^2 / I + eps) = x (w sqrt(I)) / hypot(|x|, sqrt(I eps))
        scaled, floor = weight * math.sqrt(width), torch.tensor(math.sqrt(width * eps))
        length = torch.linalg.vector_norm
        return lambda x: (x / length(x, dim=-1, keepdim=True).hypot_(floor)).mul_(scaled)

    def _rope(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (n, N + 2K, H) so that ``qkv * cos + roll(qkv, H / 2) * sin`` rotates q and k and leaves v alone."""
        config = self.config
        cos, sin = rope_tables(places, self.decoder.inverse_frequencies, self.decoder.rope_factor)
        heads = (1, config.num_heads + config.num_kv_heads, 1)
        rotated_cos = torch.cat([cos, cos], -1)[:, None].repeat(heads)
        rotated_sin = torch.cat([-sin, sin], -1)[:, None].repeat(heads)
        kept = rotated_cos.new_ones(places.shape[0], config.num_kv_heads, config.head_dim)
        return (
            torch.cat([rotated_cos, kept], 1).to(self.work_dtype),
            torch.cat([rotated_sin, torch.zeros_like(kept)], 1).to(self.work_dtype),
        )

    def __call__(
        self, input_ids: Tensor, places: Tensor, attend: Attend, tuned: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """Return logits (n, V) of the next token.

        input_ids, places  (n,)    int64, one token and its position per slot
        attend             writes keys and values to the cache and attends, see ``decoder.Attend``
        tuned              whether any adapter acts; mask (n, 1): 1 where it does, None for everywhere

        On a CPU, tuned slots that lie side by side cost no more than themselves.
        """
        switch = _Switch.of(tuned, mask, self.work_dtype)
        hidden = self._hidden(input_ids, places, attend, switch)
        if self.dtype != self.work_dtype and not self.wide and not hidden.sum().isfinite():
            log.warning("decoding: a value left the range of fp16; going on with bf16, which is slower")
            self.wide = True
            hidden = self._hidden(input_ids, places, attend, switch)
        return self.head(hidden, self.wide)

    def _hidden(self, input_ids: Tensor, places: Tensor, attend: Attend, switch: _Switch) -> Tensor:
        """Hidden states (n, D) after the last norm."""
        config, wide = self.config, self.wide
        count, heads, half = input_ids.shape[0], (config.num_heads, config.num_kv_heads), config.head_dim // 2
        shape = (count, heads[0] + 2 * heads[1], config.head_dim)
        cos, sin = self._rope(places)
        x = self.decoder.embed(input_ids).to(self.work_dtype)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.input_norm(x), switch, wide).view(shape).to(self.work_dtype)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k, v = qkv.split([*heads, heads[1]], dim=1)
                qkv = torch.cat([layer.q_norm(q), layer.k_norm(k), v], dim=1)
            out = attend(number, (qkv * cos).addcmul_(qkv.roll(half, -1), sin))
            x += layer.o(out.reshape(count, -1), switch, wide)
            gate, up = layer.gate_up(layer.post_attention_norm(x), switch, wide).chunk(2, dim=-1)
            x += layer.down(functional.silu(gate).mul_(up), switch, wide)
        return self.norm(x)
