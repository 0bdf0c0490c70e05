"""SwiGLU against float64."""

from typing import Any

import pytest
import torch
from test_rms_norm import in_gaps
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl
from deepdoctor.kernels.swiglu import swiglu, swiglu_backward_, swiglu_forward
from helpers_numeric import assert_matches, assert_no_less_accurate, run_with_gradients
from helpers_triton import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 8), (1, 1), (1, 4096), (7, 33), (65, 100)]


def plain(gate_up: Tensor) -> Tensor:
    """``silu(g) * u``."""
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def check_functional(impl: Impl, shape: tuple[int, int], dtype: torch.dtype, gap: int = 0) -> None:
    """Forward and backward against float64, written where they belong and nowhere else; act is forward's output."""
    device = DEVICE if impl == "triton" else "cpu"
    draw = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape[0], 2 * shape[1], generator=draw)).to(device, dtype)
    da = torch.randn(shape, generator=draw).to(device, dtype)
    exact, exact_grad = run_with_gradients(plain, [x], da, torch.float64)
    reference, reference_grad = run_with_gradients(plain, [x], da)

    (x_buffer, x_view), (da_buffer, da_view) = in_gaps(x, gap), in_gaps(da, gap)
    (out_buffer, out), (act_buffer, act) = in_gaps(torch.zeros_like(da), gap), in_gaps(torch.zeros_like(da), gap)
    assert swiglu_forward(x_view, out=out, impl=impl) is out
    assert torch.equal(x_view, x)
    assert_no_less_accurate(out, reference, exact)
    fresh = swiglu_forward(x_view, impl=impl)
    assert fresh.is_contiguous() and torch.equal(fresh, out)

    assert swiglu_backward_(x_view, da_view, act=act, impl=impl) is x_view
    assert_no_less_accurate(x_view, reference_grad, exact_grad)
    assert torch.equal(act, out) and torch.equal(da_view, da)
    for buffer, width in ((x_buffer, 2 * shape[1]), *((b, shape[1]) for b in (da_buffer, out_buffer, act_buffer))):
        assert buffer[:, width:].isnan().all()
    assert torch.equal(swiglu_backward_(x.clone(), da, impl=impl), x_view)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_functional_forms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Output and gradient are as exact as the plain form's, for contiguous rows and for rows with gaps."""
    check_functional("torch", shape, dtype)
    check_functional("torch", shape, dtype, gap=3)


def test_functional_forms_with_large_gates() -> None:
    """A very negative gate gives zeros and a very positive one the identity, forward and backward."""
    x, ones = torch.tensor([[-200.0, 200.0, 3.0, 3.0]]), torch.ones(1, 2)
    assert torch.equal(swiglu_forward(x), torch.tensor([[0.0, 600.0]]))
    assert torch.equal(swiglu_backward_(x, ones), torch.tensor([[0.0, 3.0, 0.0, 200.0]]))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gate_up": torch.zeros(2, 5)}, r"gate_up is \(2, 5\), expected \(T, 2F\)"),
        ({"gate_up": torch.zeros(2, 8, 1)}, r"gate_up is \(2, 8, 1\), expected \(T, 2F\)"),
        ({"gate_up": torch.zeros(2, 8, dtype=torch.float64)}, "gate_up is torch.float64, expected bf16"),
        ({"gate_up": torch.zeros(8, 2).t()}, r"gate_up has strides \(1, 2\), expected contiguous rows"),
        ({"d_act": torch.zeros(2, 8)}, r"d_act is \(2, 8\) torch.float32 on cpu, expected \(2, 4\)"),
        ({"d_act": torch.zeros(2, 4, device="meta")}, "d_act is .* on meta, expected .* on cpu"),
        ({"act": torch.zeros(2, 4, dtype=torch.float16)}, "act is .*float16 on cpu, expected .*float32"),
        ({"act": torch.zeros(2, 8)[:, ::2]}, r"act has strides \(8, 2\)"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ],
)
def test_functional_forms_refuse(changed: dict[str, Any], said: str) -> None:
    """Dtype, device, shape and stride of every argument are named with what was expected."""
    given = {"gate_up": torch.zeros(2, 8), "d_act": torch.zeros(2, 4), "act": torch.zeros(2, 4)}
    with pytest.raises(KernelInputError, match=said):
        swiglu_backward_(**(given | changed))
    if "gate_up" in changed:
        with pytest.raises(KernelInputError, match=said):
            swiglu_forward(changed["gate_up"])
    with pytest.raises(KernelInputError, match=r"swiglu_forward: out is \(2, 3\)"):
        swiglu_forward(given["gate_up"], out=torch.zeros(2, 3))
