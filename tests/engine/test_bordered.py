"""One bordered matrix: what it holds, kept or lent, and its products against plain LoRA."""

from collections.abc import Sequence

import pytest
import torch

from deepdoctor.engine.bordered import Bordered
from deepdoctor.kernels.nf4 import dequantize_nf4, quantize_nf4
from deepdoctor.model.decoder import FrozenLinear
from helpers_triton import DEVICE, needs_triton

NAMES = ("q_proj", "k_proj", "v_proj")
SIZES = (64, 32, 32)
INN, R, RANK, SCALE = 64, 3, 16, 0.5


class Loose:
    """Masters and gradients, each A block and each B a tensor of its own."""

    def __init__(self, device: torch.device):
        self.generator = torch.Generator().manual_seed(3)
        self.device = device
        self.held: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def _pair(self, key: object, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        if key not in self.held:
            weight = torch.randn(shape, generator=self.generator).to(self.device)
            self.held[key] = weight, torch.zeros_like(weight)
        return self.held[key]

    def a_block(self, layer: int, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """One block for all names."""
        return self._pair("a", R * len(names), INN)

    def b(self, layer: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """One B."""
        return self._pair(name, SIZES[NAMES.index(name)], R)


def linear(precision: str, dtype: torch.dtype, device: torch.device) -> FrozenLinear:
    """Three projections, held as ``precision`` says."""
    generator = torch.Generator().manual_seed(4)
    made = FrozenLinear(NAMES, SIZES, INN, dtype)
    weight = torch.randn(sum(SIZES), INN, generator=generator).to(device, dtype)
    if precision == "dense":
        made.weight = weight
    else:
        parts = [quantize_nf4(part, impl="torch") for part in weight.split(list(SIZES))]
        made.parts = (parts[0], weight[64:96].clone(), parts[2]) if precision == "mixed" else tuple(parts)
    return made


def bordered(precision="nf4", adapted=NAMES, dtype=torch.float32, device="cpu", impl="auto") -> Bordered:
    """Layer 0's bordered matrix of qkv; without adapters it has no border."""
    device = torch.device(device)
    rank = RANK if adapted else 0
    return Bordered(linear(precision, dtype, device), 0, adapted, rank, SCALE, Loose(device), impl)


def lent(one: Bordered, dtype: torch.dtype) -> torch.Tensor:
    """Memory full of nan."""
    shape = (one.out + one.rank, one.inn + one.rank)
    return torch.full(shape, torch.nan, dtype=dtype, device=one.linear.device)


def dense_adapters(one: Bordered) -> tuple[torch.Tensor, torch.Tensor]:
    """A (U, I) and block-diagonal B (O, U)."""
    b = torch.zeros(one.out, one.used, device=one.linear.device)
    for block in one.blocks:
        rows, rank = block.weight.shape
        b[block.start : block.start + rows, block.rank_at : block.rank_at + rank] = block.weight
    return one.a, b


@pytest.mark.parametrize("adapted", [NAMES, ("k_proj",), ("q_proj", "v_proj"), ()])
@pytest.mark.parametrize("precision", ["nf4", "mixed", "dense"])
def test_a_lent_matrix_holds_base_and_adapters(precision, adapted) -> None:
    """Every element is written: W, sA, B and zeros."""
    one = bordered(precision, adapted)
    expected = torch.zeros(one.out + one.rank, one.inn + one.rank)
    expected[: one.out, : one.inn] = one.linear.dense()
    if adapted:
        a, b = dense_adapters(one)
        expected[one.out : one.out + one.used, : one.inn] = a * SCALE
        expected[: one.out, one.inn : one.inn + one.used] = b
    assert torch.equal(one.write(lent(one, torch.float32)), expected)


@pytest.mark.parametrize("precision", ["nf4", "dense"])
def test_a_kept_matrix_follows_the_masters(precision) -> None:
    """Kept equals lent; new masters arrive by ``write_adapter``; a dense base moves in and out unchanged."""
    one, other = bordered(precision), bordered(precision)
    before = one.linear.dense().clone()
    one.keep_matrix()
    assert torch.equal(one.kept, other.write(lent(other, torch.float32)))
    for masters in (one, other):
        masters.a.mul_(2)
        masters.blocks[1].weight.neg_()
    one.write_adapter(one.kept)
    assert torch.equal(one.kept, other.write(lent(other, torch.float32)))
    assert torch.equal(one.linear.dense(), before)
    one.drop_matrix()
    assert one.kept is None and torch.equal(one.linear.dense(), before)


@pytest.mark.parametrize("adapted", [NAMES, ("v_proj",)])
def test_products_are_those_of_lora(adapted) -> None:
    """y, dx, dA and dB equal autograd's of x W^T + s x A^T B^T."""
    one = bordered(adapted=adapted)
    matrix = one.write(lent(one, torch.float32))
    tokens = 5
    x, dy = torch.randn(tokens, one.inn), torch.randn(tokens, one.out)
    a, b = (tensor.clone().requires_grad_() for tensor in dense_adapters(one))
    leaf = x.clone().requires_grad_()
    y = leaf @ one.linear.dense().T + SCALE * (leaf @ a.T) @ b.T
    y.backward(dy)
    wide = torch.cat((x, torch.full((tokens, RANK), torch.nan)), dim=1)
    one.extend(wide, matrix)
    out = torch.empty(tokens, one.out)
    one.forward(wide, matrix, out)
    torch.testing.assert_close(out, y.detach())
    wide_dy = torch.cat((dy, torch.full((tokens, RANK), torch.nan)), dim=1)
    one.extend_gradient(wide_dy, matrix)
    dx = torch.empty(tokens, one.inn)
    one.input_gradient(wide_dy, matrix, dx)
    torch.testing.assert_close(dx, leaf.grad)
    one.a_gradients(wide_dy, x)
    one.b_gradients(wide_dy, wide[:, one.inn :])
    torch.testing.assert_close(one.a_gradient, a.grad)
    for block in one.blocks:
        rows, rank = block.weight.shape
        expected = b.grad[block.start : block.start + rows, block.rank_at : block.rank_at + rank]
        torch.testing.assert_close(block.gradient, expected)


@needs_triton
@pytest.mark.parametrize("precision", ["nf4", "mixed", "dense"])
def test_the_kernel_writes_the_same_bits(precision) -> None:
    """Lent, kept and refreshed matrices are those of plain PyTorch, with one launch where all parts are NF4."""
    dtype = torch.float16
    kernel = bordered(precision, dtype=dtype, device=DEVICE, impl="triton")
    plain = bordered(precision, dtype=dtype, device=DEVICE, impl="torch")
    assert torch.equal(kernel.write(lent(kernel, dtype)), plain.write(lent(plain, dtype)))
    assert kernel._launch is not None and kernel._launch.base == (precision == "nf4") and plain._launch is None
    kernel.keep_matrix()
    kernel.a.mul_(2)
    plain.a.mul_(2)
    kernel.write_adapter(kernel.kept)
    assert torch.equal(kernel.kept, plain.write(lent(plain, dtype)))


@needs_triton
def test_nf4_parts_stay_where_they_are() -> None:
    """Writing neither copies nor changes the parts, which others read as well."""
    one = bordered(dtype=torch.float16, device=DEVICE, impl="triton")
    before = [(part.packed.data_ptr(), dequantize_nf4(part, torch.float16, impl="torch")) for part in one.linear.parts]
    one.write(lent(one, torch.float16))
    for part, (address, values) in zip(one.linear.parts, before, strict=True):
        assert part.packed.data_ptr() == address
        assert torch.equal(dequantize_nf4(part, torch.float16, impl="torch"), values)
