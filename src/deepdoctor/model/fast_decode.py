"""One token per slot, with as few and as small operations as possible.

A decode step of a small batch is bound by reading the weights once and by the count of operations, so what does not
change from token to token is prepared: block-diagonal adapters with the scale folded in, and on a CPU copies of the
weights in the layout of oneDNN's own kernels (``cpu_weights``), which read a half or an eighth of the bytes of fp32.
Everything between those products (norms, attention, adapters, the residual stream) stays in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.kernels.rope import rope_tables
from deepdoctor.model.adapter import Adapter
from deepdoctor.model.cpu_weights import Multiply, has_packed_kernels, packed_multiply
from deepdoctor.model.decoder import Attend, Decoder, DecoderLayer, FrozenLinear

__all__ = ["PACKED_SLOTS", "DecodeStep", "can_pack"]

PACKED_SLOTS = 24
"""Slots up to which reading fewer bytes outweighs slower arithmetic on a processor whose fast format is fp32."""


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
            linear.packed = linear.packed or packed_multiply(linear.weight, linear.bias)
            self.base: Multiply = linear.packed
        elif linear.parts is None:
            weight, bias = linear.dense(), linear.bias
            self.base = lambda x: functional.linear(x, weight, bias)
        else:
            self.base = linear
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

    def __call__(self, x: Tensor, tuned: bool, mask: Tensor | None) -> Tensor:
        y = self.base(x)
        if tuned and self.a is not None:
            u = functional.linear(x, self.a)
            y.addmm_(u if mask is None else u.mul_(mask), self.b)
        return y


@dataclass(frozen=True)
class _Layer:
    qkv: _Linear
    o: _Linear
    gate_up: _Linear
    down: _Linear
    input_norm: Tensor
    post_attention_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


class DecodeStep:
    """The decoder for one new token per slot.

    packed: read the weights through ``cpu_weights`` (see ``can_pack``), whatever the decoder's own dtype.
    """

    def __init__(self, decoder: Decoder, adapter: Adapter | None, packed: bool = False):
        self.config = decoder.config
        self.decoder = decoder
        self.dtype = torch.float32 if packed else decoder.compute_dtype
        self.device = decoder.device
        self.layers: list[_Layer] = []
        for number, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            linears = [_Linear(linear, number, adapter, self.dtype, packed) for linear in layer.linears]
            norms = (layer.input_norm, layer.post_attention_norm, layer.q_norm, layer.k_norm)
            self.layers.append(_Layer(*linears, *(None if n is None else n.to(self.dtype) for n in norms)))  # type: ignore[arg-type]
        self.norm = decoder.norm.to(self.dtype)
        self.head: Multiply = decoder.logits
        if packed:
            decoder.packed_head = decoder.packed_head or packed_multiply(decoder.head)
            self.head = decoder.packed_head

    def _rope(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (n, N + 2K, H) so that ``qkv * cos + roll(qkv, H / 2) * sin`` rotates q and k and leaves v alone."""
        config = self.config
        cos, sin = rope_tables(places, self.decoder.inverse_frequencies, self.decoder.rope_factor)
        heads = (1, config.num_heads + config.num_kv_heads, 1)
        rotated_cos = torch.cat([cos, cos], -1)[:, None].repeat(heads)
        rotated_sin = torch.cat([-sin, sin], -1)[:, None].repeat(heads)
        kept = rotated_cos.new_ones(places.shape[0], config.num_kv_heads, config.head_dim)
        return (
            torch.cat([rotated_cos, kept], 1).to(self.dtype),
            torch.cat([rotated_sin, torch.zeros_like(kept)], 1).to(self.dtype),
        )

    def __call__(
        self, input_ids: Tensor, places: Tensor, attend: Attend, tuned: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """Return logits (n, V) of the next token.

        input_ids, places  (n,)    int64, one token and its position per slot
        attend             writes keys and values to the cache and attends, see ``decoder.Attend``
        tuned              whether any adapter acts; mask (n, 1): 1 where it does, None for everywhere
        """
        config, eps, width = self.config, self.config.rms_norm_eps, (self.config.hidden_size,)
        count, heads, half = input_ids.shape[0], (config.num_heads, config.num_kv_heads), config.head_dim // 2
        shape = (count, heads[0] + 2 * heads[1], config.head_dim)
        cos, sin = self._rope(places)
        x = self.decoder.embed(input_ids).to(self.dtype)
        if mask is not None:
            mask = mask.to(self.dtype)
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(functional.rms_norm(x, width, layer.input_norm, eps), tuned, mask).view(shape)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k, v = qkv.split([*heads, heads[1]], dim=1)
                q = functional.rms_norm(q, (config.head_dim,), layer.q_norm, eps)
                k = functional.rms_norm(k, (config.head_dim,), layer.k_norm, eps)
                qkv = torch.cat([q, k, v], dim=1)
            out = attend(number, (qkv * cos).addcmul_(qkv.roll(half, -1), sin))
            x = x + layer.o(out.reshape(count, -1), tuned, mask)
            gate_up = layer.gate_up(functional.rms_norm(x, width, layer.post_attention_norm, eps), tuned, mask)
            gate, up = gate_up.chunk(2, dim=-1)
            x = x + layer.down(functional.silu(gate).mul_(up), tuned, mask)
        return self.head(functional.rms_norm(x, width, self.norm, eps))
