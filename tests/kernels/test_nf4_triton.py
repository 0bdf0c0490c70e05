"""NF4 in Triton: bytes and values equal the PyTorch reference bit for bit."""

import math
from dataclasses import replace

import pytest
import torch

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.nf4 import BLOCK_SIZES, NF4_CODE, NF4Weight, dequantize_nf4, quantize_nf4
from helpers_triton import DEVICE, INTERPRETED, needs_triton

pytestmark = needs_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One element, one row, odd counts, tails of words and blocks, exact tiles, three dimensions, several nested blocks.
SHAPES = ((1,), (1, 2), (5, 5), (7, 33), (3, 50), (64,), (1, 96), (13, 64), (64, 96), (4, 8, 64), (6, 1024), (9, 2056))
POISON = 7.0
SCALES = ("word", "block", "products")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that equality tells -0 from 0."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    """A normal weight on CPU whose second half of a row of blocks, where it has one, is zeros."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    w.view(-1)[128:192] = 0
    return w


def assert_same_weight(ours: NF4Weight, reference: NF4Weight) -> None:
    """All parts of both weights are equal to the bit."""
    assert torch.equal(ours.packed, reference.packed)
    assert torch.equal(bits(ours.absmax), bits(reference.absmax))
    for name in ("nested_absmax", "nested_offset", "nested_code"):
        one, other = getattr(ours, name), getattr(reference, name)
        assert (one is None and other is None) or torch.equal(bits(one), bits(other))


def reference_values(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The values in plain PyTorch; Triton's interpreter cuts fp32 to bf16 where a GPU rounds, so there these do too."""
    if INTERPRETED and dtype == torch.bfloat16:
        exact = dequantize_nf4(weight, torch.float32, impl="torch")
        return (exact.view(torch.int32) >> 16).to(torch.int16).view(dtype)
    return dequantize_nf4(weight, dtype, impl="torch")


def assert_same_values(weight: NF4Weight, dtype: torch.dtype) -> None:
    """Values read back, into new memory and into rows of a wider matrix, are the reference's; the gap is untouched."""
    reference = reference_values(weight, dtype)
    assert torch.equal(bits(dequantize_nf4(weight, dtype, impl="triton")), bits(reference))
    if len(weight.shape) != 2:
        return
    rows, columns = weight.shape
    for left, right in ((0, 16), (8, 8), (3, 2)):
        wide = torch.full((rows + 1, left + columns + right), POISON, dtype=dtype, device=DEVICE)
        view = wide[:rows, left : left + columns]
        assert dequantize_nf4(weight, dtype, out=view, impl="triton").data_ptr() == view.data_ptr()
        assert torch.equal(bits(view), bits(reference))
        assert (wide[:, :left] == POISON).all() and (wide[:, left + columns :] == POISON).all()
        assert (wide[rows] == POISON).all()


@pytest.mark.parametrize("double_quant", (True, False))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_equal_the_reference(shape, double_quant):
    """Every shape, dtype and way to store scales is read back to the same bits."""
    weight = quantize_nf4(normal(*shape).to(DEVICE), double_quant=double_quant, impl="torch")
    for dtype in DTYPES:
        assert_same_values(weight, dtype)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(block_size):
    """Every block size, with rows that are whole blocks, rows that are not, and an odd count."""
    for shape in ((2, 4096), (5, 1000), (3, 1367)):
        w = normal(*shape, seed=block_size).bfloat16().to(DEVICE)
        for double_quant in (True, False):
            reference = quantize_nf4(w, block_size, double_quant, impl="torch")
            assert_same_weight(quantize_nf4(w, block_size, double_quant, impl="triton"), reference)
            assert_same_values(reference, torch.bfloat16)


def test_many_nested_blocks():
    """More than 256 scales: the nested scale changes inside a tile and between tiles."""
    weight = quantize_nf4(normal(37, 1000).to(DEVICE), 32, impl="torch")
    assert weight.nested_absmax is not None and weight.nested_absmax.numel() == 5
    assert_same_values(weight, torch.float32)
    # A nested block of 32 scales of 32 elements: four in each tile of 4096.
    shorter = replace(weight, nested_block_size=32, nested_absmax=torch.rand(37, device=DEVICE))
    assert_same_values(shorter, torch.float32)


def test_product_and_sum_are_rounded_apart():
    """Scales for which a fused multiply-add gives other bits are decoded with two roundings."""
    generator = torch.Generator().manual_seed(1)
    blocks = 512
    weight = NF4Weight(
        packed=torch.full((blocks * 32, 1), 0xFF, dtype=torch.uint8, device=DEVICE),
        shape=(blocks, 64),
        dtype=torch.float32,
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator).to(DEVICE),
        nested_absmax=torch.rand(2, generator=generator).to(DEVICE),
        nested_offset=torch.tensor(0.123456789, device=DEVICE),
        nested_code=torch.randn(256, generator=generator).to(DEVICE),
    )
    assert weight.nested_code is not None and weight.nested_absmax is not None and weight.nested_offset is not None
    product = weight.nested_code[weight.absmax.long()].double() * weight.nested_absmax.repeat_interleave(256).double()
    fused = (product + weight.nested_offset.double()).float()
    values = dequantize_nf4(weight, torch.float32, impl="triton")[:, 0]
    assert torch.equal(bits(values), bits(dequantize_nf4(weight, torch.float32, impl="torch")[:, 0]))
    assert (values != fused).any()


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", ((32, 32), (8, 1024), (24, 1024), (16, 1536), (128, 192), (128, 328)), ids=str)
def test_tiles(shape, scales):
    """Tiles of every size, in rows, over rows and cut by them, however they come by their scales."""
    from deepdoctor.kernels.nf4_triton import dequantize_nf4_triton, tile_elements

    weight = quantize_nf4(normal(*shape).to(DEVICE), impl="torch")
    tile = tile_elements(weight)
    assert tile is not None and weight.numel % tile == 0
    for dtype in DTYPES:
        for wider in (0, 8, 48):
            wide = torch.full((shape[0], shape[1] + wider), POISON, dtype=dtype, device=DEVICE)
            dequantize_nf4_triton(weight, wide[:, : shape[1]], scales)
            assert torch.equal(bits(wide[:, : shape[1]]), bits(reference_values(weight, dtype)))
            assert (wide[:, shape[1] :] == POISON).all()


