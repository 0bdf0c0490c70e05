"""Rotary embedding against float64 and against its own geometry."""

from typing import Any

import pytest
import torch
from test_rms_norm import in_gaps
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl
from deepdoctor.kernels.rope import apply_rope, rope_backward, rope_qkv_, rope_tables
from helpers_numeric import assert_matches, assert_no_less_accurate
from helpers_triton import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [(0, 2, 1, 8), (1, 1, 1, 2), (7, 5, 2, 6), (65, 9, 3, 64), (3, 32, 8, 128), (2, 3, 1, 100)]
"""T, N, K, H."""


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


def check_functional(impl: Impl, layout: tuple[int, int, int, int], dtype: torch.dtype, gap: int = 0) -> None:
    """The rotation in place and its gradient against float64; v and what lies beside is not touched."""
    device = DEVICE if impl == "triton" else "cpu"
    tokens, heads, key_heads, head_dim = layout
    every, turned = heads + 2 * key_heads, heads + key_heads
    draw = torch.Generator().manual_seed(0)
    x, d = (torch.randn(tokens, every, head_dim, generator=draw).to(device, dtype) for _ in range(2))
    cos, sin = (table.to(device) for table in tables(tokens, head_dim))

    qkv = x.clone()
    assert rope_qkv_(qkv, cos, sin, turned, impl=impl) is qkv
    # cos and sin are rounded by the op: the truth rotates by the rounded ones.
    near = cos.to(dtype), sin.to(dtype)
    assert_no_less_accurate(qkv, plain(x, *near, turned), plain(x.double(), *(t.double() for t in near), turned))
    assert torch.equal(qkv[:, turned:], x[:, turned:])

    exact = plain(d.double(), near[0].double(), -near[1].double(), turned)
    reference = plain(d, near[0], -near[1], turned)
    parts = d.split([heads, key_heads, key_heads], dim=1)
    # As attention returns them: heads before tokens in memory, or side by side.
    for given in (parts, [part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts]):
        buffer, out = in_gaps(torch.zeros(tokens, every * head_dim, dtype=dtype, device=device), gap)
        wide = out if gap == 0 else buffer
        assert rope_backward(*given, cos, sin, out=wide, impl=impl) is wide
        got = out.unflatten(1, (every, head_dim))
        assert_no_less_accurate(got, reference, exact)
        assert torch.equal(got[:, turned:], parts[2])
        assert buffer[:, every * head_dim :].isnan().all()


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_functional_forms(layout: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """In place and backward are as exact as the plain form's, into contiguous rows and into rows with gaps."""
    check_functional("torch", layout, dtype)
    check_functional("torch", layout, dtype, gap=3)


def test_backward_undoes_the_rotation() -> None:
    """The gradient of a rotation turned by the same tables is what was rotated."""
    x = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = tables(5, 8)
    q, k, v = rope_qkv_(x.clone(), cos, sin, 5).split([4, 1, 1], dim=1)
    assert torch.allclose(rope_backward(q, k, v, cos, sin, out=torch.zeros(5, 48)).view_as(x), x, atol=1e-6)


QKV = torch.zeros(3, 4, 8)
TABLE = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"qkv": torch.zeros(3, 4, 7)}, r"qkv is \(3, 4, 7\), expected \(T, heads, H\) with an even H"),
        ({"qkv": torch.zeros(3, 32)}, r"qkv is \(3, 32\), expected \(T, heads, H\)"),
        ({"qkv": QKV.double()}, "qkv is torch.float64, expected bf16"),
        ({"qkv": torch.zeros(3, 5, 8)[:, :4]}, r"qkv has strides \(40, 8, 1\), expected a contiguous tensor"),
        ({"cos": torch.zeros(4, 4)}, r"cos is \(4, 4\) .*, expected \(3, 4\) torch.float32"),
        ({"sin": TABLE.half()}, "sin is .* torch.float16 on cpu, expected .* torch.float32"),
        ({"sin": TABLE.to("meta")}, "sin is .* on meta"),
        ({"cos": torch.zeros(4, 3).t()}, "cos has strides .*, expected a contiguous tensor"),
        ({"rotated": 5}, "rotated is 5, expected 0 to 4 heads"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ],
)
def test_rope_qkv_refuses(changed: dict[str, Any], said: str) -> None:
    """Dtype, device, shape and stride of every argument are named with what was expected."""
    with pytest.raises(KernelInputError, match=said):
        rope_qkv_(**({"qkv": QKV, "cos": TABLE, "sin": TABLE, "rotated": 3} | changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dq": torch.zeros(3, 8, 2).transpose(1, 2)}, "dq has strides .*, expected a contiguous last dimension"),
        ({"dk": torch.zeros(3, 1, 6)}, r"dk is \(3, 1, 6\) .*, expected \(3, 1, 8\)"),
        ({"dk": torch.zeros(3, 8)}, r"dk is \(3, 8\), expected \(T, heads, H\)"),
        ({"dv": torch.zeros(3, 2, 8)}, r"dv is \(3, 2, 8\) .*, expected \(3, 1, 8\)"),
        ({"dv": torch.zeros(3, 1, 8).half()}, "dv is .*float16 on cpu, expected .*float32"),
        ({"cos": TABLE[:2]}, r"cos is \(2, 4\)"),
        ({"out": torch.zeros(3, 31)}, r"out is \(3, 31\), expected \(3, 32 or more\)"),
        ({"out": torch.zeros(2, 32)}, r"out is \(2, 32\) .*, expected \(3, 32\)"),
        ({"out": torch.zeros(3, 32).half()}, "out is .*float16"),
        ({"out": torch.zeros(32, 3).t()}, "out has strides"),
    ],
)
def test_rope_backward_refuses(changed: dict[str, Any], said: str) -> None:
    """As rope_qkv_, and an output too narrow for all heads."""
    given = {"dq": torch.zeros(3, 2, 8), "dk": torch.zeros(3, 1, 8), "dv": torch.zeros(3, 1, 8)}
    with pytest.raises(KernelInputError, match=f"rope_backward: {said}"):
        rope_backward(**(given | {"cos": TABLE, "sin": TABLE, "out": torch.zeros(3, 32)} | changed))
