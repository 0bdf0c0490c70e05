"""The thin product in CUDA C++: its source run on the CPU, thread by thread, and on a GPU where there is one."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_nf4_thin import CASES, LAYER_8B, Case, Problem, check, draw, plain, truth

from deepdoctor.kernels import nf4_thin_cuda
from deepdoctor.kernels.nf4 import quantize_nf4
from deepdoctor.kernels.nf4_thin import FEW_ROWS, SPAN, ThinLinear, pair_bits, part_table, thin_lora
from deepdoctor.kernels.nf4_thin_cuda import (
    FRAGMENT,
    PARTS,
    TILE,
    WARPS,
    share_of,
    shared_bytes,
    thin_defines,
)
from helpers_numeric import assert_no_less_accurate

FEW = [case for case in (*CASES, Case((40,), 1536, 11, 7, True)) if case.rows <= FEW_ROWS]

RUN = """
#include "emulated_cuda.h"
#include "nf4_thin.cu"
extern "C" void run(int blocks, void** a, const Parts* parts, const int* n) {
  launch(blocks, (WARPS + 1) * 32, nf4_thin, (const u16*)a[0], (u16*)a[1], (float*)a[2], (int*)a[3], (const u32*)a[4],
         (const u16*)a[5], (const u16*)a[6], (const u16*)a[7], *parts, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7],
         n[8]);
}
"""


@pytest.fixture(scope="module", params=sorted(WARPS))
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, ctypes.CDLL]:
    """(eights, library): the kernel for 8 or 16 rows of x, built for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "run.cpp").write_text(RUN, encoding="utf-8")
    defines = [f"-D{k}={v}" for k, v in thin_defines(torch.bfloat16, request.param, False).items()]
    found = [f"-I{Path(__file__).parent}", f"-I{Path(nf4_thin_cuda.__file__).parent}"]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w"]
    subprocess.run([compiler, *flags, *found, *defines, "-o", folder / "run.so", folder / "run.cpp"], check=True)
    return request.param, ctypes.CDLL(str(folder / "run.so"))


