"""The thin NF4 product: the reference against float64, and what both ways to compute refuse."""

from dataclasses import dataclass

import pytest
import torch

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.nf4 import NF4_CODE, NF4Weight, dequantize_nf4, quantize_nf4
from deepdoctor.kernels.nf4_thin import THIN_RANK, THIN_ROWS, ThinLinear, thin_lora
from helpers_numeric import assert_no_less_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POISON = 7.0


@dataclass(frozen=True)
class Case:
    """sizes: rows of the parts; inn: columns; rows: of x; rank: of the adapter; bias, gap: between the rows of x."""

    sizes: tuple[int, ...]
    inn: int
    rows: int
    rank: int = 0
    bias: bool = False
    gap: int = 0


# One to three parts, odd heights, less than a tile, one span of columns, odd counts of spans, all batch tiles.
CASES = (
    Case((32,), 256, 1),
    Case((45, 19, 33), 768, 3, 48, True),
    Case((70, 7), 1280, 17, 16, False, 16),
    Case((40, 12, 12), 512, 32, 5, True, 3),
    Case((1,), 256, 2, 64),
)

LAYER_8B = (
    ((4096, 1024, 1024), 4096, 48),
    ((4096,), 4096, 16),
    ((14336, 14336), 4096, 32),
    ((4096,), 14336, 16),
)
"""Rows of the parts, columns and ranks of the four matrices of an 8B model's layer."""


@dataclass
class Problem:
    """Inputs of one case."""

    parts: list[NF4Weight]
    x: torch.Tensor
    bias: torch.Tensor | None
    lora: torch.Tensor | None
    a: torch.Tensor | None
    mask: torch.Tensor


def draw(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Problem:
    """Parts whose scales all differ, and an adapter that every other row of x has."""
    generator = torch.Generator().manual_seed(sum(case.sizes) + case.inn)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    parts = []
    for number, size in enumerate(case.sizes):
        rows = normal(size, case.inn) * (0.2 + torch.rand(size, 1, generator=generator)) * (number + 1)
        parts.append(quantize_nf4(rows.to(device), impl="torch"))
    out = sum(case.sizes)
    wide = normal(case.rows, case.inn + case.gap).to(device, dtype)
    mask = (torch.arange(case.rows) % 2 == 0).to(dtype)[:, None]
    return Problem(
        parts,
        wide[:, : case.inn],
        normal(out).to(device, dtype) if case.bias else None,
        normal(out, case.rank).to(device, dtype) if case.rank else None,
        (normal(case.rank, case.inn) * 0.1).to(device, dtype) if case.rank else None,
        mask.to(device),
    )


def truth(problem: Problem, u: torch.Tensor | None) -> torch.Tensor:
    """y in float64, of the weights that the quantised ones stand for."""
    weight = torch.cat([dequantize_nf4(part, torch.float32, impl="torch") for part in problem.parts]).double()
    y = problem.x.double() @ weight.T
    if problem.bias is not None:
        y += problem.bias.double()
    if u is not None:
        assert problem.lora is not None
        y += u.double() @ problem.lora.double().T
    return y


def plain(problem: Problem, dtype: torch.dtype, u: torch.Tensor | None) -> torch.Tensor:
    """y as dequantising and dense products in dtype give it."""
    weight = torch.cat([dequantize_nf4(part, dtype, impl="torch") for part in problem.parts])
    y = torch.nn.functional.linear(problem.x, weight, problem.bias)
    return y if u is None else y + u @ problem.lora.T


def check(case: Case, dtype: torch.dtype, device: torch.device | str, **options: object) -> None:
    """y with the adapter and without, u with its mask and without, into rows of a wider matrix left alone between."""
    problem = draw(case, dtype, device)
    impl = options["impl"]
    linear = ThinLinear(problem.parts, dtype, bias=problem.bias, lora=problem.lora, **options)
    wide = torch.full((case.rows, linear.out_features + 3), POISON, dtype=dtype, device=device)
    us: list[torch.Tensor | None] = [None]
    if problem.a is not None:
        for mask in (None, problem.mask):
            exact = problem.x.double() @ problem.a.double().T
            simple = problem.x @ problem.a.T
            if mask is not None:
                exact, simple = exact * mask.double(), simple * mask
            u = thin_lora(problem.x, problem.a, torch.full_like(simple, torch.nan), mask, impl=impl)
            assert_no_less_accurate(u, simple, exact)
            us.append(u)
        assert torch.count_nonzero(us[-1][1::2]) == 0
    scratch = torch.full((linear.scratch_elements(case.rows),), torch.nan, device=device)
    for u in us:
        wide.fill_(POISON)
        y = linear(problem.x, wide[:, :-3], u, scratch)
        assert y.data_ptr() == wide.data_ptr() and (wide[:, -3:] == POISON).all()
        assert_no_less_accurate(y, plain(problem, dtype, u), truth(problem, u))
        again = linear(problem.x, torch.empty_like(wide)[:, :-3], u)
        assert torch.equal(again, y)
    if problem.a is not None:
        # A row whose adapter is off gets the base's bits.
        assert torch.equal(y[1::2], linear(problem.x, torch.empty_like(y))[1::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case: Case, dtype: torch.dtype) -> None:
    """The PyTorch form, for every case and dtype."""
    check(case, dtype, "cpu", impl="auto")


@pytest.mark.parametrize(
    ("dtype", "rounded_weights", "rounded_codes"), [(torch.bfloat16, 165e-5, 138e-5), (torch.float16, 208e-6, 185e-6)]
)
def test_rounding_the_codes_loses_less(dtype: torch.dtype, rounded_weights: float, rounded_codes: float) -> None:
    """What the kernel multiplies, scale times rounded code, is nearer to the weights than their rounded product."""
    part = quantize_nf4(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)))
    exact = dequantize_nf4(part, torch.float32).double()
    scale = exact.view(-1, 64).abs().amax(1, keepdim=True)
    codes = NF4_CODE.double()
    number = (exact.view(-1, 64, 1) / scale[:, :, None] - codes).abs().argmin(-1)
    by_code = (scale * NF4_CODE.to(dtype).double()[number]).view_as(exact)
    by_product = dequantize_nf4(part, dtype).double()
    errors = [((w - exact).square().mean() / exact.square().mean()).sqrt() for w in (by_product, by_code)]
    assert errors[0] == pytest.approx(rounded_weights, rel=0.05) and errors[1] == pytest.approx(rounded_codes, rel=0.05)


