"""Copies of a weight that a CPU reads faster than fp32 when only a few rows are multiplied.

Two layouts: oneDNN's for bf16, which loses nothing of a model published in bf16; and ATen's 4 bits with a scale and an
offset per 32 weights, taken only where the weight is such a grid already (a model that came as a Q4_1 GGUF), so that it
too loses nothing but the rounding of scale and offset to bf16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Multiply", "four_bit_grid", "has_packed_kernels", "packed_multiply"]

Multiply = Callable[[Tensor], Tensor]
"""x (n, I) -> x W^T + b (n, O), fp32 in and out, x rounded to bf16 for the product."""

GROUP = 32
LEVELS = 15
ROWS_AT_ONCE = 1024
"""Rows looked at together: a weight that is no grid is known after the first."""
OFF_GRID = 0.1
"""Furthest a weight may lie from its level, in steps: rounding to bf16 moves it by up to 8 / 512 of a step for values
within 8 steps of zero, weights that are no grid lie anywhere up to 0.5 off."""


def has_packed_kernels() -> bool:
    """Whether this build and processor have oneDNN's bf16 products in a layout of their own."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def four_bit_grid(weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return (levels, step, least) where every run of 32 weights of a row lies on 16 evenly spaced levels, else None.

    weight (O, I); levels (O, I) int32 in 0..15; step and least (O, I / 32) fp32: weight = least + step * level.
    """
    columns = weight.shape[1]
    if columns % GROUP:
        return None
    found = []
    for part in weight.split(ROWS_AT_ONCE):
        groups = part.float().view(part.shape[0], columns // GROUP, GROUP)
        least, most = groups.aminmax(dim=-1)
        step = (most - least) / LEVELS
        place = (groups - least[..., None]) / step.clamp_min(1e-30)[..., None]
        levels = place.round()
        if float(place.sub_(levels).abs_().max()) > OFF_GRID:
            return None
        found.append((levels.to(torch.int32).view(part.shape), step, least))
    levels, step, least = (torch.cat(parts) for parts in zip(*found, strict=True))
    return levels, step, least


def packed_multiply(weight: Tensor, bias: Tensor | None = None) -> Multiply:
    """Return the fastest product with W (O, I), and b (O,) added, that loses no more than bf16 does."""
    grid = four_bit_grid(weight) if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") else None
    if grid is None:
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16).contiguous(), 1)
        linear = torch.ops.mkldnn._linear_pointwise.default
        rounded = None if bias is None else bias.to(torch.bfloat16)
        return lambda x: linear(x.bfloat16(), blocked, rounded, "none", [], "").float()
    levels, step, least = grid
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2)
    scales = torch.stack([step.T, (least + 8 * step).T], dim=-1).to(torch.bfloat16).contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    if bias is None:
        return lambda x: multiply(x.bfloat16(), packed, GROUP, scales).float()
    kept = bias.float()
    return lambda x: multiply(x.bfloat16(), packed, GROUP, scales).float().add_(kept)
