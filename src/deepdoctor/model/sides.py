"""Several adapters over one base: sides by name, their matrices side by side, packed rows of different sides.

A side is "base", where no adapter acts, or the name of an adapter. Ranks, scales and projections of adapters may
differ. T tokens of packed rows, O and I the sides of a weight, R the ranks of all adapters of one matrix together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.errors import UsageError
from deepdoctor.kernels.lora_linear import block_diagonal
from deepdoctor.model.adapter import Adapter, LayerAdapter, RowSwitch
from deepdoctor.model.decoder import Decoder, DecoderLayer, FrozenLinear

__all__ = ["BASE", "TUNED", "Adapters", "LoraStack", "SidePass", "by_side", "check_side"]

BASE, TUNED = "base", "tuned"
Adapters = Mapping[str, Adapter] | Adapter | None
"""Adapters by the name of their side; one that comes alone is "tuned"."""


def by_side(adapters: Adapters) -> dict[str, Adapter]:
    """Return the adapters by side. Raises UsageError for one called "base"."""
    if adapters is None:
        return {}
    found = {TUNED: adapters} if isinstance(adapters, Adapter) else dict(adapters)
    if BASE in found:
        raise UsageError(f"an adapter is called {BASE!r}, which is the side without any", "give it another name")
    return found


def check_side(side: str, adapters: Mapping[str, Adapter], name: str) -> None:
    """Raise UsageError for a side that is neither "base" nor that of an adapter. name: who asks, in the message."""
    if side != BASE and side not in adapters:
        known = ", ".join((BASE, *adapters))
        raise UsageError(f"{name} asks the side {side!r}, known are: {known}", "give an adapter of that name")


@dataclass(frozen=True)
class LoraStack:
    """Adapters of some projections of one matrix: a (R, I), the scales folded in, and b (O, R), block-diagonal.

    owners: the number of each column's adapter.
    """

    a: Tensor
    b: Tensor
    owners: tuple[int, ...]

    @staticmethod
    def of(linear: FrozenLinear, projections: range, layer: int, adapters: Sequence[Adapter]) -> LoraStack | None:
        """Those of the projections (numbers in the matrix), adapter by adapter; None where there is none."""
        keys = {f"{layer}_{linear.names[n]}": linear.starts[n] - linear.starts[projections[0]] for n in projections}
        found = [(n, a, key, start) for n, a in enumerate(adapters) for key, start in keys.items() if key in a.a]
        if not found:
            return None
        dtype = linear.compute_dtype
        a = torch.cat([adapter.a[key].detach() * adapter.settings.scale for _, adapter, key, _ in found])
        blocks = [adapter.b[key].detach() for _, adapter, key, _ in found]
        height = sum(linear.sizes[n] for n in projections)
        b = block_diagonal(a, blocks, [start for *_, start in found], height)
        owners = [number for (number, *_), block in zip(found, blocks, strict=True) for _ in range(block.shape[1])]
        return LoraStack(a.to(linear.device, dtype).contiguous(), b.to(linear.device, dtype), tuple(owners))

    @staticmethod
    def nbytes(decoder: Decoder, adapters: Sequence[Adapter]) -> int:
        """Bytes that the stacks of all matrices of a decoder take, each matrix as a whole."""
        elements = 0
        for number, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            for linear in layer.linears:
                keys = [f"{number}_{name}" for name in linear.names]
                rank = sum(a.a[key].shape[0] for a in adapters for key in keys if key in a.a)
                elements += rank * (linear.in_features + sum(linear.sizes))
        return elements * decoder.compute_dtype.itemsize


class _Mixed:
    """Several adapters of one matrix over packed tokens: each token gets the columns of its own adapter.

    of_token: (T,) int64, the number of each token's adapter, -1 for none; one list for all matrices, whose only member
    is set anew before a forward pass.
    """

    def __init__(self, stack: LoraStack, of_token: list[Tensor]):
        self.stack, self.of_token = stack, of_token
        self.owners = torch.tensor(stack.owners, device=stack.a.device)

    def apply(self, x: Tensor, linear: FrozenLinear) -> Tensor:
        """x (T, I) -> (T, O), each token's adapter added; tokens of the base get exactly the base's output."""
        y = functional.linear(x, linear.dense(), linear.bias)
        u = functional.linear(x, self.stack.a).mul_(self.of_token[0][:, None] == self.owners)
        return y.addmm_(u, self.stack.b.T)


class SidePass:
    """The adapters of all sides, ready for packed rows of which each is on a side of its own.

    Where one adapter acts in a pass it is used as in training, over all tokens or with a mask; where several do, they
    act side by side.
    """

    def __init__(self, decoder: Decoder, adapters: Mapping[str, Adapter]):
        self.decoder, self.adapters = decoder, adapters
        self._switch = RowSwitch()
        self._alone = {side: adapter.prepare(decoder, self._switch) for side, adapter in adapters.items()}
        self._together: list[LayerAdapter] | None = None
        self._of_token: list[Tensor] = []

    def of(self, sides: Sequence[str], lengths: Tensor) -> list[LayerAdapter] | None:
        """Return what the decoder takes for rows of these sides and lengths (n,), valid until the next call."""
        device, used = self.decoder.device, set(sides) - {BASE}
        if not used:
            return None
        if len(used) == 1:
            mask = torch.tensor([side != BASE for side in sides], dtype=self.decoder.compute_dtype)[:, None]
            self._switch.mask = mask.repeat_interleave(lengths, 0).to(device) if BASE in sides else None
            return self._alone[used.pop()]
        names = list(self.adapters)
        numbers = torch.tensor([-1 if side == BASE else names.index(side) for side in sides])
        self._of_token[:] = [numbers.repeat_interleave(lengths).to(device)]
        self._together = self._together or [self._mixed(layer) for layer in self.decoder.layers]
        return self._together

    def _mixed(self, layer: torch.nn.Module) -> LayerAdapter:
        """All adapters of one layer together."""
        assert isinstance(layer, DecoderLayer)
        adapters = tuple(self.adapters.values())
        stacks = [LoraStack.of(lin, range(len(lin.names)), layer.number, adapters) for lin in layer.linears]
        return LayerAdapter(*(None if stack is None else _Mixed(stack, self._of_token) for stack in stacks))
