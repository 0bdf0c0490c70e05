"""RMS norm against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl
from deepdoctor.kernels.rms_norm import add_rms_norm, normalise, rms_norm, rms_norm_backward
from helpers_numeric import assert_matches, assert_no_less_accurate, run_with_gradients
from helpers_triton import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 8), (1, 1), (1, 4096), (7, 66), (65, 100)]
EPS = 1e-5


def plain(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The maths as the reference models write it: normalised in at least fp32, rounded, then scaled."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_gaps(values: Tensor, gap: int = 3) -> tuple[Tensor, Tensor]:
    """A buffer of nan, and the view of its rows' beginnings that holds values."""
    buffer = torch.full((values.shape[0], values.shape[1] + gap), torch.nan, dtype=values.dtype, device=values.device)
    view = buffer[:, : values.shape[1]]
    view.copy_(values)
    return buffer, view


def check_add(impl: Impl, shape: tuple[int, int], dtype: torch.dtype, with_delta: bool, gap: int = 0) -> None:
    """total, y and rstd against float64, written where they belong and nowhere else; y once more from total."""
    device = DEVICE if impl == "triton" else "cpu"
    x, delta, weight = (
        draw(*size, dtype=dtype, seed=seed).to(device) for seed, size in enumerate([shape, shape, shape[1:]])
    )
    total = x + delta if with_delta else x
    exact = x.double() + delta.double() if with_delta else x.double()
    (x_buffer, x_view), (delta_buffer, delta_view) = in_gaps(x, gap), in_gaps(delta, gap)
    out_buffer, out = in_gaps(torch.zeros_like(x), gap)
    got, y, rstd = add_rms_norm(x_view, delta_view if with_delta else None, weight, EPS, out=out, impl=impl)

    assert got is (delta_view if with_delta else x_view) and y is out
    assert torch.equal(x_view, x) and (with_delta or torch.equal(delta_view, delta))
    assert_no_less_accurate(got, total, exact)
    assert_no_less_accurate(y, plain(total, weight, EPS), plain(exact, weight.double(), EPS))
    assert rstd.shape == shape[:1] and rstd.dtype == torch.float32
    # Summed in fp32 in any order: within a few roundings.
    torch.testing.assert_close(rstd.double(), (got.double().pow(2).mean(-1) + EPS).rsqrt(), rtol=2e-6, atol=0)
    for buffer in (x_buffer, delta_buffer, out_buffer):
        assert buffer[:, shape[1] :].isnan().all()
    again_buffer, again = in_gaps(torch.zeros_like(x), gap)
    assert normalise(got, rstd, weight, out=again, impl=impl) is again
    assert torch.equal(again, y) and again_buffer[:, shape[1] :].isnan().all()
    assert torch.equal(normalise(got, rstd, weight, impl=impl), y)


def check_backward(impl: Impl, shape: tuple[int, int], dtype: torch.dtype, with_add: bool, gap: int = 0) -> None:
    """The gradient, plus add, against float64; into a new tensor, into a view, and over add."""
    device = DEVICE if impl == "triton" else "cpu"
    x, dy, add = (draw(*shape, dtype=dtype, seed=seed).to(device) for seed in range(3))
    weight = draw(shape[1], dtype=dtype, seed=3).to(device)
    rstd = add_rms_norm(x, None, weight, EPS, impl=impl)[2]
    exact = run_with_gradients(lambda x: plain(x, weight.to(x.dtype), EPS), [x], dy, torch.float64)[1]
    reference = run_with_gradients(lambda x: plain(x, weight.to(x.dtype), EPS), [x], dy)[1]
    # The gradient of one column is what cancellation leaves of it: looked at only beside add.
    with_add = with_add or shape[1] == 1
    past = add if with_add else None
    if with_add:
        exact, reference = exact + add.double(), reference + add
    fresh = rms_norm_backward(dy, x, rstd, weight, add=past, impl=impl)
    assert fresh.is_contiguous()
    assert_no_less_accurate(fresh, reference, exact)

    (_, dy_view), (_, x_view), (buffer, out) = in_gaps(dy, gap), in_gaps(x, gap), in_gaps(add, gap)
    over = out if with_add else None
    assert rms_norm_backward(dy_view, x_view, rstd, weight, add=over, out=out, impl=impl) is out
    assert torch.equal(out, fresh) and buffer[:, shape[1] :].isnan().all()
    assert torch.equal(x_view, x) and torch.equal(dy_view, dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (7, 33), (130, 576), (5, 3, 32)])
def test_forward_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output and gradient are as exact as the plain form's, for odd widths, one token and head norms alike."""
    x, dy = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    weight = 1 + 0.5 * draw(shape[-1], dtype=dtype, seed=2)
    assert_matches(lambda x: rms_norm(x, weight, 1e-5), lambda x: plain(x, weight.to(x.dtype)), [x], dy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input(dtype: torch.dtype) -> None:
    """A slice of a wider tensor and a transposed one, as q and k are, give what a copy gives."""
    wide = draw(6, 10, 32, dtype=dtype)
    weight = draw(32, dtype=dtype, seed=1)
    for x in (wide[:, 2:5], wide.transpose(0, 1), wide[::2]):
        assert not x.is_contiguous()
        assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight, 1e-6))
        assert_matches(lambda x: rms_norm(x, weight, 1e-5), lambda x: plain(x, weight.to(x.dtype)), [x], x.flip(0))


