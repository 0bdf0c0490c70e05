"""The bordered matrix: the reference against its definition, the kernel against the reference bit for bit."""

import time
from dataclasses import dataclass, replace

import pytest
import torch

from deepdoctor.kernels.bordered_nf4 import Border, bordered_launch, write_base, write_border
from deepdoctor.kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from helpers_triton import DEVICE, INTERPRETED, needs_triton

gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Block:
    """One B."""

    start: int
    rank_at: int
    weight: torch.Tensor


@dataclass(frozen=True)
class Case:
    """sizes: rows of the parts; adapted: which of them have an adapter of rank r; rank: padded rows."""

    sizes: tuple[int, ...]
    inn: int
    r: int
    adapted: tuple[int, ...]
    rank: int


# Tiles of 1024 to 8192, parts that share a nested block's number, rows cut by tiles, padding, no adapter at all.
CASES = (
    Case((64, 16, 16), 64, 4, (0, 1, 2), 16),
    Case((64, 32, 32), 64, 3, (0, 2), 8),
    Case((192, 64), 192, 2, (1,), 8),
    Case((48,), 1408, 8, (0,), 8),
    Case((16, 16), 4160, 5, (0, 1), 16),
    Case((256, 128, 128), 128, 16, (0, 1, 2), 48),
    Case((64, 32), 64, 4, (), 0),
    Case((64,), 64, 4, (), 8),
)


def draw(case: Case, device: torch.device = DEVICE, seed: int = 0) -> tuple[list[NF4Weight], Border]:
    """Parts, whose scales all differ, and masters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    parts = []
    for number, size in enumerate(case.sizes):
        rows = normal(size, case.inn) * torch.rand(size, 1, generator=generator) * (number + 1)
        parts.append(quantize_nf4(rows.to(device), impl="torch"))
    starts = [sum(case.sizes[:n]) for n in range(len(case.sizes))]
    a = normal(case.r * len(case.adapted), case.inn).to(device) if case.adapted else None
    blocks = [
        Block(starts[part], n * case.r, normal(case.sizes[part], case.r).to(device))
        for n, part in enumerate(case.adapted)
    ]
    return parts, Border(sum(case.sizes), case.inn, case.rank, 0.7, a, blocks)


def empty(border: Border, dtype: torch.dtype, device: torch.device = DEVICE) -> torch.Tensor:
    """A matrix of nan, so that what is left out shows."""
    shape = (border.out + border.rank, border.inn + border.rank)
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def reference(parts: list[NF4Weight], border: Border, dtype: torch.dtype) -> torch.Tensor:
    """By the reference; Triton's interpreter cuts fp32 to bf16 where a GPU rounds, so there this does too."""
    cut = INTERPRETED and DEVICE.type == "cpu" and dtype == torch.bfloat16
    matrix = empty(border, torch.float32 if cut else dtype, parts[0].packed.device)
    for part, start in zip(parts, (0, *torch.tensor([p.shape[0] for p in parts]).cumsum(0).tolist()), strict=False):
        rows = matrix[start : start + part.shape[0], : border.inn]
        dequantize_nf4(part, matrix.dtype, out=rows, impl="torch")
    write_border(matrix, border)
    return (matrix.view(torch.int32) >> 16).to(torch.int16).view(dtype) if cut else matrix


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit."""
    kind = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(kind), other.view(kind))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case):
    """[[W, B], [sA, 0]], with zeros wherever no adapter is."""
    parts, border = draw(case, torch.device("cpu"))
    matrix = empty(border, torch.float32, torch.device("cpu"))
    write_base(matrix, [*parts[:-1], dequantize_nf4(parts[-1], torch.float32)])
    write_border(matrix, border)
    expected = torch.zeros_like(matrix)
    expected[: border.out, : border.inn] = torch.cat([dequantize_nf4(part, torch.float32) for part in parts])
    if border.a is not None:
        expected[border.out : border.out + len(border.a), : border.inn] = border.a * border.scale
        b = torch.block_diag(*(block.weight for block in border.blocks))
        rows = [row for block in border.blocks for row in range(block.start, block.start + len(block.weight))]
        expected[rows, border.inn : border.inn + b.shape[1]] = b
    assert torch.equal(matrix, expected)


def test_cpu_tensors_take_the_reference():
    """Without a GPU there is no launch."""
    parts, border = draw(CASES[0], torch.device("cpu"))
    assert bordered_launch(parts, border, torch.float32) is None
    assert bordered_launch(None, replace(border, a=None, blocks=[]), torch.float32) is None


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_launch_equals_the_reference(case, dtype):
    """One launch writes the reference's bits; after the masters changed, a second one writes the border alone."""
    parts, border = draw(case)
    launch = bordered_launch(parts, border, dtype, "triton")
    assert launch is not None and launch.base
    matrix = empty(border, dtype)
    launch.write(matrix)
    assert same(matrix, reference(parts, border, dtype))
    if border.a is None:
        return
    for tensor in (border.a, *(block.weight for block in border.blocks)):
        tensor.mul_(-1.3)
    launch.write_border(matrix)
    assert same(matrix, reference(parts, border, dtype))


