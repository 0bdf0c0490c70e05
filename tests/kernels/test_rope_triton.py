"""The Triton rotation against float64: the checks of its reference, and what only a kernel can get wrong."""

import pytest
import torch
from test_rope import DTYPES, LAYOUTS, check_functional, plain, tables

from deepdoctor.kernels.rope import apply_rope, rope_backward, rope_qkv_
from helpers_numeric import assert_matches
from helpers_triton import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*LAYOUTS, (2, 40, 1, 2), (2, 2, 2, 256)])
def test_functional_forms_triton(layout: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """In place and backward, into contiguous rows and rows with gaps, aligned to 16 bytes and not."""
    for gap in (0, 3, 16):
        check_functional("triton", layout, dtype, gap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [0, 3, 5])
def test_autograd_op(rotated: int, dtype: torch.dtype) -> None:
    """apply_rope itself, forward and gradient, for contiguous heads, slices and transposed views."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 8, 16, generator=draw).to(DEVICE, dtype)
    square = torch.randn(5, 7, 16, generator=draw).to(DEVICE, dtype)
    cos, sin = (table.to(DEVICE) for table in tables(7, 16))
    for x in (
        wide[:, :5].contiguous(),
        wide[:, 2:7],
        square.transpose(0, 1),
        wide.transpose(1, 2)[:, :5].repeat(1, 1, 2),
    ):
        dy = torch.randn(x.shape, generator=draw).to(DEVICE, dtype)
        assert_matches(
            lambda x: apply_rope(x, cos, sin, rotated, impl="triton"), lambda x: plain(x, cos, sin, rotated), [x], dy
        )
        out = apply_rope(x, cos, sin, rotated, impl="triton")
        assert torch.equal(out[:, rotated:], x[:, rotated:]) and out.is_contiguous()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy says so
def test_heads_that_are_not_rotated_keep_their_bits() -> None:
    """Infinity, nan and minus zero in v pass through: a copy, not a turn by zero."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[:, 2] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, -1.0, 1.0, -0.0], device=DEVICE)
    cos, sin = (table.to(DEVICE) for table in tables(2, 8))
    out = apply_rope(x, cos, sin, 2, impl="triton")
    side = rope_backward(x[:, :1], x[:, 1:2], x[:, 2:], cos, sin, out=torch.zeros(2, 24, device=DEVICE), impl="triton")
    for got in (out[:, 2], side[:, 16:]):
        assert torch.equal(got.contiguous().view(torch.int32), x[:, 2].contiguous().view(torch.int32))


@pytest.mark.gpu
def test_auto_takes_the_kernel() -> None:
    """On a CUDA device "auto" gives the kernel's bits."""
    x = torch.randn(33, 15, 64, device="cuda", dtype=torch.float16)
    cos, sin = (table.cuda() for table in tables(33, 64))
    turned = rope_qkv_(x.clone(), cos, sin, 12, impl="triton")
    assert torch.equal(rope_qkv_(x.clone(), cos, sin, 12), turned)
    assert torch.equal(apply_rope(x, cos, sin, 12), turned)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    """Rows of a buffer of more than 2**31 elements are found: once the offsets were counted in 32 bits."""
    tokens, stride = 75_000, 28_704
    grad = torch.randn(tokens, 4, 16, dtype=torch.float16, device="cuda")
    cos, sin = (table.cuda() for table in tables(tokens, 16))
    parts = grad.split([2, 1, 1], dim=1)
    expected = rope_backward(*parts, cos, sin, out=torch.empty_like(grad).view(tokens, 64), impl="triton")
    buffer = torch.empty(tokens, stride, dtype=torch.float16, device="cuda")
    far = buffer[:, 64:128].unflatten(1, (4, 16))
    far.copy_(grad)
    out = buffer[:, :64]
    rope_backward(*far.split([2, 1, 1], dim=1), cos, sin, out=out, impl="triton")
    assert torch.equal(out, expected)
