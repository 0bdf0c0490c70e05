"""NF4 against bitsandbytes, bit for bit, and against its own definition."""

import logging
import math

import pytest
import torch

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.nf4 import (
    BLOCK_SIZES,
    NF4_CODE,
    NF4Weight,
    _quantize_scales,
    block_scales,
    dequantize_nf4,
    dynamic_map,
    quantize_nf4,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One row, odd counts, a tail shorter than a block, exact blocks, three dimensions, more scales than one nested block.
SHAPES = ((1,), (1, 2), (5, 5), (7, 33), (3, 50), (64,), (64, 64), (64, 96), (4, 8, 64), (300, 1024), (1000, 130))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes' functions; its word about an optional package is silenced, and its fallbacks are not compiled."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    functional = pytest.importorskip("bitsandbytes").functional
    torch.compiler.set_stance("force_eager")
    yield functional
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module")
def bnb_grid(bnb):
    """bitsandbytes where its CPU path rounds scales to a grid: 1e-6 then becomes the code of zero."""
    codes, _ = bnb.quantize_blockwise(torch.tensor([1.0, 1e-6]), blocksize=256)
    if codes[1] == bnb.quantize_blockwise(torch.tensor([1.0, 0.0]), blocksize=256)[0][1]:
        return bnb
    pytest.skip("this release of bitsandbytes rounds scales on CPU by another rule than 0.50")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that equality tells -0 from 0."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def oracle_values(bnb, packed, state, dtype):
    """bitsandbytes' values, read as one row: its AVX-512 kernel takes wrong scales where rows are not whole blocks."""
    kept = state.shape, state.dtype
    # The CPU code inside its CUDA build rounds ties away from zero in fp16, where all else rounds them to even.
    unreliable = dtype == torch.float16 and torch.cuda.is_available()
    state.shape, state.dtype = torch.Size([math.prod(kept[0])]), torch.float32 if unreliable else dtype
    values = bnb.dequantize_4bit(packed, state).reshape(kept[0])
    state.shape, state.dtype = kept
    return values.to(dtype)


def assert_equals_bnb(bnb, w: torch.Tensor, block_size: int, double_quant: bool) -> None:
    """Bytes, scales and values of ours equal bitsandbytes' for w."""
    packed, state = bnb.quantize_4bit(
        w, blocksize=block_size, quant_type="nf4", compress_statistics=double_quant, quant_storage=torch.uint8
    )
    ours = quantize_nf4(w, block_size, double_quant)
    assert ours.packed.shape == packed.shape
    assert torch.equal(ours.packed, packed)
    assert torch.equal(bits(ours.absmax), bits(state.absmax))
    if double_quant:
        assert torch.equal(bits(ours.nested_absmax), bits(state.state2.absmax))
        assert torch.equal(bits(ours.nested_offset), bits(state.offset))
        assert torch.equal(bits(ours.nested_code), bits(state.state2.code))
    for dtype in DTYPES:
        expected = oracle_values(bnb, packed, state, dtype)
        assert torch.equal(bits(dequantize_nf4(ours, dtype)), bits(expected))


def test_codes_equal_bnb(bnb):
    """The two value tables equal bitsandbytes'."""
    assert torch.equal(NF4_CODE, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_bnb(bnb_grid, shape, dtype):
    """Every shape, scale of values and way to store scales gives bitsandbytes' bytes and values."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    for scale in (1e-30, 1e-6, 0.02, 1.0, 1e3):
        w = (torch.randn(shape, generator=generator) * scale).to(dtype)
        assert_equals_bnb(bnb_grid, w, 64, double_quant=True)
        assert_equals_bnb(bnb_grid, w, 64, double_quant=False)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes_equal_bnb(bnb_grid, block_size):
    """Every block size that bitsandbytes writes, with a tail, gives its bytes and values."""
    w = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 0.02
    for double_quant in (True, False):
        assert_equals_bnb(bnb_grid, w.bfloat16(), block_size, double_quant)


def test_several_chunks_equal_bnb(bnb_grid):
    """A weight of more than one chunk, ending in the middle of a block, equals bitsandbytes."""
    w = torch.randn(1100, 1002, generator=torch.Generator().manual_seed(1)) * 0.02
    assert_equals_bnb(bnb_grid, w.bfloat16(), 64, double_quant=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_equal_bnb(bnb_grid, dtype):
    """Zeros, constants, extremes, sparse rows and values on the middle of two codes give bitsandbytes' bytes."""
    generator = torch.Generator().manual_seed(2)
    largest = torch.finfo(dtype).max
    middles = torch.cat(((NF4_CODE[:-1] + NF4_CODE[1:]) / 2, NF4_CODE, torch.zeros(33)))
    half_zero = torch.randn(40, 64, generator=generator)
    half_zero[::2] = 0
    sparse = torch.randn(40, 64, generator=generator) * (torch.rand(40, 64, generator=generator) < 0.02)
    outlier = torch.randn(300, 64, generator=generator)
    outlier[7, 7] = 6e4
    cases = (
        torch.zeros(3, 64),
        torch.zeros(70),
        torch.ones(5, 64),
        -torch.ones(5, 64),
        torch.tensor([largest, -largest, largest / 3, 1.0]),
        middles.expand(4, 64) * torch.tensor([[1.0], [3.0], [0.7], [1e-3]]),
        half_zero,
        sparse,
        outlier,
    )
    for case in cases:
        for double_quant in (True, False):
            assert_equals_bnb(bnb_grid, case.contiguous().to(dtype), 64, double_quant)


def test_ties_take_the_lower_index():
    """A value exactly between two codes gets the lower one; the next fp32 above it, the upper."""
    middles = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
    above = torch.nextafter(middles, torch.full_like(middles, math.inf))
    w = torch.cat((torch.ones(1), middles, above, torch.zeros(1)))
    packed = quantize_nf4(w, double_quant=False).packed.view(-1)
    index = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
    assert index.tolist() == [15, *range(15), *range(1, 16), 7]


def test_bf16_bytes_do_not_depend_on_the_reciprocal():
    """No quotient of two bf16 numbers is near the middle of two codes: any reciprocal gives the same bytes."""
    mantissas = torch.arange(128, 256, dtype=torch.float64)
    exponents = 2.0 ** -torch.arange(7, dtype=torch.float64)
    quotients = (mantissas[:, None, None] * exponents / mantissas[:, None]).view(-1)
    middles = ((NF4_CODE[:-1] + NF4_CODE[1:]) / 2).abs().double()
    nearest = ((quotients[:, None] - middles) / middles).abs().min()
    # Reciprocal and product each err by at most two units of 2**-24.
    assert nearest > 19 * 2**-24


def test_nearest_scales_are_nearest():
    """The rule of CUDA picks, for every scale, a code that no other code beats."""
    w = torch.randn(513, 640, generator=torch.Generator().manual_seed(3))
    plain, coded = quantize_nf4(w, double_quant=False), quantize_nf4(w, scale_rounding="nearest")
    assert coded.nested_offset is not None and coded.nested_absmax is not None and coded.nested_code is not None
    nested = coded.nested_absmax.repeat_interleave(256)[: plain.absmax.numel()]
    scaled = (plain.absmax - coded.nested_offset) / nested
    error = (coded.nested_code[coded.absmax.int()] - scaled).abs()
    best = (coded.nested_code - scaled[:, None]).abs().amin(1)
    assert (error <= best + 1e-7).all()


def test_scale_rules_differ_little():
    """Nearest and grid are different rules, and agree on 99 % of the codes of a normal weight."""
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(4))
    nearest, grid = (quantize_nf4(w, scale_rounding=rule) for rule in ("nearest", "grid"))
    changed = (nearest.absmax != grid.absmax).float().mean()
    assert 0 < changed < 0.01
    assert torch.equal(nearest.packed, grid.packed)


def test_nearest_ties_take_the_even_code():
    """A scale exactly between two 8-bit codes gets the even index, as on CUDA; equal scales get code 0."""
    code = dynamic_map()
    middles = (code[:-1] + code[1:]) / 2
    codes, absmax = _quantize_scales(torch.cat((middles, torch.ones(1))), code, "nearest")
    assert absmax.item() == 1
    assert codes[:255].tolist() == [i + i % 2 for i in range(255)]
    assert _quantize_scales(torch.zeros(5), code, "nearest")[0].tolist() == [0] * 5


@pytest.mark.parametrize("double_quant", (True, False))
def test_error_is_bounded_by_the_widest_gap(double_quant):
    """Reading back errs by at most half the widest gap of the codes times the scale; zeros stay zeros."""
    w = torch.randn(64, 640, generator=torch.Generator().manual_seed(5))
    w[3] = 0
    weight = quantize_nf4(w, double_quant=double_quant)
    scales = block_scales(weight)
    exact = block_scales(quantize_nf4(w, double_quant=False))
    bound = (NF4_CODE.diff().max() / 2 * exact + (scales - exact).abs()) * (1 + 1e-6)
    error = (dequantize_nf4(weight, torch.float32) - w).abs().view(-1, 64)
    assert (error <= bound[:, None]).all()
    assert (dequantize_nf4(weight, torch.float32)[3] == 0).all()


def test_quantised_values_are_a_fixed_point():
    """Without double quantisation, quantising what was read back gives the same bytes again."""
    w = torch.randn(128, 192, generator=torch.Generator().manual_seed(6))
    once = quantize_nf4(w, double_quant=False)
    twice = quantize_nf4(dequantize_nf4(once, torch.float32), double_quant=False)
    assert torch.equal(once.packed, twice.packed)
    assert torch.equal(once.absmax, twice.absmax)


def test_strided_weights_and_slices_of_a_buffer():
    """A transposed weight is quantised as its contiguous copy; out may be the rows of a larger buffer."""
    w = torch.randn(96, 130, generator=torch.Generator().manual_seed(7)).bfloat16()
    weight = quantize_nf4(w.t())
    assert torch.equal(weight.packed, quantize_nf4(w.t().contiguous()).packed)
    buffer = torch.full((132, 96), 7.0, dtype=torch.float16)
    returned = dequantize_nf4(weight, torch.float16, out=buffer[1:131])
    assert returned.data_ptr() == buffer[1].data_ptr()
    assert torch.equal(buffer[1:131], dequantize_nf4(weight, torch.float16))
    assert (buffer[[0, 131]] == 7).all()


@pytest.mark.parametrize("shape", [(1, 33), (5, 1), (7, 33), (1100, 1002), (1200, 1001), (2, 600_001)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_wider_matrix(shape, dtype):
    """Out may be columns of a wider matrix, chunks that end inside a row included; the other columns are untouched."""
    rows, columns = shape
    weight = quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(10)))
    wide = torch.full((rows, columns + 9), 7.0, dtype=dtype)
    returned = dequantize_nf4(weight, dtype, out=wide[:, 4 : 4 + columns])
    assert returned.data_ptr() == wide[:, 4:].data_ptr()
    assert torch.equal(bits(wide[:, 4 : 4 + columns]), bits(dequantize_nf4(weight, dtype)))
    assert (wide[:, :4] == 7).all() and (wide[:, 4 + columns :] == 7).all()


def test_parameters_need_no_gradient():
    """A weight that requires a gradient is quantised, and what is read back requires none."""
    w = torch.nn.Parameter(torch.randn(8, 64))
    assert not dequantize_nf4(quantize_nf4(w), torch.float32).requires_grad


def test_size_in_bytes():
    """4.127 bits per weight with double quantisation, 4.5 without; `to` keeps every tensor."""
    w = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    weight = quantize_nf4(w)
    assert weight.nbytes == w.numel() // 2 + w.numel() // 64 + 4 * w.numel() // 64 // 256 + 4 + 1024
    assert quantize_nf4(w, double_quant=False).nbytes == w.numel() // 2 + 4 * w.numel() // 64
    moved = weight.to("meta")
    assert isinstance(moved, NF4Weight)
    assert moved.packed.device.type == moved.nested_code.device.type == "meta"
    assert (moved.shape, moved.dtype, moved.numel) == ((1024, 1024), torch.bfloat16, 1 << 20)
    assert weight.double_quant and not quantize_nf4(w, double_quant=False).double_quant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": torch.zeros(4, dtype=torch.int32)}, "dtype torch.int32"),
        ({"w": torch.zeros(4), "block_size": 60}, "block_size is 60"),
        ({"w": torch.zeros(0, 64)}, r"shape \(0, 64\)"),
        ({"w": torch.tensor([1.0, math.nan])}, "nan or infinity"),
        ({"w": torch.tensor([1.0] * 64 + [math.inf] + [0.0] * 63)}, "nan or infinity"),
        ({"w": torch.zeros(4), "scale_rounding": "up"}, "scale_rounding is 'up'"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    """What cannot be quantised raises an error that names argument and value."""
    with pytest.raises(KernelInputError, match=message):
        quantize_nf4(**arguments)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(64, 32),
        torch.empty(32, 64, dtype=torch.bfloat16),
        torch.empty(64, 32).t(),
        torch.empty(32, 64, device="meta"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_wrong_out_is_named(out):
    """An out of other shape, dtype, layout or device is refused before anything is written."""
    weight = quantize_nf4(torch.ones(32, 64))
    with pytest.raises(KernelInputError, match="expected a contiguous"):
        dequantize_nf4(weight, torch.float32, out=out)
    with pytest.raises(KernelInputError, match=r"dtype is torch\.int8"):
        dequantize_nf4(weight, torch.int8)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_bnb_on_cuda(bnb, dtype):
    """On CUDA bf16 bytes and all values equal bitsandbytes'; other bytes and codes differ in under 1 in 10,000."""
    for shape in ((300, 1024), (1000, 130), (7, 33), (2048, 2048)):
        w = (torch.randn(shape, generator=torch.Generator().manual_seed(8)) * 0.02).to("cuda", dtype)
        packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        ours = quantize_nf4(w)
        allowed = 0 if dtype == torch.bfloat16 else max(1, packed.numel() // 10_000)
        assert (ours.packed != packed).sum() <= allowed
        assert (ours.absmax != state.absmax).sum() <= state.absmax.numel() // 10_000
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.nested_offset, state.offset)
        theirs = NF4Weight(packed, shape, dtype, state.absmax, 64, state.state2.absmax, state.offset, state.state2.code)
        for out_dtype in DTYPES:
            state.dtype = out_dtype
            expected = bnb.dequantize_4bit(packed, state).reshape(shape)
            assert torch.equal(bits(dequantize_nf4(theirs, out_dtype)), bits(expected))


@pytest.mark.gpu
@needs_cuda
def test_cuda_equals_cpu():
    """The same rule gives the same bytes on both devices; values read back are equal, more than one chunk included."""
    w = (torch.randn(4500, 4096, generator=torch.Generator().manual_seed(9)) * 0.02).bfloat16()
    for rule in ("nearest", "grid"):
        cpu, cuda = quantize_nf4(w, scale_rounding=rule), quantize_nf4(w.cuda(), scale_rounding=rule)
        assert torch.equal(cpu.packed, cuda.packed.cpu())
        # The mean may differ in its last bit, and with it a scale at the middle of two codes.
        assert (cpu.absmax != cuda.absmax.cpu()).sum() <= cpu.absmax.numel() // 1000
        for dtype in DTYPES:
            assert torch.equal(dequantize_nf4(cpu.to("cuda"), dtype).cpu(), dequantize_nf4(cpu, dtype))
