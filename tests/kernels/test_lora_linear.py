"""A frozen matrix with adapters against float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.lora_linear import lora_linear
from helpers_numeric import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.75
# tokens, input width, widths of the output blocks, adapted blocks, rank of each
CASES = {
    "one block": (7, 33, (20,), (0,), (4,)),
    "one token": (1, 16, (8, 4, 4), (0, 1, 2), (2, 2, 2)),
    "q, k and v": (65, 48, (48, 16, 16), (0, 1, 2), (8, 8, 8)),
    "k alone": (9, 24, (24, 7, 7), (1,), (3,)),
    "q and v, ranks differ": (9, 24, (24, 7, 7), (0, 2), (5, 1)),
    "no adapter": (5, 12, (6, 3), (), ()),
}


def make(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[int], Tensor]:
    """x, weight, bias, a, bs, first column of each adapted block, gradient of the output."""
    tokens, width, blocks, adapted, ranks = CASES[case]
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) / max(shape[-1], 1) ** 0.5).to(dtype)

    starts = [sum(blocks[:i]) for i in adapted]
    bs = [normal(blocks[i], r) for i, r in zip(adapted, ranks, strict=True)]
    x, dy = normal(tokens, width) * width**0.5, normal(tokens, sum(blocks))
    return x, normal(sum(blocks), width), normal(sum(blocks)), normal(sum(ranks), width), bs, starts, dy


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, bs: Sequence[Tensor], starts: list[int]) -> Tensor:
    """``x W^T + b + s (x A_i^T) B_i^T`` block by block."""
    weight = weight.to(x.dtype)
    y = x @ weight.T + (0 if bias is None else bias.to(x.dtype))
    at = 0
    for b, start in zip(bs, starts, strict=True):
        part = SCALE * ((x @ a[at : at + b.shape[1]].T) @ b.T)
        left, right = start, y.shape[1] - start - b.shape[0]
        y = y + torch.nn.functional.pad(part, (left, right))
        at += b.shape[1]
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str, with_bias: bool, dtype: torch.dtype) -> None:
    """Output and the gradients of x, A and every B are as exact as the plain form's; the base gets none."""
    x, weight, bias, a, bs, starts, dy = make(case, dtype)
    weight.requires_grad_()
    used = bias.requires_grad_() if with_bias else None
    inputs = [x, a, *bs] if bs else [x]

    def ours(x: Tensor, *rest: Tensor) -> Tensor:
        return lora_linear(x, lambda: weight, used, *((rest[0], rest[1:]) if bs else (a, ())), starts, SCALE)

    def theirs(x: Tensor, *rest: Tensor) -> Tensor:
        b = None if used is None else used.detach()
        return plain(x, weight.detach(), b, *((rest[0], rest[1:]) if bs else (a, ())), starts)

    assert_matches(ours, theirs, inputs, dy)
    assert weight.grad is None and bias.grad is None


@pytest.mark.parametrize("learns", ["a and bs", "bs", "x"])
def test_gradients_of_a_part(learns: str) -> None:
    """Whichever of x, A and the Bs want a gradient get the full one, the first layer's x without one included."""
    x, weight, bias, a, bs, starts, dy = make("q, k and v", torch.float32)
    wanted = {"x": [x], "a and bs": [a, *bs], "bs": bs}[learns]
    for tensor in (x, a, *bs):
        tensor.requires_grad_()
    lora_linear(x, lambda: weight, bias, a, bs, starts, SCALE).backward(dy)
    full = [t.grad.clone() for t in wanted]
    for tensor in (x, a, *bs):
        tensor.grad = None
        tensor.requires_grad_(any(tensor is t for t in wanted))
    lora_linear(x, lambda: weight, bias, a, bs, starts, SCALE).backward(dy)
    assert all(torch.equal(t.grad, f) for t, f in zip(wanted, full, strict=True))
    assert all(t.grad is None for t in (x, a, *bs) if not t.requires_grad)


def test_strided_inputs() -> None:
    """Views of x and of the output's gradient give what copies give."""
    x, weight, bias, a, bs, starts, dy = make("q and v, ranks differ", torch.float32)
    view = torch.stack([x, -x], 1)[:, 0]
    slope = torch.cat([dy, dy], 1)[:, : dy.shape[1]]
    assert not view.is_contiguous() and not slope.is_contiguous()
    assert_matches(
        lambda x, a, *bs: lora_linear(x, lambda: weight, bias, a, bs, starts, SCALE),
        lambda x, a, *bs: plain(x, weight, bias, a, bs, starts),
        [view, a, *bs],
        slope,
    )


def test_the_dense_weight_is_asked_for_and_not_kept() -> None:
    """A quantised base is decoded once forward and once backward; nothing of its shape is saved between."""
    x, weight, bias, a, bs, starts, dy = make("k alone", torch.float32)
    calls: list[int] = []
    saved: list[Tensor] = []

    def dense() -> Tensor:
        calls.append(1)
        return weight.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x.requires_grad_(), dense, bias, a.requires_grad_(), bs, starts, SCALE)
    assert len(calls) == 1
    assert tuple(weight.shape) not in {tuple(t.shape) for t in saved}
    y.backward(dy)
    assert len(calls) == 2


def test_without_gradient_the_output_is_the_same() -> None:
    """Answering computes the bits that training computes."""
    x, weight, bias, a, bs, starts, _ = make("q, k and v", torch.float32)
    with torch.no_grad():
        alone = lora_linear(x, lambda: weight, bias, a, bs, starts, SCALE)
    assert torch.equal(alone, lora_linear(x.requires_grad_(), lambda: weight, bias, a, bs, starts, SCALE))


def test_refuses_what_does_not_fit() -> None:
    """Ranks that do not add up, another input width and a missing block are refused with the shapes."""
    x, weight, bias, a, bs, starts, _ = make("q, k and v", torch.float32)
    for wrong in ((a[:-1], bs, starts), (a[:, :-1], bs, starts), (a, bs, starts[:-1]), (a, bs[:-1], starts[:-1])):
        with pytest.raises(KernelInputError, match=r"lora_linear: x \(65, 48\).*do not fit"):
            lora_linear(x, lambda: weight, bias, *wrong, SCALE)
