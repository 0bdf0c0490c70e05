"""A frozen NF4 matrix times a few rows, for decoding: every packed byte is read once, nothing is written but y.

For x (B, I), one row per answer being written, and W (O, I) in NF4, its parts one below the other::

    y = x W^T (+ bias) (+ u L^T)   (B, O)   L (O, R): the B matrices of the adapters, block-diagonal
    u = (x S^T) * mask             (B, R)   S (R, I): the A matrices times the scale; mask (B, 1): rows with the adapter

W is what the codes stand for: PyTorch rounds value times scale to x's dtype, as ``dequantize_nf4`` does, the kernel the
value alone, which is no less exact. Products are summed in fp32 with bias and adapter, and y is rounded once. The order
of the sum hangs on shape and tiling alone.

On a GPU both ops may be captured in a CUDA graph: what they read and write has a fixed address, and nothing waits for
the device. A scratch serves one call at a time; calls on one stream may share it.

The PyTorch code below is the reference and the CPU path. ``nf4_thin_cuda.py`` holds the kernel for up to 16 rows on
cards from compute capability 8.0 on, ``nf4_thin_triton.py`` the one for more rows, for other cards, and for where CUDA
C++ cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.nf4 import NESTED_BLOCK_SIZE, NF4_CODE, NF4Weight, dequantize_nf4
from deepdoctor.kernels.rows import FLOAT_DTYPES, check_contiguous, check_rows

if TYPE_CHECKING:
    from deepdoctor.kernels.nf4_thin_cuda import CudaThinLaunch
    from deepdoctor.kernels.nf4_thin_triton import ThinLaunch, ThinTiling

__all__ = [
    "FEW_ROWS",
    "SPAN",
    "THIN_RANK",
    "THIN_ROWS",
    "ThinLinear",
    "code_bits",
    "pair_bits",
    "part_table",
    "thin_lora",
]

THIN_ROWS = 32
"""Most rows of x: beyond, the weights are better written out and multiplied."""
THIN_RANK = 64
"""Most columns of u."""
FEW_ROWS = 16
"""Most rows of x that the CUDA C++ kernel takes: for more, the x that every warp reads weighs more than its weights."""
BLOCK = 64
SPAN = 256
"""Columns that the kernels take at once."""


class ThinLinear:
    """``y = x W^T (+ bias) (+ u L^T)`` for one frozen matrix, prepared once.

    parts    NF4 matrices (O_i, I) on one device, one below the other
    dtype    bf16 | fp16 | fp32: of x, y, bias, u and lora
    bias     (O,) or None
    lora     L (O, R), R <= 64, or None
    impl     "triton" needs bf16 or fp16 and parts as published checkpoints have them: double-quantised in blocks of 64,
             I a multiple of 256; "auto" takes PyTorch for anything else, and CUDA C++ before Triton
    tiling   of the Triton kernel, which is taken then

    All tensors are read at every call, at the address they have now. Raises KernelInputError on any mismatch above.
    """

    def __init__(
        self,
        parts: Sequence[NF4Weight],
        dtype: torch.dtype,
        *,
        bias: Tensor | None = None,
        lora: Tensor | None = None,
        impl: Impl = "auto",
        tiling: ThinTiling | None = None,
    ):
        if not parts or any(len(part.shape) != 2 or part.shape[1] != parts[0].shape[1] for part in parts):
            raise KernelInputError(
                f"ThinLinear: parts are {[part.shape for part in parts]}, expected one (O_i, I) or more of one I"
            )
        if dtype not in FLOAT_DTYPES:
            raise KernelInputError(f"ThinLinear: dtype is {dtype}, expected bf16, fp16 or fp32")
        self.parts, self.dtype, self.bias, self.lora = tuple(parts), dtype, bias, lora
        self.out_features, self.in_features = sum(part.shape[0] for part in parts), parts[0].shape[1]
        self.device = parts[0].packed.device
        like = torch.empty(0, dtype=dtype, device=self.device)
        for name, tensor, shape in (("bias", bias, (self.out_features,)), ("lora", lora, (self.out_features, -1))):
            if tensor is None:
                continue
            fits = tensor.dim() == len(shape) and tensor.shape[0] == shape[0] and tensor.is_contiguous()
            if not fits or tensor.dtype != dtype or tensor.device != self.device:
                raise KernelInputError(
                    f"ThinLinear: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides "
                    f"{tensor.stride()}; expected a contiguous {shape} {dtype} on {self.device}"
                )
        self.rank = 0 if lora is None else lora.shape[1]
        if self.rank > THIN_RANK:
            raise KernelInputError(f"ThinLinear: lora has {self.rank} columns, expected at most {THIN_RANK}")
        self._launch: ThinLaunch | None = None
        self._few: CudaThinLaunch | None = None
        """For a few rows, where there is one."""
        if use_triton(impl, like):
            from deepdoctor.kernels.nf4_thin_cuda import PARTS, CudaThinLaunch, can_launch
            from deepdoctor.kernels.nf4_thin_triton import ThinLaunch

            if _as_published(parts, dtype):
                self._launch = ThinLaunch(parts, dtype, bias, lora, tiling)
                if impl == "auto" and tiling is None and len(parts) <= PARTS and can_launch(self.device):
                    self._few = CudaThinLaunch(parts, dtype, bias, lora)
            elif impl == "triton":
                raise KernelInputError(
                    f"ThinLinear: impl is 'triton', but parts {[part.shape for part in parts]} in {dtype} are not "
                    "double-quantised in blocks of 64 with I a multiple of 256, or not 16 bits wide",
                    "use impl='auto'",
                )

    @property
    def fused(self) -> bool:
        """Whether a kernel runs it, rather than PyTorch."""
        return self._launch is not None

    def scratch_elements(self, rows: int) -> int:
        """Return how many fp32 elements of scratch a call with ``rows`` rows needs; 0 in PyTorch."""
        launch = self._launch_for(rows)
        return 0 if launch is None else launch.scratch_elements(rows)

    def _launch_for(self, rows: int) -> ThinLaunch | CudaThinLaunch | None:
        """The kernel for so many rows of x."""
        return self._few if self._few is not None and rows <= FEW_ROWS else self._launch

    def __call__(self, x: Tensor, out: Tensor, u: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
        """Write y into out and return it.

        x        (B, I)  B from 1 to 32, rows contiguous
        out      (B, O)  rows contiguous
        u        (B, R)  contiguous, from ``thin_lora``; None leaves the adapter out
        scratch  fp32, contiguous, ``scratch_elements(B)`` or more, overwritten; allocated when None

        Raises KernelInputError on any mismatch above.
        """
        rows = x.shape[0]
        check_rows("ThinLinear", "x", x, (rows, self.in_features), x)
        check_rows("ThinLinear", "out", out, (rows, self.out_features), x)
        if not 1 <= rows <= THIN_ROWS or x.dtype != self.dtype or x.device != self.device:
            raise KernelInputError(
                f"ThinLinear: x is {tuple(x.shape)} {x.dtype} on {x.device}, expected 1 to {THIN_ROWS} rows of "
                f"{self.dtype} on {self.device}"
            )
        if u is not None:
            if self.lora is None:
                raise KernelInputError("ThinLinear: u is given, but it was prepared without lora")
            check_contiguous("ThinLinear", "u", u, (rows, self.rank), x.dtype, x.device)
        launch = self._launch_for(rows)
        if launch is None:
            return self._reference(x, out, u)
        elements = launch.scratch_elements(rows)
        if scratch is None:
            scratch = torch.empty(elements, dtype=torch.float32, device=x.device)
        if scratch.numel() < elements or scratch.dtype != torch.float32 or not scratch.is_contiguous():
            raise KernelInputError(
                f"ThinLinear: scratch has {scratch.numel()} {scratch.dtype}, expected {elements} or more of fp32"
            )
        launch(x, out, u, scratch)
        return out

    def _reference(self, x: Tensor, out: Tensor, u: Tensor | None) -> Tensor:
        """Products and sums in fp32, one part after the other, rounded once."""
        wide, start = x.float(), 0
        for part in self.parts:
            rows = slice(start, start + part.shape[0])
            y = wide @ dequantize_nf4(part, self.dtype).float().T
            if self.bias is not None:
                y += self.bias[rows].float()
            if u is not None and self.lora is not None:
                y += u.float() @ self.lora[rows].float().T
            out[:, rows] = y
            start += part.shape[0]
        return out


def _as_published(parts: Sequence[NF4Weight], dtype: torch.dtype) -> bool:
    """Whether the kernels can read these parts into products of dtype."""
    return dtype in (torch.bfloat16, torch.float16) and all(
        part.double_quant
        and part.block_size == BLOCK
        and part.nested_block_size == NESTED_BLOCK_SIZE
        and part.shape[1] % SPAN == 0
        and 0 < part.numel < 1 << 33
        and part.packed.is_contiguous()
        and part.packed.data_ptr() % 16 == 0
        and part.absmax.data_ptr() % 4 == 0
        for part in parts
    )


def part_table(parts: Sequence[NF4Weight], height: int) -> tuple[list[int], int]:
    """Return what a kernel reads of each part, eight numbers, and how many tiles of ``height`` rows there are in all.

    The numbers: addresses of packed bytes, absmax, nested absmax, nested offset and nested code; the part's first
    tile, its rows, its first row. They hold as long as the parts do.
    """
    table: list[int] = []
    tiles = start = 0
    for part in parts:
        held = (part.packed, part.absmax, part.nested_absmax, part.nested_offset, part.nested_code)
        for tensor in held:
            assert tensor is not None and tensor.is_contiguous()
            table.append(tensor.data_ptr())
        table += [tiles, part.shape[0], start]
        tiles += -(-part.shape[0] // height)
        start += part.shape[0]
    return table, tiles


def code_bits(dtype: torch.dtype) -> list[int]:
    """The bits of the 16 values, rounded to a 16-bit dtype."""
    return [bits & 0xFFFF for bits in NF4_CODE.to(dtype).view(torch.int16).tolist()]


def pair_bits(dtype: torch.dtype) -> Tensor:
    """Two values for each byte, (256,) int32: that of the high half of the byte in the low 16 bits."""
    bits = code_bits(dtype)
    pairs = torch.tensor([bits[byte & 15] << 16 | bits[byte >> 4] for byte in range(256)], dtype=torch.int64)
    return torch.where(pairs >= 1 << 31, pairs - (1 << 32), pairs).to(torch.int32)


@torch.no_grad()
def thin_lora(x: Tensor, a: Tensor, out: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """Write u = (x a^T) * mask into out and return it: products summed in fp32, one rounding.

    x        (B, I)  bf16 | fp16 | fp32, rows contiguous
    a        (R, I)  contiguous, R from 1 to 64, dtype of x; the adapters' A matrices, the scale folded in
    mask     (B, 1)  contiguous, dtype of x: 0 switches a row's adapter off, 1 on; None is 1 everywhere
    out      (B, R)  contiguous, dtype of x

    Raises KernelInputError on any mismatch above.
    """
    check_rows("thin_lora", "x", x, x.shape, x)
    rows, rank = x.shape[0], a.shape[0]
    check_contiguous("thin_lora", "a", a, (rank, x.shape[1]), x.dtype, x.device)
    check_contiguous("thin_lora", "out", out, (rows, rank), x.dtype, x.device)
    if mask is not None:
        check_contiguous("thin_lora", "mask", mask, (rows, 1), x.dtype, x.device)
    if not 1 <= rank <= THIN_RANK:
        raise KernelInputError(f"thin_lora: a has {rank} rows, expected 1 to {THIN_RANK}")
    if use_triton(impl, x):
        from deepdoctor.kernels import nf4_thin_triton

        nf4_thin_triton.lora(x, a, mask, out)
        return out
    u = x.float() @ a.float().T
    out.copy_(u if mask is None else u.mul_(mask.float()))
    return out
