"""Products of 8-bit floats with one scale per row: ``y = (x8 s) (w8 t)^T``.

e4m3 has three bits of mantissa and ends at 448. A row x is stored as x8 = e4m3(x / s) with s = max|x| / 448 in fp32, so
that each row uses the whole range whatever its size. Both operands have such rows, and since s and t are constant along
the sum, the hardware multiplies 8-bit numbers and the scales are applied to the sums::

    y[i, j] = s[i] t[j] sum_k x8[i, k] w8[j, k]

``quantize_rows`` finds the scale of a row, and ``quantize_rows_lora`` computes the adapters' columns of the row in the
same pass. ``convert_rows`` stores values under a scale that is already there and saturates; ``write_fp8_borders`` does
so for the adapters beside a matrix. ``fp8_matmul`` is ``torch._scaled_mm`` on a GPU, with sums in the tensor cores' own
precision (about 14 bits on Hopper), and on a CPU the same product in fp32. Format: Micikevicius et al. 2022 (arXiv
2209.05433).

Letters: T rows of x, K columns of both, O rows of the matrix, R columns that adapters add.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.bordered_nf4 import Border
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.rows import FLOAT_DTYPES

__all__ = [
    "E4M3",
    "WIDTH_STEP",
    "convert_rows",
    "fp8_matmul",
    "no_fp8_because",
    "quantize_rows",
    "quantize_rows_lora",
    "write_fp8_borders",
]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_ROW = 1e-30
"""Rows whose largest value is less get the scale of this: zeros stay zeros."""
WIDTH_STEP = 16
"""K and O are multiples of this."""
CAPABILITY = (8, 9)
"""First compute capability with fp8 arithmetic: Ada (8.9), Hopper (9.0)."""
WIDEST_THIN = 32
"""Most columns R that the kernel computes along with a row. With 48 a product of its own is as fast on an H100 at K of
4,096, and faster at 6,144 (77 against 63 us of 5,248 rows)."""
PACKED_ROWS = 512
"""Rows at once where the product can only write rows without gaps: 28 MiB of 28,672 columns."""


def quantize_rows(x: Tensor, out: Tensor, scale: Tensor, *, impl: Impl = "auto") -> None:
    """Store each row of x in e4m3 under its own scale; fp32 inside, rounded to nearest even.

    x      (T, K)          bf16 | fp16 | fp32, rows contiguous, any row stride
    out    (T, K)          e4m3, rows contiguous, any row stride
    scale  (T,) or (T, 1)  fp32, contiguous: gets max|row| / 448

    A nan or inf in a row makes that row's product not finite. Raises KernelInputError on any mismatch above.
    """
    _check_rows("quantize_rows", "x", x, x.shape, FLOAT_DTYPES)
    _check_rows("quantize_rows", "out", out, x.shape, (E4M3,))
    _check_scale("quantize_rows", "scale", scale, x.shape[0])
    if _use_triton(impl, x):
        from deepdoctor.kernels import fp8_triton

        fp8_triton.quantize(x, out, scale)
        return
    wide = x.float()
    found = wide.abs().amax(1, keepdim=True).clamp_(min=SMALLEST_ROW).mul_(1 / LARGEST)
    scale.view(-1, 1).copy_(found)
    out.copy_(wide.mul(found.reciprocal()).clamp_(-LARGEST, LARGEST))


def quantize_rows_lora(x: Tensor, a: Tensor, out: Tensor, scale: Tensor, *, impl: Impl = "auto") -> None:
    """Fill u in the last R columns of x = [w, u], then quantise all of x: ``u = w a``, and ``quantize_rows``.

    x      (T, K + R)      bf16 | fp16 | fp32, rows contiguous, any row stride; u: summed in fp32, rounded once
    a      (K, R)          as x, any strides
    out    (T, K + R)      e4m3, rows contiguous, any row stride
    scale  (T,) or (T, 1)  fp32, contiguous: gets max|row| / 448, u included

    Two passes for fp32, and for R over 32. Raises KernelInputError on any mismatch above.
    """
    op = "quantize_rows_lora"
    if a.dim() != 2 or a.dtype != x.dtype or x.dim() != 2 or a.shape[0] + a.shape[1] != x.shape[1]:
        raise KernelInputError(
            f"{op}: x is {tuple(x.shape)} {x.dtype}, a {tuple(a.shape)} {a.dtype}, expected (T, K + R) and (K, R) alike"
        )
    width, rank = a.shape
    if 0 < rank <= WIDEST_THIN and x.dtype != torch.float32 and _use_triton(impl, x):
        from deepdoctor.kernels import fp8_triton

        _check_rows(op, "x", x, x.shape, FLOAT_DTYPES)
        _check_rows(op, "out", out, x.shape, (E4M3,))
        _check_scale(op, "scale", scale, x.shape[0])
        fp8_triton.quantize_lora(x, a, out, scale)
        return
    torch.mm(x[:, :width], a, out=x[:, width:])
    quantize_rows(x, out, scale, impl=impl)


def convert_rows(x: Tensor, scale: Tensor, out: Tensor, *, factor: float = 1.0, impl: Impl = "auto") -> None:
    """Store factor * x in e4m3 under scales that are given; what is out of range becomes +-448.

    x      (T, K)          bf16 | fp16 | fp32, any strides
    scale  (T,) or (T, 1)  fp32, contiguous
    out    (T, K)          e4m3, rows contiguous, any row stride

    Raises KernelInputError on any mismatch above.
    """
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise KernelInputError(f"convert_rows: x is {tuple(x.shape)} {x.dtype}, expected (T, K) bf16, fp16 or fp32")
    _check_rows("convert_rows", "out", out, x.shape, (E4M3,))
    _check_scale("convert_rows", "scale", scale, x.shape[0])
    if _use_triton(impl, x):
        from deepdoctor.kernels import fp8_triton

        fp8_triton.convert(x, scale, out, factor)
        return
    out.copy_(x.float().mul(factor).mul_(scale.view(-1, 1).reciprocal()).clamp_(-LARGEST, LARGEST))


def write_fp8_borders(
    border: Border,
    *,
    a16: Tensor,
    b16: Tensor,
    by_out: Tensor,
    out_scales: Tensor,
    by_in: Tensor,
    in_scales: Tensor,
    impl: Impl = "auto",
) -> None:
    """Write the adapters beside a matrix W (O, I) that lies in fp8 by rows and by columns; what they miss stays zero.

    border      A, B and s, as in ``bordered_nf4.py``; U: rows of A, at most R
    a16         (R, I)      bf16 | fp16 | fp32, contiguous: gets s A in its first U rows
    b16         (O, R)      as a16: gets the B, block-diagonally
    by_out      (O, I + R)  e4m3, contiguous: gets b16 in its last columns, under
    out_scales  (1, O)      fp32
    by_in       (I, O + R)  e4m3, contiguous: gets (s A)^T, from fp32, from column O on, under
    in_scales   (1, I)      fp32

    Raises KernelInputError where a shape differs from these.
    """
    out, inn, rank = border.out, border.inn, border.rank
    shapes = (a16.shape, b16.shape, by_out.shape, by_in.shape)
    if shapes != ((rank, inn), (out, rank), (out, inn + rank), (inn, out + rank)):
        raise KernelInputError(
            f"write_fp8_borders: a16, b16, by_out and by_in are {', '.join(str(tuple(s)) for s in shapes)} "
            f"for {out} x {inn} and {rank} columns beside it"
        )
    a = border.a
    if a is None:
        return
    if _use_triton(impl, a) and _launches(border):
        from deepdoctor.kernels import fp8_triton

        fp8_triton.write_borders(border, a16, b16, by_out, out_scales, by_in, in_scales)
        return
    used = a.shape[0]
    torch.mul(a, border.scale, out=a16[:used])
    for block in border.blocks:
        height, width = block.weight.shape
        b16[block.start : block.start + height, block.rank_at : block.rank_at + width] = block.weight
    convert_rows(b16, out_scales, by_out[:, inn:], impl=impl)
    convert_rows(a.T, in_scales, by_in[:, out : out + used], factor=border.scale, impl=impl)


def _launches(border: Border) -> bool:
    """Whether one launch takes these adapters: up to three B of one rank, beside each other, nothing strided."""
    assert border.a is not None
    tensors = [border.a, *(block.weight for block in border.blocks)]
    rank = tensors[-1].shape[1]
    return (
        2 <= len(tensors) <= 4
        and all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)
        and all(block.weight.shape[1] == rank for block in border.blocks)
        and all(block.rank_at == number * rank for number, block in enumerate(border.blocks))
    )


def fp8_matmul(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor) -> Tensor:
    """out = (x * x_scale) (weight * weight_scale)^T, rounded once.

    x             (T, K)  e4m3, contiguous
    x_scale       (T, 1)  fp32, contiguous
    weight        (O, K)  e4m3, contiguous
    weight_scale  (1, O)  fp32, contiguous
    out           (T, O)  bf16 (on a CPU also fp16 or fp32), rows contiguous, any row stride
    returns       out

    K and O are multiples of 16. Raises KernelInputError on any mismatch above.
    """
    rows, width = x.shape
    columns = weight.shape[0]
    ragged = width % WIDTH_STEP or columns % WIDTH_STEP
    if ragged or x.dtype != E4M3 or weight.dtype != E4M3 or weight.shape[1] != width:
        raise KernelInputError(
            f"fp8_matmul: x is {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}; expected "
            f"(T, K) and (O, K) {E4M3}, K and O multiples of {WIDTH_STEP}"
        )
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise KernelInputError(f"fp8_matmul: x has strides {x.stride()}, weight {weight.stride()}, expected contiguous")
    if x_scale.shape != (rows, 1) or weight_scale.shape != (1, columns):
        raise KernelInputError(
            f"fp8_matmul: x_scale is {tuple(x_scale.shape)}, weight_scale {tuple(weight_scale.shape)}, expected "
            f"({rows}, 1) and (1, {columns})"
        )
    _check_rows("fp8_matmul", "out", out, (rows, columns), FLOAT_DTYPES)
    if not rows:
        return out
    if not x.is_cuda:
        return out.copy_((x.float() * x_scale) @ (weight.float() * weight_scale.T).T)
    if out.is_contiguous() or not _writes_packed(x.get_device()):
        return _scaled(x, x_scale, weight, weight_scale, out)
    for start in range(0, rows, PACKED_ROWS):
        part = slice(start, start + PACKED_ROWS)
        target = out[part]
        packed = torch.empty(target.shape, dtype=out.dtype, device=out.device)
        target.copy_(_scaled(x[part], x_scale[part], weight, weight_scale, packed))
    return out


def _scaled(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out: Tensor) -> Tensor:
    found: Tensor = torch._scaled_mm(
        x, weight.T, scale_a=x_scale, scale_b=weight_scale, out_dtype=out.dtype, use_fast_accum=True, out=out
    )
    return found


@functools.cache
def _writes_packed(device: int) -> bool:
    """Whether the product ignores the row stride of ``out``, as PyTorch's kernel for Ada does (RowwiseScaledMM.cu)."""
    return torch.cuda.get_device_capability(device)[0] < 9


