"""Rotary embedding against float64 and against its own geometry."""

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.rope import apply_rope, rope_tables
from helpers_numeric import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cos and sin of positions that restart, as in packed rows."""
    half = head_dim // 2
    positions = torch.arange(tokens) % 5 * 37
    return rope_tables(positions, 10000.0 ** -(torch.arange(half) / half))


def plain(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """``x cos + rotate_half(x) sin`` on the first heads, as the reference models write it."""
    cos = torch.cat([cos, cos], -1)[:, None].to(x.dtype)
    sin = torch.cat([sin, sin], -1)[:, None].to(x.dtype)
    head = x[:, :rotated]
    a, b = head.chunk(2, -1)
    return torch.cat([head * cos + torch.cat([-b, a], -1) * sin, x[:, rotated:]], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "rotated"),
    [(1, 1, 2, 1), (1, 4, 64, 3), (7, 5, 6, 4), (33, 15, 64, 12), (3, 2, 8, 0)],
)
def test_forward_and_gradient(tokens: int, heads: int, head_dim: int, rotated: int, dtype: torch.dtype) -> None:
    """Output and gradient are as exact as the plain form's; heads past ``rotated`` are copied untouched."""
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(tokens, heads, head_dim, generator=draw).to(dtype) for _ in range(2))
    cos, sin = tables(tokens, head_dim)
    assert_matches(lambda x: apply_rope(x, cos, sin, rotated), lambda x: plain(x, cos, sin, rotated), [x], dy)
    out = apply_rope(x, cos, sin, rotated)
    assert torch.equal(out[:, rotated:], x[:, rotated:]) and out.is_contiguous()


def test_scores_depend_on_distance_alone() -> None:
    """q at p and k at p - d have one product for every p: what the rotation is for."""
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequencies = 100.0 ** -(torch.arange(8, dtype=torch.float64) / 8)

    def score(p: int) -> float:
        turn = [rope_tables(torch.tensor([at]), frequencies) for at in (p, p - 4)]
        return float((apply_rope(q, *turn[0]) * apply_rope(k, *turn[1])).sum())

    assert score(4) == pytest.approx(score(90), rel=1e-5) == pytest.approx(score(1000), rel=1e-5)
    assert score(4) != pytest.approx(float((q * k).sum()), rel=1e-3)


def test_strided_input_and_the_factor() -> None:
    """A transposed view gives what a copy gives; the factor scales cos and sin (YaRN)."""
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    cos, sin = tables(4, 8)
    assert not x.is_contiguous()
    assert torch.equal(apply_rope(x, cos, sin, 2), apply_rope(x.contiguous(), cos, sin, 2))
    assert_matches(lambda x: apply_rope(x, cos, sin, 2), lambda x: plain(x, cos, sin, 2), [x], x.flip(1))
    positions, frequencies = torch.arange(4), torch.ones(4)
    scaled, once = rope_tables(positions, frequencies, 1.5), rope_tables(positions, frequencies)
    assert torch.equal(scaled[0], once[0] * 1.5) and torch.equal(scaled[1], once[1] * 1.5)


@pytest.mark.parametrize(
    ("x", "table", "rotated"),
    [((3, 2, 7), (3, 3), None), ((3, 2, 8), (4, 4), None), ((3, 8), (3, 4), None), ((3, 2, 8), (3, 4), 3)],
)
def test_refuses_what_does_not_fit(x: tuple[int, ...], table: tuple[int, ...], rotated: int | None) -> None:
    """Odd head dims, tables of another length, a missing dimension and too many heads are refused by name."""
    with pytest.raises(KernelInputError, match=r"apply_rope: .*expected"):
        apply_rope(torch.zeros(x), torch.zeros(table), torch.zeros(table), rotated)
