"""SwiGLU against float64."""

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.swiglu import swiglu
from helpers_numeric import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(gate_up: Tensor) -> Tensor:
    """``silu(g) * u``."""
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (1, 30), (7, 66), (65, 384), (2, 3, 10)])
def test_forward_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output and gradient are as exact as the plain form's."""
    draw = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=draw)).to(dtype)
    da = torch.randn(*shape[:-1], shape[-1] // 2, generator=draw).to(dtype)
    assert_matches(swiglu, plain, [x], da)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input(dtype: torch.dtype) -> None:
    """Every second row and a column slice give what copies give."""
    wide = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    for x in (wide[::2], wide[:, 3:17]):
        assert torch.equal(swiglu(x), swiglu(x.contiguous()))
        assert_matches(swiglu, plain, [x], x[:, : x.shape[1] // 2].flip(0))


def test_saves_the_input_alone() -> None:
    """Backward keeps gate_up itself and nothing else, and leaves it as it was."""
    x = torch.randn(4, 16, requires_grad=True)
    before = x.detach().clone()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = swiglu(x)
    out.sum().backward()
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    assert torch.equal(x.detach(), before)


def test_large_gates_stay_finite() -> None:
    """silu of a very negative gate is zero and of a very positive one the gate, with finite gradients."""
    x = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], requires_grad=True)
    out = swiglu(x)
    out.sum().backward()
    assert torch.equal(out, torch.tensor([[0.0, 600.0]]))
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_refuses_an_odd_width() -> None:
    """The shape is named."""
    with pytest.raises(KernelInputError, match=r"gate_up is \(2, 5\), expected an even last dimension"):
        swiglu(torch.zeros(2, 5))