def run(
    built: tuple[int, ctypes.CDLL], problem: Problem, u: torch.Tensor | None, blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the counters of tiles, as the launch does it, with so many blocks at once."""
    eights, library = built
    x = problem.x.contiguous()
    rows, columns = x.shape
    table, tiles = part_table(problem.parts, TILE)
    out = sum(part.shape[0] for part in problem.parts)
    spans = columns // SPAN
    per_block, count, slots = share_of(tiles, spans, WARPS[eights], blocks)
    y = torch.full((rows, out), torch.nan, dtype=torch.bfloat16)
    scratch = torch.full((tiles * slots * FRAGMENT * eights,), torch.nan)
    arrived, pairs = torch.zeros(tiles, dtype=torch.int32), pair_bits(torch.bfloat16)
    lora = None if u is None else problem.lora
    tensors = (x, y, scratch, arrived, pairs, problem.bias, u, lora)
    addresses = (ctypes.c_void_p * 8)(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
    rank = 0 if lora is None else lora.shape[1]
    numbers = (columns, out, rows, len(problem.parts), tiles, spans, per_block, slots, rank)
    library.run(count, addresses, (ctypes.c_int64 * (8 * PARTS))(*table), (ctypes.c_int * 9)(*numbers))
    return y, arrived


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("blocks", (2, 7, 1000))
def test_source_is_the_definition(emulated: tuple[int, ctypes.CDLL], case: Case, blocks: int) -> None:
    """Many tiles to a block and many blocks to a tile, with the adapter and without; all counters end at zero."""
    if case.rows > 8 * emulated[0]:
        pytest.skip("more rows than this kernel takes")
    problem = draw(case, torch.bfloat16)
    us = [None] if problem.a is None else [None, (problem.x @ problem.a.T) * problem.mask]
    for u in us:
        y, arrived = run(emulated, problem, u, blocks)
        assert_no_less_accurate(y, plain(problem, torch.bfloat16, u), truth(problem, u))
        assert not arrived.any()


@pytest.mark.parametrize("spans", (1, 3, 6, 16, 56))
@pytest.mark.parametrize("tiles", (1, 5, 256, 384, 1792))
def test_every_round_has_one_block(tiles: int, spans: int) -> None:
    """Blocks take all rounds, none is empty, and no tile meets more blocks than there are slots."""
    for warps in WARPS.values():
        for room in (1, 8, 264):
            per_block, blocks, slots = share_of(tiles, spans, warps, room)
            rounds = -(-spans // warps)
            assert (blocks - 1) * per_block < tiles * rounds <= blocks * per_block
            for tile in range(tiles):
                first, last = tile * rounds // per_block, (tile * rounds + rounds - 1) // per_block
                assert last - first < slots
            if tiles >= room:
                assert blocks <= room


def test_shared_memory_fits() -> None:
    """Two blocks on an H100 (228 KiB), on an A100 (164) for eight rows; one where a block may have 99 (8.6, 8.9)."""
    for eights in WARPS:
        needed = shared_bytes(eights)
        assert 2 * (needed + 1024) <= 228 << 10 and (eights == 2 or 2 * (needed + 1024) <= 164 << 10)
        assert needed <= 99 << 10


def test_pairs_are_two_values() -> None:
    """The high half of a byte is the first element, in the low 16 bits."""
    from deepdoctor.kernels.nf4 import NF4_CODE

    pairs = pair_bits(torch.float16).view(torch.float16).view(256, 2)
    codes = NF4_CODE.half()
    assert torch.equal(pairs[0x3C], codes[[0x3, 0xC]]) and torch.equal(pairs[0xF0], codes[[0xF, 0x0]])


def needs_cuda_kernel() -> None:
    """Skip, with the reason, where the kernel cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not nf4_thin_cuda.can_launch(torch.zeros(1, device="cuda").device):
        pytest.skip("CUDA C++ cannot be compiled here, or the card is older than compute capability 8.0")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_kernel_is_the_definition(case: Case, dtype: torch.dtype) -> None:
    """Every case, rows that are not aligned included."""
    needs_cuda_kernel()
    check(case, dtype, "cuda", impl="auto")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("rows", (1, 3, 8, 9, 16))
def test_shapes_of_an_8b_model(rows: int, dtype: torch.dtype) -> None:
    """The four matrices of a layer are no less accurate than Triton's; called again, the same bits."""
    needs_cuda_kernel()
    for sizes, inn, rank in LAYER_8B:
        problem = draw(Case(sizes, inn, rows, rank, bias=True), dtype, "cuda")
        linear = ThinLinear(problem.parts, dtype, bias=problem.bias, lora=problem.lora)
        other = ThinLinear(problem.parts, dtype, bias=problem.bias, lora=problem.lora, impl="triton")
        assert linear.scratch_elements(rows) != other.scratch_elements(rows)
        u = thin_lora(problem.x, problem.a, torch.empty(rows, rank, dtype=dtype, device="cuda"), problem.mask)
        empty = torch.empty(2, rows, sum(sizes), dtype=dtype, device="cuda")
        y, theirs = linear(problem.x, empty[0], u), other(problem.x, empty[1], u)
        assert_no_less_accurate(y, theirs, truth(problem, u))
        for _ in range(5):
            assert torch.equal(linear(problem.x, torch.empty_like(y), u), y)


@pytest.mark.gpu
def test_more_rows_are_tritons() -> None:
    """Up to 16 rows take this kernel, 17 the other: the same numbers but for rounding."""
    needs_cuda_kernel()
    parts = [quantize_nf4(torch.randn(64, 512, device="cuda").bfloat16())]
    linear, x = ThinLinear(parts, torch.bfloat16), torch.randn(17, 512, device="cuda").bfloat16()
    many = linear(x, torch.empty(17, 64, dtype=torch.bfloat16, device="cuda"))
    few = linear(x[:16], torch.empty(16, 64, dtype=torch.bfloat16, device="cuda"))
    torch.testing.assert_close(many[:16], few, rtol=2**-7, atol=2**-7)
