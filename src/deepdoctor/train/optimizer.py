"""AdamW in fp32 or with 8-bit state, the learning-rate schedules, clipping, and the state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepdoctor.errors import RunError
from deepdoctor.kernels.adamw_8bit import BLOCK
from deepdoctor.model.adapter import Adapter
from deepdoctor.train.adamw_8bit import SMALLEST_8BIT, AdamW8bit
from deepdoctor.train.flat import Piece

__all__ = [
    "can_flatten",
    "clip_on_device",
    "learning_rate_at",
    "make_optimizer",
    "optimizer_state",
    "restore_optimizer",
]

_UNITS = {"exp_avg": 1, "exp_avg_sq": 1, "state1": 1, "state2": 1, "absmax1": BLOCK, "absmax2": BLOCK}
"""State that is laid out along the parameter: its elements per value. The rest is the same for every parameter."""
_NORM_CHUNK = 512
"""Elements whose squares are summed in fp32; the sums are added in fp64."""


def learning_rate_at(step: int, steps: int, peak: float, schedule: str, warmup_steps: int) -> float:
    """Return the rate of 0-based ``step``: rises linearly over warmup_steps from 0, then follows the schedule to 0.

    Same values as transformers' get_linear_schedule_with_warmup, get_cosine_schedule_with_warmup and
    get_constant_schedule_with_warmup.
    """
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * max(0.0, 1 - progress)


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    kind: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    device: torch.device,
) -> tuple[torch.optim.Optimizer, str]:
    """Return the optimizer and the name of what is really used. kind: "adamw" or "adamw_8bit"."""
    listed = list(parameters)
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
    if kind == "adamw_8bit":
        return AdamW8bit(listed, **settings), "adamw_8bit"
    return torch.optim.AdamW(listed, **settings, fused=device.type in ("cuda", "cpu")), "adamw"


def can_flatten(adapter: Adapter, kind: str) -> bool:
    """Say whether one flat tensor of all parameters is updated exactly as the single tensors are.

    kind: what ``make_optimizer`` says is used. fp32 AdamW works element by element: always. 8-bit AdamW scales blocks
    of 256 elements and keeps fp32 state for tensors of fewer than 4,096: where every parameter is whole blocks and
    large enough.
    """
    if kind != "adamw_8bit":
        return True
    return all(p.numel() >= SMALLEST_8BIT and p.numel() % BLOCK == 0 for p in adapter.parameters())


def clip_on_device(gradient: Tensor, max_norm: float) -> Tensor:
    """Scale ``gradient`` (n,) in place so that its L2 norm is at most ``max_norm``; return the norm before, () fp64.

    max_norm: 0 only measures. A gradient whose norm is not finite stays as it is. Nothing waits for the device.
    """
    whole = gradient.numel() // _NORM_CHUNK * _NORM_CHUNK
    norms = torch.linalg.vector_norm(gradient[:whole].view(-1, _NORM_CHUNK), dim=1)
    rest = torch.linalg.vector_norm(gradient[whole:]).view(1)
    norm = torch.linalg.vector_norm(torch.cat([norms, rest]).double())
    if max_norm:
        factor = torch.where(norm.isfinite(), (max_norm / norm).clamp(max=1), torch.ones_like(norm))
        gradient.mul_(factor.to(gradient.dtype))
    return norm


def optimizer_state(
    optimizer: torch.optim.Optimizer, pieces: Sequence[Piece] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state as named tensors ("3.exp_avg"), copied, and plain numbers, ready for safetensors and JSON.

    pieces: ``FlatAdapter.pieces`` where the optimizer holds its one parameter; the state is cut and numbered as that of
    the single parameters would be.

    Parameters share the values of their 8-bit codes, which safetensors refuses, hence the copies.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    entries = {number: _plain(state) for number, state in optimizer.state_dict()["state"].items()}
    if pieces is not None and entries:
        assert list(entries) == [0], "pieces belong to an optimizer of one flat parameter"
        entries = dict(enumerate(_cut(entries[0], pieces)))
    for number, entry in entries.items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                numbers[f"{number}.{name}"] = value
    return tensors, numbers


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Copy tensors to the CPU."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def _cut(whole: dict[str, Any], pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Return the state of each piece: slices of what lies along the parameter, a copy of the rest."""

    def part(name: str, value: Any, piece: Piece) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name not in _UNITS:
            return value.clone()
        unit = _UNITS[name]
        cut = value.view(-1)[piece.start // unit : (piece.start + piece.size) // unit]
        return cut.view(piece.shape) if unit == 1 else cut

    return [{name: part(name, value, piece) for name, value in whole.items()} for piece in pieces]


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
    pieces: Sequence[Piece] | None = None,
) -> None:
    """Put saved state back. pieces: as for ``optimizer_state``; flat and single state are saved alike.

    Raises RunError where the state belongs to another adapter, or to the other kind of AdamW.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    whole = optimizer.state_dict()
    expected = len(whole["param_groups"][0]["params"]) if pieces is None else len(pieces)
    if state and sorted(state) != list(range(expected)):
        raise _another_adapter()
    if state and ("exp_avg" in state[0]) != isinstance(optimizer, torch.optim.AdamW):
        kinds = ("8-bit", "fp32") if isinstance(optimizer, torch.optim.AdamW) else ("fp32", "8-bit")
        raise RunError(
            f"the checkpoint keeps the optimizer's state in {kinds[0]}, this run would in {kinds[1]}",
            "set train.optimizer to adamw (fp32) or adamw_8bit as it was, or start a new run",
        )
    if pieces is not None and state:
        state = {0: _join([state[number] for number in range(expected)], pieces)}
    whole["state"] = state
    optimizer.load_state_dict(whole)


def _join(entries: Sequence[dict[str, Any]], pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the state of the flat parameter. Raises RunError where an entry does not have its piece's size."""
    whole = dict(entries[0])
    total = sum(piece.size for piece in pieces)
    if any(entry.keys() != whole.keys() or entry["step"] != whole["step"] for entry in entries):
        raise _another_adapter()
    for name in whole.keys() & _UNITS.keys():
        unit = _UNITS[name]
        whole[name] = torch.empty(total // unit, dtype=whole[name].dtype)
        for entry, piece in zip(entries, pieces, strict=True):
            if entry[name].numel() * unit != piece.size or entry[name].dtype != whole[name].dtype:
                raise _another_adapter()
            start = piece.start // unit
            whole[name][start : start + entry[name].numel()] = entry[name].view(-1)
    return whole


def _another_adapter() -> RunError:
    return RunError("the checkpoint's optimizer state belongs to another adapter", "start a new run")
