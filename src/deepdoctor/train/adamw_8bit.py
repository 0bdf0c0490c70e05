"""AdamW with 8-bit state as an optimizer: what it keeps for each parameter, and how saved state comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from deepdoctor.kernels.adamw_8bit import BLOCK, adamw_8bit, adamw_fp32, code_values

__all__ = ["SMALLEST_8BIT", "AdamW8bit"]

SMALLEST_8BIT = 4096
"""Tensors with fewer elements keep fp32 state, as with bitsandbytes (min_8bit_size)."""


class AdamW8bit(torch.optim.Optimizer):
    """Updates fp32 parameters by ``kernels.adamw_8bit``; nothing in ``step`` waits for the device.

    State of a parameter of n elements, in names and types bitsandbytes' (0.50), so that checkpoints go both ways:
    step              int
    state1, state2    the parameter's shape, uint8 codes; fp32 moments below SMALLEST_8BIT elements, and nothing else:
    absmax1, absmax2  (ceil(n / 256),) fp32
    qmap1, qmap2      (256,) fp32, the values of the codes: the same for all parameters, and not read
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient. closure: as for PyTorch's optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_new_state(parameter))
                state["step"] += 1
                settings.update(step=state["step"], learning_rate=group["lr"])
                moments = state["state1"], state["state2"]
                if moments[0].dtype == torch.uint8:
                    largest = state["absmax1"], state["absmax2"]
                    adamw_8bit(parameter, parameter.grad, *moments, *largest, **settings)
                else:
                    adamw_fp32(parameter, parameter.grad, *moments, **settings)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put saved state back, copied; PyTorch's own would turn the codes into fp32."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number)
            if saved:
                self.state[parameter] = {name: _copied(value, parameter) for name, value in saved.items()}


def _new_state(parameter: Tensor) -> dict[str, Any]:
    n = parameter.numel()
    if n < SMALLEST_8BIT:
        return {"step": 0, "state1": torch.zeros_like(parameter), "state2": torch.zeros_like(parameter)}
    blocks = -(-n // BLOCK)
    qmap1, qmap2 = code_values(parameter.device)
    return {
        "step": 0,
        "state1": torch.zeros_like(parameter, dtype=torch.uint8),
        "qmap1": qmap1,
        "state2": torch.zeros_like(parameter, dtype=torch.uint8),
        "qmap2": qmap2,
        "absmax1": torch.zeros(blocks, device=parameter.device),
        "absmax2": torch.zeros(blocks, device=parameter.device),
    }


def _copied(value: Any, parameter: Tensor) -> Any:
    return value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
