"""The Triton SwiGLU against float64: the checks of its reference, and what only a kernel can get wrong."""

import pytest
import torch
from test_swiglu import DTYPES, SHAPES, check_functional, plain

from deepdoctor.kernels.swiglu import swiglu, swiglu_backward_, swiglu_forward
from helpers_numeric import assert_matches
from helpers_triton import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2049), (5, 1024)])
def test_functional_forms_triton(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Forward and backward, for contiguous rows and for rows with gaps, aligned to 16 bytes and not."""
    for gap in (0, 3, 16):
        check_functional("triton", shape, dtype, gap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_op(dtype: torch.dtype) -> None:
    """swiglu itself: rows, three dimensions, a column slice, every second row and a transposed view."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(9, 4, 40, generator=draw).to(DEVICE, dtype)
    for x in (wide, wide[:, 0], wide[::2, 1], wide[:, 0, 3:17], wide.transpose(0, 1), wide[0, 0], wide.transpose(1, 2)):
        da = torch.randn(*x.shape[:-1], x.shape[-1] // 2, generator=draw).to(DEVICE, dtype)
        before = x.clone()
        assert_matches(lambda x: swiglu(x, impl="triton"), plain, [x], da)
        assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's numpy says so
def test_large_gates() -> None:
    """exp of a very negative gate overflows to infinity and gives zeros; nothing becomes nan."""
    x, ones = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=DEVICE), torch.ones(1, 2, device=DEVICE)
    assert swiglu_forward(x, impl="triton").tolist() == [[0.0, 600.0]]
    assert swiglu_backward_(x, ones, impl="triton").tolist() == [[0.0, 3.0, 0.0, 200.0]]


@pytest.mark.gpu
def test_auto_takes_the_kernel() -> None:
    """On a CUDA device "auto" gives the kernel's bits."""
    x = torch.randn(33, 384, device="cuda", dtype=torch.float16)
    da = torch.randn(33, 192, device="cuda", dtype=torch.float16)
    assert torch.equal(swiglu(x), swiglu_forward(x, impl="triton"))
    assert torch.equal(swiglu_backward_(x.clone(), da), swiglu_backward_(x.clone(), da, impl="triton"))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    """Rows of a buffer of more than 2**31 elements are found: once the offsets were counted in 32 bits."""
    rows, stride, width = 75_000, 28_704, 64
    buffer = torch.empty(rows, stride, dtype=torch.float16, device="cuda")
    values = torch.randn(rows, 3 * width, dtype=torch.float16, device="cuda")
    x, da, act = buffer[:, : 2 * width], buffer[:, 256 : 256 + width], buffer[:, 512 : 512 + width]
    x.copy_(values[:, : 2 * width])
    da.copy_(values[:, 2 * width :])
    small, small_da = values[:, : 2 * width].contiguous(), values[:, 2 * width :].contiguous()
    expected = swiglu_forward(small, impl="triton")
    assert torch.equal(swiglu_forward(x, out=act, impl="triton"), expected)
    act.zero_()
    grad = swiglu_backward_(small, small_da, impl="triton")
    assert torch.equal(swiglu_backward_(x, da, act=act, impl="triton"), grad)
    assert torch.equal(act, expected)
