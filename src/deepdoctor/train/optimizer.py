"""AdamW in fp32 or with 8-bit state, the learning-rate schedules, and their state as plain tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deepdoctor.errors import MissingExtraError, RunError

__all__ = ["learning_rate_at", "make_optimizer", "optimizer_state", "restore_optimizer"]

log = logging.getLogger(__name__)


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
    """Return the optimizer and the name of what is really used.

    kind: "adamw" or "adamw_8bit". The 8-bit state needs bitsandbytes: without it a CUDA run stops with
    MissingExtraError, a CPU run says so and uses fp32 state, which is faster there anyway.
    """
    listed = list(parameters)
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
    if kind == "adamw_8bit":
        try:
            import bitsandbytes
        except ImportError:
            if device.type == "cuda":
                raise MissingExtraError(
                    "train.optimizer is adamw_8bit, but bitsandbytes is not installed",
                    'pip install "deepdoctor[gpu]", or set `--train.optimizer adamw`',
                ) from None
            log.warning("bitsandbytes is not installed: AdamW keeps fp32 state instead of 8-bit")
        else:
            return bitsandbytes.optim.AdamW8bit(listed, **settings), "adamw_8bit"
    return torch.optim.AdamW(listed, **settings, fused=device.type in ("cuda", "cpu")), "adamw"


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state as named tensors ("3.exp_avg"), copied, and plain numbers, ready for safetensors and JSON.

    bitsandbytes wraps its tensors in an inner dict, which is laid flat, and shares its quantisation maps between
    parameters, which safetensors refuses, hence the copies. Its load_state_dict takes the flat form.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}

    def put(stem: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                put(stem, value)
            elif isinstance(value, Tensor):
                tensors[f"{stem}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                numbers[f"{stem}.{name}"] = value

    for number, state in optimizer.state_dict()["state"].items():
        put(str(number), state)
    return tensors, numbers


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put saved state back. Raises RunError where it belongs to another adapter."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    whole = optimizer.state_dict()
    if len(state) not in (0, len(whole["param_groups"][0]["params"])):
        raise RunError("the checkpoint's optimizer state belongs to another adapter", "start a new run")
    whole["state"] = state
    optimizer.load_state_dict(whole)
