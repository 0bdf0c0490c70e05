"""Packed copies of weights for decoding: only where they lose no more than bf16 does."""

import pytest
import torch

from deepdoctor.model.cpu_weights import FEW_ROWS, PackedWeight, four_bit_grid, has_fp16_products, has_packed_kernels

needs_kernels = pytest.mark.skipif(not has_packed_kernels(), reason="this processor has no oneDNN bf16 products")


def grid_weight(rows=96, columns=128, seed=0):
    """A weight as a Q4_1 file holds it, rounded to bf16: 16 levels per run of 32, both ends taken."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 16, (rows, columns // 32, 32), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 15
    step = torch.rand(rows, columns // 32, 1, generator=generator) * 0.02 + 1e-3
    least = -step * (5 + 5 * torch.rand(rows, columns // 32, 1, generator=generator))
    return (least + step * levels).view(rows, columns).bfloat16().float()


def test_a_grid_is_found_and_others_are_not():
    """Q4_1 weights are recognised to the last level; random, near-grid and oddly sized weights are left alone."""
    weight = grid_weight()
    levels, step, least = four_bit_grid(weight)
    again = least[..., None] + step[..., None] * levels.view(96, 4, 32)
    assert (again.view_as(weight) - weight).abs().max() < 0.1 * step.max()
    assert levels.min() == 0 and levels.max() == 15
    assert four_bit_grid(torch.randn(96, 128)) is None
    moved = weight.clone()
    moved[40, 70] += 0.3 * step[40, 2]
    assert four_bit_grid(moved) is None
    assert four_bit_grid(torch.randn(8, 40)) is None


def test_a_grid_is_judged_over_all_rows():
    """A weight whose last rows leave the grid is refused, though it is looked at in parts."""
    weight = grid_weight(rows=1100)
    assert four_bit_grid(weight) is not None
    weight[1099] = torch.randn(128)
    assert four_bit_grid(weight) is None


def test_a_constant_run_is_a_grid():
    """Thirty-two equal weights have a step of zero, and come back as they are."""
    weight = torch.full((4, 64), 0.25)
    levels, step, least = four_bit_grid(weight)
    assert not step.any() and (least == 0.25).all() and not levels.any()


@needs_kernels
@pytest.mark.parametrize("make", [grid_weight, lambda: torch.randn(96, 128).bfloat16().float()])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_products_lose_no_more_than_their_format(make, rows, with_bias, wide):
    """Packed products stay within twice the error of plain ones against float64: bf16 for few rows, 4 bits too, else
    the format of the copy for many, unless the range of fp16 is too small."""
    torch.manual_seed(rows)
    weight, x = make(), torch.randn(rows, 128)
    bias = torch.randn(96) if with_bias else None
    many = rows > FEW_ROWS and not (wide and has_fp16_products())
    dtype = torch.float16 if many and has_fp16_products() else torch.bfloat16
    truth = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    plain = x.to(dtype) @ weight.to(dtype).T
    plain = plain + bias.to(dtype) if with_bias else plain
    packed = PackedWeight(weight, bias)
    found = packed(x, wide)
    assert found.dtype == (dtype if many else torch.float32)
    assert (packed.few is None) == many and (packed.many is None) != many
    allowed = 2 * (plain.double() - truth).square().mean().sqrt()
    assert (found.double() - truth).square().mean().sqrt() <= allowed
