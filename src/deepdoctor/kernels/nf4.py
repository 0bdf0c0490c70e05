"""NF4: four bits per weight with one scale per block, byte for byte as bitsandbytes stores it.

Maths. Cut the flattened weight into blocks of Q elements (64). With absmax = max |w| of a block, every element becomes
the index of the value of `NF4_CODE` nearest to w / absmax; the 16 values are quantiles of a normal distribution, 0
and ±1 among them. Reading back: w' = NF4_CODE[index] · absmax in fp32, rounded once to the dtype asked for.

Double quantisation stores the scales in one byte each, too. offset = mean(absmax); blocks of 256 scales become
8-bit codes c of (absmax - offset) / nested_absmax, with nested_absmax = max |absmax - offset|. Reading back:
absmax' = code[c] · nested_absmax + offset, product and sum each rounded to fp32. `code` is `dynamic_map()`, a type
whose spacing grows with the value. The cost is 4 + 8/64 + 32/(64·256) = 4.127 bits per weight.

Layout. Element 2i sits in the high four bits of byte i, element 2i+1 in the low four; an odd count is padded with 7
(zero). Packed bytes have the shape (ceil(n/2), 1), as in published checkpoints.

Equality with bitsandbytes (0.50.2, compared on CPU and on an H100):

- Packed bytes. w is multiplied by fp32(1 / max(absmax, 1e-38)), a shorter last block is divided by its absmax, and a
  tie goes to the lower index, as on bitsandbytes' CPU path. Its CUDA path uses the hardware's approximate reciprocal.
  For bf16 weights that cannot matter: no quotient of two bf16 numbers comes nearer than 19 · 2**-24 (relative) to the
  middle between two NF4 values. Of 16.8 million normal fp32 weights one got the neighbouring index, of fp16 none.
- A block of zeros. bitsandbytes' CUDA path computes 0 · inf = nan there and stores index 0 (-1), so with double
  quantisation its zeros read back as minus a rounding error of the scale. Here, as on its CPU path, they are index 7
  and stay zero.
- Scale codes. CUDA takes the nearest of the 256 values (a tie goes to the even index). The CPU path (of 0.50) first
  rounds to a grid of 65,536 points over [-1, 1], which changed 1.6 codes in a thousand of a normal weight, by up to
  three steps. `scale_rounding` chooses; "auto" is the rule that bitsandbytes has on the device of w.
- offset is torch's mean: its last bit depends on device and number of threads.
- Values read back are equal. Exceptions are bitsandbytes': hardware may flush subnormal results to zero, the AVX-512
  kernel takes wrong scales where a row is not a whole number of blocks (a (64, 96) weight in blocks of 64, say), and
  the CPU code inside its CUDA build rounds fp16 ties away from zero.

The PyTorch code below is the reference; `nf4_triton.py` gives the same bytes and values on CUDA in one launch each
(of quantising, the double quantisation stays in PyTorch).

Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), section 3 and appendix E; Dettmers et al. 2021, 8-bit
Optimizers via Block-wise Quantization (arXiv 2110.02861), for the dynamic type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.rows import FLOAT_DTYPES, is_row_view

__all__ = [
    "BLOCK_SIZES",
    "NESTED_BLOCK_SIZE",
    "NF4_CODE",
    "NF4Weight",
    "block_scales",
    "dequantize_nf4",
    "dynamic_map",
    "quantize_nf4",
]

NF4_CODE = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=torch.float32,
    device="cpu",
)
"""The 16 NF4 values, (16,) fp32, ascending. Source: QLoRA, appendix E."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Elements per scale that bitsandbytes writes; 64 is its default and that of published checkpoints."""

NESTED_BLOCK_SIZE = 256
"""Scales per fp32 scale of scales, fixed in bitsandbytes."""

# fp32 scratch per chunk: 4 MiB stays in a CPU cache, 16 MiB fills a GPU; both are small beside a weight.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 22}
# bitsandbytes' floor, so that 1 / absmax of a block of zeros is finite.
TINY_ABSMAX = 1e-38


@dataclass(frozen=True, eq=False, slots=True)
class NF4Weight:
    """A tensor of n elements in NF4, all parts on one device; blocks = ceil(n / block_size).

    packed        (ceil(n/2), 1) uint8, element 2i in the high half of byte i
    shape, dtype  of the tensor that was quantised; dtype is fp32, bf16 or fp16
    absmax        (blocks,) fp32, or uint8 codes when double-quantised; the rest is None when it is not:
    nested_absmax (ceil(blocks/256),) fp32, nested_offset () fp32, nested_code (256,) fp32
    """

    packed: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    absmax: Tensor
    block_size: int = 64
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_code: Tensor | None = None
    nested_block_size: int = NESTED_BLOCK_SIZE

    @property
    def double_quant(self) -> bool:
        """Whether the block scales are 8-bit codes themselves."""
        return self.nested_absmax is not None

    @property
    def numel(self) -> int:
        """Elements of the quantised tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NF4Weight:
        """The same weight with every tensor on device; tensors already there are shared, not copied."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()
        }
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type, (256,) fp32 on CPU, ascending.

    Seven decades, 10**-6 to 1; decade d (0 to 6) has 2**d values of each sign, the middles of equal parts of
    [0.1, 1] · 10**(d - 6). 0 and 1 complete the 256.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    half = torch.cat(positive)
    return torch.cat((-half, half, torch.tensor([0.0, 1.0], device="cpu"))).sort().values