def test_parts_in_other_blocks() -> None:
    """Blocks of 128, single scales and a width that no block divides are read too."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 40, generator=generator)
    parts = [quantize_nf4(w, 128), quantize_nf4(w, 64, double_quant=False)]
    x = torch.randn(3, 40, generator=generator)
    y = ThinLinear(parts, torch.float32)(x, torch.empty(3, 10))
    dense = torch.cat([dequantize_nf4(part, torch.float32) for part in parts])
    assert_no_less_accurate(y, x @ dense.T, x.double() @ dense.double().T)


def test_refusals_when_prepared() -> None:
    """What does not fit the matrix is named before the first call."""
    part = quantize_nf4(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    other = quantize_nf4(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)))
    for parts in ([], [part, other]):
        with pytest.raises(KernelInputError, match="parts"):
            ThinLinear(parts, torch.float32)
    with pytest.raises(KernelInputError, match="dtype"):
        ThinLinear([part], torch.float64)
    for bias in (torch.zeros(7), torch.zeros(8, dtype=torch.float16), torch.zeros(16)[::2]):
        with pytest.raises(KernelInputError, match="bias"):
            ThinLinear([part], torch.float32, bias=bias)
    for lora in (torch.zeros(7, 4), torch.zeros(8, THIN_RANK + 1), torch.zeros(4, 8).T):
        with pytest.raises(KernelInputError, match="lora"):
            ThinLinear([part], torch.float32, lora=lora)


def test_refusals_of_calls() -> None:
    """Arguments of another shape, dtype or layout are named."""
    part = quantize_nf4(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    linear = ThinLinear([part], torch.float32, lora=torch.zeros(8, 4))
    x, out, u = torch.zeros(3, 64), torch.zeros(3, 8), torch.zeros(3, 4)
    with pytest.raises(KernelInputError, match="x is"):
        linear(x[:, :63], out)
    with pytest.raises(KernelInputError, match="x is"):
        linear(torch.zeros(THIN_ROWS + 1, 64), torch.zeros(THIN_ROWS + 1, 8))
    with pytest.raises(KernelInputError, match="x is"):
        linear(x.half(), out.half())
    with pytest.raises(KernelInputError, match="out"):
        linear(x, out[:2])
    with pytest.raises(KernelInputError, match="u is"):
        linear(x, out, u[:2])
    with pytest.raises(KernelInputError, match="u is given"):
        ThinLinear([part], torch.float32)(x, out, u)
    a = torch.zeros(4, 64)
    for arguments, name in (
        ((x, a[:, :32], u, None), "a is"),
        ((x, a, u[:2], None), "out"),
        ((x, a, u, torch.zeros(3)), "mask"),
        ((x, torch.zeros(65, 64), torch.zeros(3, 65), None), "65"),
    ):
        with pytest.raises(KernelInputError, match=name):
            thin_lora(*arguments)
