"""The thin product in CUDA C++ (``nf4_thin.cu``), for up to 16 rows: 1.5 times as fast as Triton's for one.

Lookups. Turning codes into values by permutes takes 2.9 instructions a weight that run at half rate: for gate and up
of an 8B model, 28672 x 4096, 23 us of an H100, when their bytes take 20. Here a byte, two weights, is looked up in
shared memory: a shift, a logic instruction and a load for two weights. 32 lanes that read 32 entries would meet in the
same banks, so each lane has a copy in a bank of its own, 32 KiB that the warps of a block share.

Pages. A tile is 16 rows of W, which lie side by side in memory, and the warps of a block read neighbouring parts of it
at once. Copies are asynchronous, into a ring of each warp: the compiler cannot move them to where they are used, as it
does with loads. The first are under way before the kernel before has ended.

Ends. Adding up over the warps, the adapter, bias and writing wait for memory several times in a row; one warp more
does that, while the others are at the next tile. Whole tiles are dealt out to as many blocks as fit the device; where
they are too few, blocks share a tile, and the last to arrive adds their sums up in order.

Values are rounded as in ``nf4_thin_triton.py``: codes to x's dtype, the scale in fp32 on the sum over a block. What was
tried and measured on the way: docs/log.md.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.cuda_driver import CudaKernel, compile_cubin, why_not
from deepdoctor.kernels.nf4 import NF4Weight
from deepdoctor.kernels.nf4_thin import SPAN, pair_bits, part_table

__all__ = ["PARTS", "TILE", "WARPS", "CudaThinLaunch", "can_launch", "share_of", "shared_bytes", "thin_defines"]

log = logging.getLogger(__name__)

TILE = 16
FRAGMENT = 8 * TILE
"""Sums of a tile for eight rows of x."""
WARPS = {1: 8, 2: 7}
"""Of a block, that multiply, by eights of rows of x: with one more that adds up, as many as registers allow."""
BLOCKS, STAGES = 2, 2
"""Blocks of a multiprocessor; spans that a warp has under way."""
PARTS = 4
"""Most parts of a matrix."""
PAIRS_BYTES = 32 << 10
STAGE_BYTES = TILE * (SPAN // 2 + 8)


@functools.cache
def can_launch(device: torch.device) -> bool:
    """Whether NVRTC, the driver and the card (compute capability 8.0 or later) are there; tried once."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if missing := why_not():
        log.info("thin products in Triton, since CUDA C++ cannot be compiled: %s", missing)
        return False
    try:
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # the driver needs the context that this makes
            _kernel(device, torch.bfloat16, 1)
    except KernelInputError as error:
        log.info("thin products in Triton: %s", error)
        return False
    return True


def thin_defines(dtype: torch.dtype, eights: int, dependent: bool) -> dict[str, object]:
    """The macros of ``nf4_thin.cu``. eights: of rows of x, 1 or 2."""
    return {
        "HALF": int(dtype == torch.float16), "TILES": eights, "WARPS": WARPS[eights], "BLOCKS": BLOCKS,
        "STAGES": STAGES, "DEPENDENT": int(dependent),
    }  # fmt: skip


def shared_bytes(eights: int) -> int:
    """Shared memory of a block, its first byte at 0 or 1024: rings and pairs, code tables, sums of the warps twice."""
    warps, ring = WARPS[eights], STAGES * STAGE_BYTES
    gap = PAIRS_BYTES - 1024
    rings = max(warps * ring, gap + max(0, warps - gap // ring) * ring)
    return rings + PAIRS_BYTES + PARTS * 1024 + 2 * warps * eights * FRAGMENT * 4


def share_of(tiles: int, spans: int, warps: int, blocks: int) -> tuple[int, int, int]:
    """Return the rounds of a block, the blocks that takes, and the most of them that meet in a tile.

    tiles, spans: of the matrix, and of a tile. blocks: that run at once.
    """
    rounds = -(-spans // warps)
    per_block = -(-tiles * rounds // blocks)
    whole = -(-per_block // rounds) * rounds
    if whole <= 1.5 * per_block:
        per_block = whole  # sums of parts cost more than some unevenness
    return per_block, -(-tiles * rounds // per_block), (rounds - 1) // per_block + 2


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype, eights: int) -> CudaKernel:
    """The kernel for so many times eight rows of x, compiled when first asked for."""
    major, minor = torch.cuda.get_device_capability(device)
    source = files("deepdoctor.kernels").joinpath("nf4_thin.cu").read_text(encoding="utf-8")
    defines = thin_defines(dtype, eights, (major, minor) >= (9, 0))
    cubin = compile_cubin(source, "nf4_thin.cu", f"sm_{major}{minor}", defines)
    return CudaKernel(cubin, "nf4_thin", shared_bytes(eights))


@functools.cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    return pair_bits(dtype).to(device)


class CudaThinLaunch:
    """The kernel for one matrix; see ``nf4_thin.ThinLinear``.

    What is read has a fixed address, and ``part_table`` is an argument.
    """

    def __init__(self, parts: Sequence[NF4Weight], dtype: torch.dtype, bias: Tensor | None, lora: Tensor | None):
        device = parts[0].packed.device
        self._dtype, self._device, self._bias, self._lora = dtype, device, bias, lora
        self._parts = tuple(parts)
        table, tiles = part_table(parts, TILE)
        self._table = (ctypes.c_int64 * (8 * PARTS))(*table)
        spans = parts[0].shape[1] // SPAN
        self._tiles = tiles
        self._shares = {
            eights: share_of(tiles, spans, warps, _blocks_at_once(device, eights)) for eights, warps in WARPS.items()
        }
        self._fixed = (len(parts), tiles, spans)
        self._arrived = torch.zeros(tiles, dtype=torch.int32, device=device)
        self._dependent = torch.cuda.get_device_capability(device) >= (9, 0)

    def scratch_elements(self, rows: int) -> int:
        """Return how many fp32 elements the partial sums take."""
        eights = _eights_of(rows)
        return self._tiles * self._shares[eights][2] * FRAGMENT * eights

    def __call__(self, x: Tensor, out: Tensor, u: Tensor | None, scratch: Tensor) -> None:
        """Write y into out; at most FEW_ROWS rows."""
        rows, eights = x.shape[0], _eights_of(x.shape[0])
        if x.data_ptr() % 16 or x.stride(0) % 8:
            x = x.clone(memory_format=torch.contiguous_format)
        rank = 0 if u is None or self._lora is None else self._lora.shape[1]
        per_block, blocks, slots = self._shares[eights]
        tensors = (x, out, scratch, self._arrived, _pairs(self._device, self._dtype), self._bias, u, self._lora)
        numbers = (x.stride(0), out.stride(0), rows, *self._fixed, per_block, slots, rank)
        arguments: list[Any] = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
        arguments += [self._table, *(ctypes.c_int(number) for number in numbers)]
        with torch.cuda.device_of(x):
            kernel = _kernel(self._device, self._dtype, eights)
            kernel(blocks, (WARPS[eights] + 1) * 32, self._dependent, arguments)


def _blocks_at_once(device: torch.device, eights: int) -> int:
    """How many blocks the device holds: BLOCKS for each multiprocessor, fewer where shared memory is short."""
    card = torch.cuda.get_device_properties(device)
    shared = getattr(card, "shared_memory_per_multiprocessor", 228 << 10)
    return card.multi_processor_count * max(1, min(BLOCKS, shared // (shared_bytes(eights) + 1024)))


def _eights_of(rows: int) -> int:
    return 1 if rows <= 8 else 2