@functools.cache
def no_fp8_because(device: torch.device) -> str | None:
    """Return why row-wise fp8 products cannot run on this device, or None where they can; runs a small one."""
    if device.type != "cuda":
        return "fp8 products need a GPU"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"{name} has no fp8 arithmetic (compute capability {capability[0]}.{capability[1]}, 8.9 or more needed)"
    x = torch.zeros(32, 32, dtype=torch.uint8, device=device).view(E4M3)
    ones = torch.ones(32, 1, device=device)
    try:
        _scaled(x, ones, x, ones.view(1, 32), torch.empty(32, 32, dtype=torch.bfloat16, device=device))
    except RuntimeError as error:
        return f"torch {torch.__version__} has no row-wise fp8 product for {name} ({str(error).splitlines()[0][:120]})"
    return None


@functools.cache
def _card_converts(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def _use_triton(impl: Impl, x: Tensor) -> bool:
    """As ``use_triton``; older cards have no conversion to e4m3."""
    return use_triton(impl, x) and (not x.is_cuda or _card_converts(x.get_device()))


def _check_rows(op: str, name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if t.dim() != 2 or t.shape != shape or t.dtype not in dtypes:
        wanted = " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelInputError(
            f"{op}: {name} is {tuple(t.shape)} {t.dtype}, expected ({', '.join(map(str, shape[:2]))}) {wanted}"
        )
    if t.stride(1) != 1 or (t.shape[0] > 1 and t.stride(0) < t.shape[1]):
        raise KernelInputError(f"{op}: {name} has strides {t.stride()}, expected contiguous rows")


def _check_scale(op: str, name: str, scale: Tensor, rows: int) -> None:
    if scale.numel() != rows or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise KernelInputError(
            f"{op}: {name} is {tuple(scale.shape)} {scale.dtype}, expected ({rows},) float32, contiguous"
        )