@torch.no_grad()
def quantize_nf4(
    w: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
    *,
    scale_rounding: Literal["auto", "nearest", "grid"] = "auto",
    impl: Impl = "auto",
) -> NF4Weight:
    """Quantise w to NF4; the result is on w's device and does not share memory with w.

    w               any shape with at least one element, fp32 | bf16 | fp16, finite; copied first if not contiguous
    block_size      one of BLOCK_SIZES
    double_quant    store the scales as 8-bit codes
    scale_rounding  with double_quant: "nearest" is bitsandbytes on CUDA, and so the rule of published checkpoints;
                    "grid" is bitsandbytes on CPU; "auto" takes "grid" for a CPU tensor, "nearest" for any other
    impl            "torch" works in chunks of fp32; the same bytes either way

    Raises KernelInputError on any mismatch above.
    """
    if w.dtype not in FLOAT_DTYPES:
        raise KernelInputError(f"w has dtype {w.dtype}; NF4 takes torch.float32, torch.bfloat16 or torch.float16")
    if block_size not in BLOCK_SIZES:
        raise KernelInputError(f"block_size is {block_size}; NF4 takes one of {', '.join(map(str, BLOCK_SIZES))}")
    if scale_rounding not in ("auto", "nearest", "grid"):
        raise KernelInputError(f"scale_rounding is {scale_rounding!r}; expected 'auto', 'nearest' or 'grid'")
    flat = w.reshape(-1)
    n = flat.numel()
    if n == 0:
        raise KernelInputError(f"w has shape {tuple(w.shape)}, which holds no element; NF4 needs at least one")

    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    done = 0
    if use_triton(impl, w):
        from deepdoctor.kernels.nf4_triton import quantize_blocks_triton

        done = quantize_blocks_triton(flat, packed, absmax, block_size)
    chunk = _chunk_elements(w.device)
    for start in range(done, n, chunk):
        values = flat[start : start + chunk].float()
        blocks = slice(start // block_size, start // block_size - (-values.numel() // block_size))
        scaled = _scale_blocks(values, absmax[blocks], block_size)
        packed[start // 2 : start // 2 + (values.numel() + 1) // 2] = _pack(_nearest_nf4(scaled))
    if not torch.isfinite(absmax).all():
        raise KernelInputError(
            f"w of shape {tuple(w.shape)} holds nan or infinity; NF4 takes finite weights",
            hint="check the weight file: a damaged download or an overflow in fp16 gives such values",
        )

    weight = NF4Weight(packed.unsqueeze(1), tuple(w.shape), w.dtype, absmax, block_size)
    if not double_quant:
        return weight
    if scale_rounding == "auto":
        scale_rounding = "grid" if w.device.type == "cpu" else "nearest"
    offset = absmax.mean()
    code = dynamic_map().to(w.device)
    codes, nested_absmax = _quantize_scales(absmax - offset, code, scale_rounding)
    return replace(weight, absmax=codes, nested_absmax=nested_absmax, nested_offset=offset, nested_code=code)


@torch.no_grad()
def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """The values that weight stands for: NF4_CODE[index] · scale in fp32, rounded once to dtype.

    dtype    fp32 | bf16 | fp16, whatever weight.dtype is
    out      of weight.shape and dtype on weight's device, contiguous, or for a matrix a row view: stride(1) == 1 and
             stride(0) >= columns, what lies between rows is left alone; allocated when None
    impl     "torch" needs extra memory: the scales in fp32 and one chunk; the same values either way
    returns  out, shape weight.shape

    Raises KernelInputError on any mismatch above.
    """
    device = weight.packed.device
    if dtype not in FLOAT_DTYPES:
        raise KernelInputError(f"dtype is {dtype}; expected torch.float32, torch.bfloat16 or torch.float16")
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=device)
    elif (tuple(out.shape) != weight.shape or out.dtype != dtype or out.device != device) or not (
        out.is_contiguous() or is_row_view(out)
    ):
        raise KernelInputError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}; "
            f"expected a contiguous {weight.shape} {dtype} on {device}, or rows of such a matrix further apart"
        )
    if use_triton(impl, out):
        from deepdoctor.kernels.nf4_triton import dequantize_nf4_triton

        dequantize_nf4_triton(weight, out)
        return out
    scales = block_scales(weight)
    high, low = NF4_CODE.repeat_interleave(16), NF4_CODE.repeat(16)
    pairs = torch.stack((high, low), dim=1).to(device)  # (256, 2): both elements of each possible byte
    packed, n, size = weight.packed.reshape(-1), weight.numel, weight.block_size
    flat = out.view(-1) if out.is_contiguous() else None
    chunk = _chunk_elements(device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        values = pairs.index_select(0, packed[start // 2 : (stop + 1) // 2].int()).view(-1)[: stop - start]
        full = (stop - start) // size * size
        first = start // size
        if full:
            values[:full].view(-1, size).mul_(scales[first : first + full // size].unsqueeze(1))
        if full < stop - start:
            values[full:].mul_(scales[-1])
        if flat is not None:
            flat[start:stop] = values
        else:
            _write_rows(out, start, values)
    return out


@torch.no_grad()
def block_scales(weight: NF4Weight) -> Tensor:
    """The scale of every block, (blocks,) fp32: absmax itself, or what its 8-bit codes stand for."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.nested_code is not None and weight.nested_offset is not None
    values = weight.nested_code.index_select(0, weight.absmax.int())
    nested = weight.nested_absmax.repeat_interleave(weight.nested_block_size)[: values.numel()]
    # Two roundings, as bitsandbytes: a fused multiply-add would change last bits.
    return values.mul_(nested).add_(weight.nested_offset)


def _write_rows(out: Tensor, start: int, values: Tensor) -> None:
    """Write values (n,) to the elements of the matrix out from number start on, counted row by row."""
    columns = out.shape[1]
    while values.numel():
        row, column = divmod(start, columns)
        rows = values.numel() // columns
        if column or not rows:
            taken = min(columns - column, values.numel())
            out[row, column : column + taken] = values[:taken]
        else:
            taken = rows * columns
            out[row : row + rows] = values[:taken].view(rows, columns)
        start, values = start + taken, values[taken:]


def _chunk_elements(device: torch.device) -> int:
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])


def _scale_blocks(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """values (n,) fp32 divided by their block's absmax, (n,) fp32; fills absmax (ceil(n / block_size),)."""
    full = values.numel() // block_size * block_size
    blocks = values[:full].view(-1, block_size)
    largest = absmax[: full // block_size]
    torch.amax(blocks.abs(), dim=1, out=largest)
    scaled = torch.empty_like(values)
    torch.mul(blocks, (1.0 / largest.clamp(min=TINY_ABSMAX)).unsqueeze(1), out=scaled[:full].view(-1, block_size))
    if full < values.numel():
        absmax[-1] = values[full:].abs().amax().clamp(min=TINY_ABSMAX)
        torch.div(values[full:], absmax[-1], out=scaled[full:])
    return scaled


def _nearest_nf4(scaled: Tensor) -> Tensor:
    """Indices (n,) uint8 of the NF4 values nearest to scaled (n,) fp32: the number of middles that lie below."""
    middles = ((NF4_CODE[:-1] + NF4_CODE[1:]) / 2).tolist()
    index = torch.gt(scaled, middles[0]).view(torch.uint8)
    above = torch.empty(scaled.shape, dtype=torch.bool, device=scaled.device)
    # Fifteen comparisons run at memory speed; torch.bucketize took 1.8 times as long on CPU.
    for middle in middles[1:]:
        index += torch.gt(scaled, middle, out=above).view(torch.uint8)
    return index


def _pack(index: Tensor) -> Tensor:
    """Two indices a byte, the first in the high half: (n,) uint8 to (ceil(n/2),) uint8."""
    if index.numel() % 2:
        index = torch.cat((index, index.new_full((1,), 7)))
    return (index[::2] << 4) | index[1::2]


def _quantize_scales(centred: Tensor, code: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    """8-bit codes of the scales less their mean, (blocks,) uint8, and the largest of each 256, (ceil(blocks/256),)."""
    n = centred.numel()
    padded = torch.nn.functional.pad(centred, (0, -n % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * (1.0 / absmax).unsqueeze(1)
    middles = (code[:-1] + code[1:]) / 2
    if rounding == "grid":
        # index = trunc(fma((x + 1) / 2, 65535, 0.5)): in fp64 product and sum are exact, the cast rounds once.
        place = ((scaled.clamp(-1, 1) + 1) * 0.5).double() * 65535 + 0.5
        # CUDA multiplies by the reciprocal of a Python number; a tensor is divided by.
        scaled = place.float().trunc() * 2 / torch.tensor(65535.0, device=code.device) - 1
    else:
        odd = torch.arange(255, device=code.device) % 2 == 1
        middles = torch.where(odd, torch.nextafter(middles, torch.full_like(middles, -torch.inf)), middles)
    codes = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
    # All scales equal: bitsandbytes stores code 0, which reads back as 0 · nested_absmax.
    codes.masked_fill_((absmax == 0).unsqueeze(1), 0)
    return codes.view(-1)[:n], absmax
