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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.kernels.lora_linear import block_diagonal
from deepdoctor.kernels.rope import rope_tables
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.cpu_weights import PackedWeight, has_fp16_products, has_packed_kernels
from deepdoctor.model.decoder import Attend, Decoder, DecoderLayer, FrozenLinear
from deepdoctor.model.sides import Adapters, by_side

log = logging.getLogger(__name__)

__all__ = ["DecodeStep", "can_pack"]

PACKED_SLOTS, PACKED_SLOTS_FP16 = 32, 128
"""Slots up to which packed copies are used; the second where products are done in fp16. A step of SmolLM2-135M takes
230, 293, 407 and 545 ms for 48, 64, 96 and 128 slots with fp16, 281, 342, 474 and 611 with fp32 (one core without AMX,
300 positions of cache, which fp16 halves); at 32 bf16 takes about as long as fp32."""

Norm = Callable[[Tensor], Tensor]


def can_pack(decoder: Decoder, slots: int = 1) -> bool:
    """Whether so many slots are best decoded from packed copies: dense weights on a CPU with oneDNN's bf16 kernels."""
    if slots > (PACKED_SLOTS_FP16 if has_fp16_products() else PACKED_SLOTS):
        return False
    first = decoder.layers[0]
    assert isinstance(first, DecoderLayer)
    dense = all(linear.parts is None for linear in first.linears)
    return decoder.device.type == "cpu" and dense and has_packed_kernels()


class _Linear:
    """A frozen matrix with its adapters: y = x W^T + b + (x A^T * mask) (scale B)^T, for each adapter."""

    def __init__(
        self, linear: FrozenLinear, number: int, adapters: Sequence[Adapter], dtype: torch.dtype, packed: bool
    ):
        if packed:
            assert linear.weight is not None
            linear.packed = linear.packed or PackedWeight(linear.weight, linear.bias)
            self.base: Callable[..., Tensor] = linear.packed
        elif linear.parts is None:
            weight, bias = linear.dense(), linear.bias
            self.base = lambda x, wide: functional.linear(x, weight, bias)
        else:
            self.base = lambda x, wide: linear(x)
        self.dtype = dtype
        self.loras = [self._lora(linear, number, adapter) for adapter in adapters]

    def _lora(self, linear: FrozenLinear, number: int, adapter: Adapter) -> tuple[Tensor, Tensor] | None:
        """A (R, I) and scale B^T (R, O), block-diagonal; None where the adapter has no projection of this matrix."""
        keys = [f"{number}_{name}" for name in linear.names]
        present = [(key, start) for key, start in zip(keys, linear.starts, strict=True) if key in adapter.a]
        if not present:
            return None
        a = torch.cat([adapter.a[key].detach() for key, _ in present])
        blocks = [adapter.b[key].detach() * adapter.settings.scale for key, _ in present]
        b = block_diagonal(a, blocks, [start for _, start in present], sum(linear.sizes))
        return a.to(self.dtype), b.T.contiguous().to(self.dtype)

    def __call__(self, x: Tensor, switches: Sequence[_Switch], wide: bool) -> Tensor:
        y = self.base(x, wide)
        for switch in switches:
            lora = self.loras[switch.adapter]
            if lora is None:
                continue
            y, x = y.to(self.dtype), x.to(self.dtype)
            part, given = (y, x) if switch.rows is None else (y[switch.rows], x[switch.rows])
            u = functional.linear(given, lora[0])
            part.addmm_(u if switch.mask is None else u.mul_(switch.mask), lora[1])
        return y


@dataclass(frozen=True)
class _Switch:
    """Where an adapter acts, by its number: on a run of rows, or on all (None), or on those that mask (n, 1) names."""

    adapter: int
    rows: slice | None
    mask: Tensor | None

    @staticmethod
    def of(adapter: int, on: Sequence[bool], dtype: torch.dtype, device: torch.device) -> _Switch:
        """For an adapter that acts somewhere: a run where its rows lie side by side."""
        first, last = on.index(True), len(on) - 1 - on[::-1].index(True)
        if all(on[first : last + 1]):
            return _Switch(adapter, None if all(on) else slice(first, last + 1), None)
        return _Switch(adapter, None, torch.tensor(on, dtype=dtype, device=device)[:, None])


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

    def __init__(self, decoder: Decoder, adapters: Adapters, packed: bool = False):
        self.config = decoder.config
        of_side = by_side(adapters)
        self.adapters = {side: number for number, side in enumerate(of_side)}
        """Numbers by side."""
        self._sides: list[str] = []
        self._switches: list[_Switch] = []
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
            linears = [_Linear(li, number, [*of_side.values()], self.work_dtype, packed) for li in layer.linears]
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

    def __call__(self, input_ids: Tensor, places: Tensor, attend: Attend, sides: Sequence[str] = ()) -> Tensor:
        """Return logits (n, V) of the next token.

        input_ids, places  (n,)    int64, one token and its position per slot
        attend             writes keys and values to the cache and attends, see ``decoder.Attend``
        sides              of each slot: "base", or an adapter's; empty is the base for all

        Slots of one adapter that lie side by side cost no more than themselves.
        """
        if self._sides != list(sides):
            used = {side: [other == side for other in sides] for side in sides if side in self.adapters}
            self._switches = [
                _Switch.of(self.adapters[side], on, self.work_dtype, self.device) for side, on in used.items()
            ]
            self._sides = list(sides)
        switches = self._switches
        hidden = self._hidden(input_ids, places, attend, switches)
        if self.dtype != self.work_dtype and not self.wide and not hidden.sum().isfinite():
            log.warning("decoding: a value left the range of fp16; going on with bf16, which is slower")
            self.wide = True
            hidden = self._hidden(input_ids, places, attend, switches)
        return self.head(hidden, self.wide)

    def _hidden(self, input_ids: Tensor, places: Tensor, attend: Attend, switches: Sequence[_Switch]) -> Tensor:
        """Hidden states (n, D) after the last norm."""
        config, wide = self.config, self.wide
        count, heads, half = input_ids.shape[0], (config.num_heads, config.num_kv_heads), config.head_dim // 2
        shape = (count, heads[0] + 2 * heads[1], config.head_dim)
        cos, sin = self._rope(places)
        x = self.decoder.embed(input_ids).to(self.work_dtype)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.input_norm(x), switches, wide).view(shape).to(self.work_dtype)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k, v = qkv.split([*heads, heads[1]], dim=1)
                qkv = torch.cat([layer.q_norm(q), layer.k_norm(k), v], dim=1)
            out = attend(number, (qkv * cos).addcmul_(qkv.roll(half, -1), sin))
            x += layer.o(out.reshape(count, -1), switches, wide)
            gate, up = layer.gate_up(layer.post_attention_norm(x), switches, wide).chunk(2, dim=-1)
            x += layer.down(functional.silu(gate).mul_(up), switches, wide)
        return self.norm(x)
