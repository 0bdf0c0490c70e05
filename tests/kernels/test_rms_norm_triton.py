"""The Triton RMS norm against float64: the checks of its reference, and what only a kernel can get wrong."""

import pytest
import torch
from test_rms_norm import DTYPES, EPS, SHAPES, check_add, check_backward, draw, plain

from deepdoctor.kernels.rms_norm import add_rms_norm, normalise, rms_norm, rms_norm_backward
from helpers_numeric import assert_matches
from helpers_triton import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_triton(shape: tuple[int, int], dtype: torch.dtype, with_delta: bool) -> None:
    """Sum, norm and 1 / rms, for contiguous rows and for rows with gaps, aligned to 16 bytes and not."""
    for gap in (0, 3, 16):
        check_add("triton", shape, dtype, with_delta, gap)


@pytest.mark.parametrize("with_add", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_backward_triton(shape: tuple[int, int], dtype: torch.dtype, with_add: bool) -> None:
    """The gradient, for contiguous rows and for rows with gaps, aligned to 16 bytes and not."""
    for gap in (0, 5, 16):
        check_backward("triton", shape, dtype, with_add, gap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2048, 5120, 16384])
def test_wide_rows(width: int, dtype: torch.dtype) -> None:
    """One row per program, up to the widest that is promised, whole blocks and not."""
    check_add("triton", (2, width), dtype, True)
    check_backward("triton", (2, width), dtype, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_may_overwrite_dy(dtype: torch.dtype) -> None:
    """out may be dy or x: a program reads its rows before it writes them."""
    x, dy, weight = (draw(*size, dtype=dtype, seed=n).to(DEVICE) for n, size in enumerate([(5, 40), (5, 40), (40,)]))
    rstd = add_rms_norm(x, None, weight, EPS, impl="triton")[2]
    expected = rms_norm_backward(dy, x, rstd, weight, impl="triton")
    for out in (0, 1):
        given = [dy.clone(), x.clone()]
        assert torch.equal(rms_norm_backward(*given, rstd, weight, out=given[out], impl="triton"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_op(dtype: torch.dtype) -> None:
    """rms_norm itself: rows, three dimensions, a head slice as q is, and a transposed view, forward and gradient."""
    wide = draw(6, 10, 32, dtype=dtype).to(DEVICE)
    weight = draw(32, dtype=dtype, seed=1).to(DEVICE)
    for x in (wide, wide[:, 2:5], wide.transpose(0, 1), wide[::2], wide[0], wide[0, 0], wide.transpose(1, 2)[:, :, :8]):
        w = weight[: x.shape[-1]]
        assert_matches(
            lambda x, w=w: rms_norm(x, w, EPS, impl="triton"),
            lambda x, w=w: plain(x, w.to(x.dtype), EPS),
            [x],
            draw(*x.shape, dtype=dtype, seed=2).to(DEVICE),
        )


def test_extreme_values() -> None:
    """Zeros give zeros and a finite 1 / rms; fp16 values whose squares overflow fp16 are normalised."""
    weight = torch.ones(8, device=DEVICE)
    _, y, rstd = add_rms_norm(torch.zeros(2, 8, device=DEVICE), None, weight, EPS, impl="triton")
    assert torch.equal(y, torch.zeros_like(y)) and torch.isfinite(rstd).all()
    large = torch.full((1, 8), 60000.0, dtype=torch.float16, device=DEVICE)
    _, y, _ = add_rms_norm(large, None, weight.half(), EPS, impl="triton")
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.gpu
def test_auto_takes_the_kernel_and_the_sum_is_torchs() -> None:
    """On a CUDA device "auto" gives the kernel's bits, and total is x + delta as torch rounds it."""
    for dtype in DTYPES:
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
            continue
        x, delta, weight = (draw(*n, dtype=dtype, seed=n[0]).cuda() for n in [(33, 576), (34, 576), (576,)])
        delta = delta[:33]
        for given in (None, delta):
            results = [
                add_rms_norm(x, None if given is None else given.clone(), weight, EPS, impl=impl)
                for impl in ("auto", "triton")
            ]
            for one, two in zip(*results, strict=True):
                assert torch.equal(one, two)
        assert torch.equal(results[0][0], x + delta)
        assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x, weight, EPS, impl="triton"))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    """Rows of a buffer of more than 2**31 elements are found: once the offsets were counted in 32 bits."""
    rows, stride, width = 75_000, 28_704, 64
    buffer = torch.empty(rows, stride, dtype=torch.float16, device="cuda")
    x, delta, out = buffer[:, :width], buffer[:, 128 : 128 + width], buffer[:, 256 : 256 + width]
    values = draw(2 * rows, width, dtype=torch.float16).cuda()
    x.copy_(values[:rows])
    delta.copy_(values[rows:])
    weight = draw(width, dtype=torch.float16, seed=1).cuda()
    total, y, rstd = add_rms_norm(values[:rows], values[rows:].clone(), weight, EPS, impl="triton")
    got = add_rms_norm(x, delta, weight, EPS, out=out, impl="triton")
    for mine, expected in zip(got, (total, y, rstd), strict=True):
        assert torch.equal(mine, expected)
    assert torch.equal(normalise(delta, rstd, weight, out=out, impl="triton"), y)
    expected = rms_norm_backward(y, total, rstd, weight, add=values[:rows], impl="triton")
    assert torch.equal(rms_norm_backward(out, delta, rstd, weight, add=x, out=x, impl="triton"), expected)