def test_small_and_large_values() -> None:
    """Zeros stay zero with a finite gradient, and fp16 values whose squares overflow fp16 are normalised."""
    weight = torch.ones(8)
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert torch.equal(rms_norm(x, weight, 1e-5), torch.zeros(2, 8))
    large = torch.full((1, 8), 60000.0, dtype=torch.float16)
    assert torch.equal(rms_norm(large, weight.half(), 1e-5), torch.ones(1, 8, dtype=torch.float16))


def test_saves_the_input_and_one_number_per_row() -> None:
    """Backward keeps x itself, the weight and (T, 1) fp32, not the normalised copy."""
    x, weight = draw(4, 16, dtype=torch.bfloat16).requires_grad_(), torch.ones(16, dtype=torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-5)
    assert [tuple(t.shape) for t in saved] == [(4, 16), (16,), (4, 1)]
    assert saved[0].data_ptr() == x.data_ptr()


def test_refuses_what_does_not_fit() -> None:
    """A weight of another width or dtype is named with what was expected."""
    x = torch.zeros(2, 8)
    with pytest.raises(KernelInputError, match=r"weight is \(7,\) torch.float32, expected \(8,\) torch.float32"):
        rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(KernelInputError, match="bfloat16, expected"):
        rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-5)


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, with_delta: bool) -> None:
    """Sum, norm and 1 / rms are as exact as the plain form's, for contiguous rows and for rows with gaps."""
    check_add("torch", shape, dtype, with_delta)
    check_add("torch", shape, dtype, with_delta, gap=3)


@pytest.mark.parametrize("with_add", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_backward(shape: tuple[int, int], dtype: torch.dtype, with_add: bool) -> None:
    """The gradient is as exact as autograd's, for contiguous rows and for rows with gaps."""
    check_backward("torch", shape, dtype, with_add)
    check_backward("torch", shape, dtype, with_add, gap=5)


def test_functional_ops_record_no_gradient() -> None:
    """Inputs that ask for gradients are used as they are, and delta may be one of them."""
    x, delta = (
        draw(3, 8, dtype=torch.float32).requires_grad_(),
        draw(3, 8, dtype=torch.float32, seed=1).requires_grad_(),
    )
    weight = torch.ones(8)
    total, y, rstd = add_rms_norm(x, delta, weight, EPS)
    assert total is delta and not y.requires_grad
    assert not rms_norm_backward(y, x, rstd, weight).requires_grad


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "x is torch.float64, expected bf16"),
        ({"x": torch.zeros(2, 8, 1)}, r"x is \(2, 8, 1\), expected \(T, D\)"),
        ({"x": torch.zeros(8, 2).t()}, r"x has strides \(1, 2\), expected contiguous rows"),
        ({"x": torch.zeros(8).expand(2, 8)}, r"x has strides \(0, 1\), expected contiguous rows"),
        ({"delta": torch.zeros(3, 8)}, r"delta is \(3, 8\) torch.float32 on cpu, expected \(2, 8\)"),
        ({"delta": torch.zeros(2, 8, dtype=torch.float16)}, "delta is .*float16 on cpu, expected .*float32"),
        ({"delta": torch.zeros(2, 8, device="meta")}, "delta is .* on meta, expected .* on cpu"),
        ({"out": torch.zeros(2, 16)[:, ::2]}, r"out has strides \(16, 2\)"),
        ({"weight": torch.ones(7)}, r"weight is \(7,\) .*, expected \(8,\)"),
        ({"weight": torch.ones(8, dtype=torch.bfloat16)}, "weight is .*bfloat16"),
        ({"weight": torch.ones(8, device="meta")}, "weight is .* on meta"),
        ({"weight": torch.ones(16)[::2]}, "weight has stride 2, expected 1"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ],
)
def test_add_rms_norm_refuses(changed: dict[str, Any], said: str) -> None:
    """Dtype, device, shape and stride of every argument are named with what was expected."""
    given = {"x": torch.zeros(2, 8), "delta": torch.zeros(2, 8), "weight": torch.ones(8), "eps": EPS}
    with pytest.raises(KernelInputError, match=said):
        add_rms_norm(**(given | changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dy": torch.zeros(2, 7)}, r"dy is \(2, 7\)"),
        ({"add": torch.zeros(2, 8, dtype=torch.float16)}, "add is .*float16"),
        ({"out": torch.zeros(8, 2).t()}, "out has strides"),
        (
            {"rstd": torch.zeros(2, dtype=torch.float16)},
            r"rstd is \(2,\) torch.float16 .*, expected \(2,\) torch.float32",
        ),
        ({"rstd": torch.zeros(2, 1)}, r"rstd is \(2, 1\)"),
    ],
)
def test_rms_norm_backward_refuses(changed: dict[str, Any], said: str) -> None:
    """As add_rms_norm; normalise checks rstd in the same way."""
    given = {"dy": torch.zeros(2, 8), "x": torch.zeros(2, 8), "rstd": torch.ones(2), "weight": torch.ones(8)}
    with pytest.raises(KernelInputError, match=f"rms_norm_backward: {said}"):
        rms_norm_backward(**(given | changed))
    if "rstd" in changed:
        with pytest.raises(KernelInputError, match=f"normalise: {said}"):
            normalise(given["x"], changed["rstd"], given["weight"])
