"""RMS norm against float64."""

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.rms_norm import rms_norm
from helpers_numeric import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The maths as the reference models write it: normalised in at least fp32, rounded, then scaled."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
