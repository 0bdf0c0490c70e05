"""Copies of a weight that a CPU reads faster than fp32 when only a few rows are multiplied.

Three layouts. For up to ``FEW_ROWS`` rows reading decides: ATen's 4 bits with a scale and an offset per 32 weights,
taken only where the weight is such a grid already (a model that came as a Q4_1 GGUF), so that it loses nothing but the
rounding of scale and offset to bf16; else oneDNN's layout for bf16, which loses nothing of a model published in bf16.
For more rows arithmetic decides, and the 4-bit kernel unpacks anew for every four rows: oneDNN's layout for fp16 where
the processor has it (three bits more than bf16 in every activation), bf16 where it has AMX or no fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["FEW_ROWS", "Multiply", "PackedWeight", "four_bit_grid", "has_fp16_products", "has_packed_kernels"]

Multiply = Callable[[Tensor], Tensor]
"""x (n, I) -> x W^T + b (n, O)."""

FEW_ROWS = 12
"""Rows up to which fewer bytes win. Products of SmolLM2-135M in ms, 4 bits beside fp16, without AMX: on two cores 6 and
22 for one row, 35 and 34 for 16, 70 and 47 for 32; on one core 34 and 45 for 8 rows, 66 and 57 for 16. The next-token
distribution lies 8e-4 from fp32 with 4 bits, because activations are bf16 there, and 1e-5 with fp16."""

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


@cache
def has_fp16_products() -> bool:
    """Whether oneDNN's fp16 products are the fast ones for many rows: native fp16, and no AMX for bf16."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return has_packed_kernels() and supported is not None and supported() and not torch.cpu._is_amx_tile_supported()


class PackedWeight:
    """A weight W (O, I) with its bias (O,) in the layouts above, each made when first asked for.

    Called with x (n, I) in any float dtype, it rounds x to the layout's format and returns x W^T + b: fp32 from few
    rows, the format that ``many`` names from more. wide: leave out fp16, whose largest number is 65,504.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight = weight
        self.bias = bias
        self.fp16 = has_fp16_products()
        self.few: Multiply | None = None
        self.many: Multiply | None = None

    def __call__(self, x: Tensor, wide: bool = False) -> Tensor:
        """Return x W^T + b (n, O)."""
        if x.shape[0] <= FEW_ROWS or (wide and self.fp16):
            self.few = self.few or _few_rows(self.weight, self.bias)
            return self.few(x)
        self.many = self.many or _many_rows(self.weight, self.bias)
        return self.many(x)


def _few_rows(weight: Tensor, bias: Tensor | None) -> Multiply:
    """Return the product that reads the fewest bytes and loses no more than bf16 does."""
    grid = four_bit_grid(weight) if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") else None
    if grid is None:
        blocked = _blocked(weight, bias, torch.bfloat16, 1)
        return lambda x: blocked(x).float()
    levels, step, least = grid
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2)
    scales = torch.stack([step.T, (least + 8 * step).T], dim=-1).to(torch.bfloat16).contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    if bias is None:
        return lambda x: multiply(x.bfloat16(), packed, GROUP, scales).float()
    kept = bias.float()
    return lambda x: multiply(x.bfloat16(), packed, GROUP, scales).float().add_(kept)


def _many_rows(weight: Tensor, bias: Tensor | None) -> Multiply:
    """Return the product whose arithmetic is fastest; its result stays in the format, fp16 or bf16."""
    return _blocked(weight, bias, torch.float16 if has_fp16_products() else torch.bfloat16, FEW_ROWS + 1)


def _blocked(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int) -> Multiply:
    """oneDNN's layout for a dtype, laid out for a number of rows."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), rows)
    rounded = None if bias is None else bias.to(dtype)
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x.to(dtype), blocked, rounded, "none", [], "")