@needs_triton
@pytest.mark.parametrize("scales", ("word", "block", "products"))
def test_every_way_to_scale(scales):
    """How a tile comes by its scales changes no bit."""
    from deepdoctor.kernels.bordered_nf4_triton import BorderedLaunch

    for case in (CASES[1], CASES[4]):
        parts, border = draw(case, seed=1)
        for dtype in DTYPES:
            matrix = empty(border, dtype)
            BorderedLaunch(parts, border, DEVICE, scales).write(matrix)
            assert same(matrix, reference(parts, border, dtype))


@needs_triton
def test_what_the_kernel_leaves_to_the_reference():
    """Parts that are dense, in other blocks, not double-quantised or not whole tiles leave the border to the kernel."""
    case = Case((64, 32), 64, 4, (0, 1), 8)
    parts, border = draw(case)
    dense = dequantize_nf4(parts[1], torch.float16, impl="torch")
    others = (
        [parts[0], quantize_nf4(dense, 128)],
        [parts[0], quantize_nf4(dense, double_quant=False)],
        [parts[0], dense],
        None,
    )
    for mixed in others:
        launch = bordered_launch(mixed, border, torch.float16, "triton")
        assert launch is not None and not launch.base
        matrix = empty(border, torch.float16)
        write_base(matrix, [dense] if mixed is None else mixed)
        launch.write_border(matrix)
        expected = empty(border, torch.float16)
        write_base(expected, [dense] if mixed is None else mixed)
        write_border(expected, border)
        assert same(matrix, expected)
    uneven, narrow = draw(Case((10,), 72, 4, (0,), 8))
    launch = bordered_launch(uneven, narrow, torch.float16, "triton")
    assert launch is not None and not launch.base


@needs_triton
def test_other_masters_take_the_reference():
    """Ranks that differ, or masters that are not contiguous fp32, are no case for the kernel."""
    parts, border = draw(CASES[0])
    first, *rest = border.blocks
    for weight in (first.weight[:, :2].contiguous(), first.weight.double(), first.weight.repeat(1, 2)[:, ::2]):
        changed = replace(border, blocks=[Block(first.start, 0, weight), *rest])
        assert bordered_launch(parts, changed, torch.float32, "triton") is None


# rank 16 on every projection of an 8B Llama.
LAYER = {
    "qkv": Case((4096, 1024, 1024), 4096, 16, (0, 1, 2), 48),
    "o": Case((4096,), 4096, 16, (0,), 16),
    "gate_up": Case((14336, 14336), 4096, 16, (0, 1), 32),
    "down": Case((4096,), 14336, 16, (0,), 16),
}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", LAYER)
def test_layer_shapes_equal_the_reference(name):
    """The four matrices of a layer of 8B size, in bf16."""
    parts, border = draw(LAYER[name])
    launch = bordered_launch(parts, border, torch.bfloat16)
    assert launch is not None and launch.base
    matrix = empty(border, torch.bfloat16)
    launch.write(matrix)
    assert same(matrix, reference(parts, border, torch.bfloat16))


@pytest.mark.gpu
@gpu
def test_cost_of_a_write(capsys):
    """Prints microseconds of the host and of the kernel for each matrix; a call costs the host less than 60."""
    for name, case in LAYER.items():
        parts, border = draw(case)
        launch = bordered_launch(parts, border, torch.bfloat16)
        assert launch is not None
        matrix = empty(border, torch.bfloat16)
        for call in (launch.write, launch.write_border):
            call(matrix)
            torch.cuda.synchronize()
            host = []
            for _ in range(20):
                started = time.perf_counter()
                for _ in range(10):
                    call(matrix)
                host.append((time.perf_counter() - started) / 10)
                torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(20):
                    call(matrix)
            graph.replay()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            kernel = begin.elapsed_time(end) / 20 * 1e3
            rate = (matrix.nbytes + sum(part.nbytes for part in parts)) / kernel / 1e6
            with capsys.disabled():
                what = f"{kernel:6.1f} us, {rate:.2f} TB/s" if call == launch.write else f"{kernel:6.1f} us"
                print(f"\n{name:8} {call.__name__:12} host {min(host) * 1e6:5.1f} us, kernel {what}", end="")
            assert min(host) < 60e-6