def test_packed_bytes_at_any_address():
    """Packed bytes that do not start on a 32-bit boundary are read all the same."""
    weight = quantize_nf4(normal(8, 128).to(DEVICE), impl="torch")
    buffer = torch.zeros(weight.packed.numel() + 3, dtype=torch.uint8, device=DEVICE)
    buffer[3:] = weight.packed.view(-1)
    assert_same_values(replace(weight, packed=buffer[3:].view(-1, 1)), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_equal_the_reference(shape, dtype):
    """Every shape and dtype is quantised to the same bytes and scales, large and subnormal values included."""
    for scale in (1e-42, 1e-6, 0.02, 1e3):
        w = normal(*shape, seed=2, scale=scale).to(DEVICE, dtype)
        for double_quant in (True, False):
            reference = quantize_nf4(w, 64, double_quant, impl="torch")
            assert_same_weight(quantize_nf4(w, 64, double_quant, impl="triton"), reference)


def test_special_blocks_equal_the_reference():
    """Zeros, negative zeros, constants, the largest numbers and the middles of two codes give the same bytes."""
    middles = torch.cat(((NF4_CODE[:-1] + NF4_CODE[1:]) / 2, NF4_CODE, torch.zeros(33)))
    above = torch.nextafter(middles, torch.full_like(middles, math.inf)).clamp(max=1)
    largest = torch.finfo(torch.float32).max
    w = torch.stack((torch.zeros(64), -torch.zeros(64), torch.full((64,), -3.0), middles * largest, middles, above))
    w = torch.cat((w, middles * torch.tensor([[3.0], [0.7], [1e-3]]))).to(DEVICE)
    ours = quantize_nf4(w, double_quant=False, impl="triton")
    assert_same_weight(ours, quantize_nf4(w, double_quant=False, impl="torch"))
    assert (ours.packed.view(-1)[:64] == 0x77).all()


def test_a_strided_weight():
    """A transposed weight is quantised as its contiguous copy."""
    w = normal(96, 130).bfloat16().to(DEVICE).t()
    assert_same_weight(quantize_nf4(w, impl="triton"), quantize_nf4(w.contiguous(), impl="torch"))


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("bad", (math.nan, -math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("place", (5, 70, 129), ids=("first block", "second block", "tail"))
def test_damaged_weights_are_refused(place, bad):
    """Nan and infinity of either sign are found wherever they are."""
    w = normal(130)
    w[place] = bad
    with pytest.raises(KernelInputError, match="nan or infinity"):
        quantize_nf4(w.to(DEVICE), impl="triton")


def test_wrong_arguments_are_named():
    """An out whose rows overlap, or an unknown impl, is refused."""
    weight = quantize_nf4(torch.ones(32, 64, device=DEVICE), impl="triton")
    for out in (torch.empty(64, device=DEVICE).expand(32, 64), torch.empty(64, 32, device=DEVICE).t()):
        with pytest.raises(KernelInputError, match="expected a contiguous"):
            dequantize_nf4(weight, torch.float32, out=out, impl="triton")
    with pytest.raises(KernelInputError, match="impl is 'fast'"):
        dequantize_nf4(weight, torch.float32, impl="fast")
    with pytest.raises(KernelInputError, match="impl is 'fast'"):
        quantize_nf4(torch.ones(4, device=DEVICE), impl="fast")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((4096, 14336), (14336, 4096), (1023, 4098), (1001, 4099)), ids=str)
def test_layer_shapes_equal_the_reference(shape, dtype):
    """Weights of a model's size give the same bytes and values, into rows of a wider matrix as well."""
    w = (torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE) * 0.02).to(dtype)
    ours, reference = quantize_nf4(w), quantize_nf4(w, impl="torch")
    assert_same_weight(ours, reference)
    assert_same_values(ours, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_time_of_a_large_weight(capsys):
    """Prints the kernel's time, without the host's, for each way to scale; on an H100 the default takes < 0.09 ms."""
    from deepdoctor.kernels import nf4_triton

    w = torch.randn(14336, 4096, generator=torch.Generator(DEVICE).manual_seed(5), device=DEVICE).bfloat16()
    weight = quantize_nf4(w)
    out = torch.empty(14336, 4128, dtype=torch.bfloat16, device=DEVICE)[:, :4096]
    moved = weight.nbytes + 2 * weight.numel
    ways = [(f"tiles, scales by {s}", lambda s=s: nf4_triton.dequantize_nf4_triton(weight, out, s)) for s in SCALES]
    by_words = replace(weight, nested_block_size=128, nested_absmax=weight.nested_absmax.repeat_interleave(2))
    ways.append(("words", lambda: nf4_triton.dequantize_nf4_triton(by_words, out)))
    ways.append(("fill with zeros", lambda: out.zero_()))
    times = {}
    for name, call in ways:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                call()
        times[name] = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 20)
        with capsys.disabled():
            print(f"\n{name:26} {min(times[name]):.4f} ms, {moved / min(times[name]) / 1e9:.2f} TB/s", end="")
    if "H100" in torch.cuda.get_device_name() or "H200" in torch.cuda.get_device_name():
        assert min(times[f"tiles, scales by {nf4_triton.SCALES}"]) < 0.09


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_more_elements_than_int32_counts():
    """The end of a weight of 2**31 + 8192 elements is written where it belongs."""
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    rows = 2**19 + 2
    packed = torch.full((rows * 2048, 1), 0x77, dtype=torch.uint8, device=DEVICE)
    packed[-1] = 0xF0
    absmax = torch.ones(rows * 64, device=DEVICE)
    absmax[-1] = 3
    weight = NF4Weight(packed, (rows, 4096), torch.float16, absmax)
    values = dequantize_nf4(weight, torch.float16)
    assert values[-1, -2:].tolist() == [3, -3]
    assert not values[0].any() and not values[-1, :-2].any()
    assert not values[: rows // 2].any() and not values[rows // 2 : -1].any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_bnb(dtype):
    """Values of a weight that bitsandbytes quantised equal those that it reads back."""
    bnb = pytest.importorskip("bitsandbytes").functional
    w = (torch.randn(1024, 4096, generator=torch.Generator().manual_seed(4)) * 0.02).to(DEVICE, torch.bfloat16)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    theirs = NF4Weight(
        *(packed, tuple(w.shape), torch.bfloat16, state.absmax, 64),
        state.state2.absmax,
        state.offset,
        state.state2.code,
    )
    state.dtype = dtype
    expected = bnb.dequantize_4bit(packed, state).reshape(w.shape)
    assert torch.equal(bits(dequantize_nf4(theirs, dtype)), bits(expected))
    ours = quantize_nf4(w)
    assert torch.equal(ours.packed, packed)
