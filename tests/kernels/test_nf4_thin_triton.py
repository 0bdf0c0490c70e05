"""The thin NF4 product in Triton: the checks of its reference, and what only a kernel can get wrong."""

import pytest
import torch
from test_nf4_thin import CASES, LAYER_8B, Case, check, draw, plain, truth

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.nf4 import dequantize_nf4, quantize_nf4
from deepdoctor.kernels.nf4_thin import ThinLinear, thin_lora
from helpers_numeric import assert_no_less_accurate
from helpers_triton import DEVICE, needs_triton

pytestmark = needs_triton

# The interpreter's products know no bf16.
DTYPES = (torch.bfloat16, torch.float16) if DEVICE.type == "cuda" else (torch.float16,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_the_definition(case: Case, dtype: torch.dtype) -> None:
    """Every case, with the columns in one stretch and in several, the last of them shorter."""
    from deepdoctor.kernels.nf4_thin_triton import ThinTiling

    for tiling in (None, ThinTiling(64, ahead=1, registers=128, splits=4), ThinTiling(splits=2)):
        check(case, dtype, DEVICE, impl="triton", tiling=tiling)


def test_more_stretches_than_blocks() -> None:
    """Three spans are not cut into sixteen stretches: none is empty, and scratch is for those there are."""
    from deepdoctor.kernels.nf4_thin_triton import ThinTiling

    problem = draw(CASES[1], torch.float16, DEVICE)
    for splits, made in ((16, 3), (2, 2), (1, 1)):
        linear = ThinLinear(problem.parts, torch.float16, impl="triton", tiling=ThinTiling(splits=splits))
        assert linear.scratch_elements(1) == made * linear.out_features


def test_every_element_is_in_its_place() -> None:
    """One column of x at a time gives that column of the weights, scale by scale."""
    parts = [quantize_nf4(torch.randn(n, 512, generator=torch.Generator().manual_seed(n)).to(DEVICE)) for n in (40, 24)]
    dense = torch.cat([dequantize_nf4(part, torch.float32, impl="torch") for part in parts])
    linear = ThinLinear(parts, torch.float16, impl="triton")
    for first in range(0, 512, 32):
        x = torch.eye(512, dtype=torch.float16, device=DEVICE)[first : first + 32]
        y = linear(x, torch.empty(32, 64, dtype=torch.float16, device=DEVICE))
        torch.testing.assert_close(y.float(), dense[:, first : first + 32].T, rtol=2**-10, atol=0)


def test_what_the_kernel_does_not_take() -> None:
    """fp32, other blocks, single scales and widths that no span divides go to PyTorch, or are refused when asked."""
    w = torch.randn(64, 192, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    fine = w.view(48, 256)
    weights = [quantize_nf4(w), quantize_nf4(fine, 128), quantize_nf4(fine, double_quant=False)]
    for part, dtype in ((weights[0], torch.float16), (weights[1], torch.float16), (weights[2], torch.float16)):
        with pytest.raises(KernelInputError, match="double-quantised"):
            ThinLinear([part], dtype, impl="triton")
    with pytest.raises(KernelInputError, match="double-quantised"):
        ThinLinear([quantize_nf4(fine)], torch.float32, impl="triton")
    assert ThinLinear([weights[1]], torch.float16).scratch_elements(4) == 0


def test_scratch_too_small_is_refused() -> None:
    """A buffer for fewer rows, or of another dtype, is named."""
    from deepdoctor.kernels.nf4_thin_triton import ThinTiling

    problem = draw(CASES[1], torch.float16, DEVICE)
    linear = ThinLinear(problem.parts, torch.float16, impl="triton", tiling=ThinTiling(splits=3))
    assert linear.scratch_elements(3) == 3 * 3 * 97
    out = torch.empty(3, 97, dtype=torch.float16, device=DEVICE)
    enough = torch.empty(2 * 3 * 3 * 97, device=DEVICE)
    for scratch in (enough[: 3 * 3 * 97 - 1], enough.half(), enough[::2]):
        with pytest.raises(KernelInputError, match="scratch"):
            linear(problem.x, out, None, scratch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (1, 3, 17, 32))
def test_shapes_of_an_8b_model(rows: int, dtype: torch.dtype) -> None:
    """The four matrices of a layer; called again, the same bits."""
    for sizes, inn, rank in LAYER_8B:
        problem = draw(Case(sizes, inn, rows, rank, bias=True), dtype, "cuda")
        linear = ThinLinear(problem.parts, dtype, bias=problem.bias, lora=problem.lora)
        u = thin_lora(problem.x, problem.a, torch.empty(rows, rank, dtype=dtype, device="cuda"), problem.mask)
        y = linear(problem.x, torch.empty(rows, sum(sizes), dtype=dtype, device="cuda"), u)
        assert_no_less_accurate(y, plain(problem, dtype, u), truth(problem, u))
        assert torch.equal(linear(problem.x, torch.empty_like(y), u), y)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """A captured step gives, for new rows, mask and adapter, the bits of a call."""
    case = Case((256, 64, 64), 512, 5, 24, bias=True)
    problem = draw(case, torch.bfloat16, "cuda")
    linear = ThinLinear(problem.parts, torch.bfloat16, bias=problem.bias, lora=problem.lora)
    x, a, mask = problem.x.contiguous(), problem.a, problem.mask
    out = torch.empty(5, 384, dtype=torch.bfloat16, device="cuda")
    u = torch.empty(5, 24, dtype=torch.bfloat16, device="cuda")
    scratch = torch.empty(linear.scratch_elements(5), device="cuda")

    def step() -> None:
        linear(x, out, thin_lora(x, a, u, mask), scratch)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.normal_()
    problem.lora.mul_(-0.5)
    mask.copy_(1 - mask)
    graph.replay()
    replayed = out.clone()
    step()
    assert torch.equal(out, replayed)
