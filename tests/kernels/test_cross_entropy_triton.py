"""The Triton cross-entropy against its PyTorch form and float64."""

import pytest
import torch
from torch import Tensor

from deepdoctor.kernels.linear_cross_entropy import (
    cross_entropy_,
    linear_cross_entropy,
    linear_cross_entropy_backward_chunks,
    linear_cross_entropy_by_vocabulary,
)
from helpers_numeric import assert_no_less_accurate, run_with_gradients
from helpers_triton import DEVICE, needs_triton

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Blocks hold 4,096 fp32 or 8,192 16-bit logits: less than one, one, one and a bit, several; odd rows are unaligned.
VOCABULARIES = [1, 2, 97, 4096, 8192, 8200, 20_011]


def make(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with a spread of 4, and labels that include the first and last word."""
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=draw) * 4).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=draw)
    labels[0], labels[-1] = 0, vocab - 1
    return logits.to(DEVICE), labels.to(DEVICE)


def exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and softmax - onehot in float64."""
    wide = logits.double()
    losses = torch.logsumexp(wide, 1) - wide.gather(1, labels[:, None])[:, 0]
    return losses, wide.softmax(1).scatter_add(1, labels[:, None], -torch.ones_like(losses)[:, None])


def run(logits: Tensor, labels: Tensor, impl: str, want_grad: bool = True) -> tuple[Tensor, Tensor]:
    """Losses and the overwritten copy of logits."""
    losses = torch.full(labels.shape, torch.nan, dtype=torch.float32, device=logits.device)
    mine = logits.clone()
    assert cross_entropy_(mine, labels, losses, want_grad=want_grad, impl=impl) is mine
    return losses, mine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_losses_and_gradient(vocab: int, dtype: torch.dtype) -> None:
    """Losses and gradient are as exact as PyTorch's; without gradient the losses have the same bits, logits stay."""
    logits, labels = make(3, vocab, dtype)
    ours, reference, truth = run(logits, labels, "triton"), run(logits, labels, "torch"), exact(logits, labels)
    for mine, theirs, best in zip(ours, reference, truth, strict=True):
        assert_no_less_accurate(mine, theirs, best)
    losses, kept = run(logits, labels, "triton", want_grad=False)
    assert torch.equal(losses, ours[0]) and torch.equal(kept, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Logits of +-20,000 and -inf, also a whole first block of -inf, give no nan."""
    logits = torch.full((4, 10_000), -torch.inf, dtype=dtype)
    logits[0, :3] = torch.tensor([20000.0, -20000.0, 0.0])
    logits[1, 9998:] = torch.tensor([20000.0, -20000.0])
    logits[2, :] = -20000.0
    logits[3, 9999] = 1.0
    labels = torch.tensor([0, 9999, 5, 9999])
    losses, grad = run(logits.to(DEVICE), labels.to(DEVICE), "triton")
    big = float(torch.tensor(20000.0, dtype=dtype))
    wanted = torch.tensor([0.0, 2 * big, 9.21034, 0.0])
    torch.testing.assert_close(losses.cpu(), wanted, atol=2e-3, rtol=0)
    assert torch.isfinite(grad).all()
    assert grad[0, 0] == 0 and grad[1, 9998] == 1 and grad[1, 9999] == -1 and not grad[3].any()


def test_a_label_outside_gives_nan() -> None:
    """A label outside the vocabulary reads nothing beyond its row; its loss is nan and the other rows are right."""
    from deepdoctor.kernels import cross_entropy_triton

    logits, labels = make(4, 130, torch.float32)
    wanted, _ = run(logits, labels, "triton")
    for wrong in (-100, 130, 2**40):
        changed = labels.clone()
        changed[1] = wrong
        losses = torch.empty(4, device=DEVICE)
        cross_entropy_triton.cross_entropy_(logits.clone(), changed, losses, True)
        assert losses[1].isnan() and torch.equal(losses[[0, 2, 3]], wanted[[0, 2, 3]])


def test_no_row() -> None:
    """No row launches nothing."""
    logits = torch.empty(0, 50, device=DEVICE)
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    losses, grad = run(logits, labels, "triton")
    assert losses.shape == (0,) and grad.shape == (0, 50)


def problem(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device = DEVICE
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels."""
    draw = torch.Generator().manual_seed(1)
    h = torch.randn(tokens, width, generator=draw).to(dtype)
    weight = (torch.randn(vocab, width, generator=draw) * 2 / width**0.5).to(dtype)
    return h.to(device), weight.to(device), torch.randint(vocab, (tokens,), generator=draw).to(device)


def exact_linear(h: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Losses and scale * d(sum of losses)/dh in float64."""
    losses, p = exact(h.double() @ weight.double().T, labels)
    return losses, scale * (p @ weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_parts(dtype: torch.dtype) -> None:
    """Chunks of tokens and parts of the vocabulary are as exact as the PyTorch form; their losses agree."""
    h, weight, labels = problem(7, 24, 211, dtype)
    scale = 0.125
    truth = exact_linear(h, weight, labels, scale)
    parts = [lambda part=part: part for part in weight.split([100, 1, 64, 46])]
    losses = []
    for impl in ("triton", "torch"):
        chunked = linear_cross_entropy_backward_chunks(h, weight, labels, scale=scale, chunk_tokens=3, impl=impl)
        parted = linear_cross_entropy_by_vocabulary(h, parts, labels, scale=scale, impl=impl)
        losses.append((*chunked, *parted))
        only = linear_cross_entropy_by_vocabulary(h, parts, labels, scale=None, impl=impl)
        assert only[1] is None and torch.equal(only[0], parted[0])
    for ours, reference, best in zip(losses[0], losses[1], truth * 2, strict=True):
        assert ours is not None and reference is not None
        assert_no_less_accurate(ours, reference, best)
    if dtype == torch.float32:  # in 16 bits a product of other size may round a logit the other way
        torch.testing.assert_close(losses[0][2], losses[0][0], atol=2e-6, rtol=2e-6)


def test_autograd_op() -> None:
    """`linear_cross_entropy` with impl "triton" gives loss and gradient as exact as its PyTorch form."""
    h, weight, labels = problem(5, 24, 211, torch.float32)
    d_losses = torch.rand(5, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ours, reference = (
        run_with_gradients(lambda x, i=impl: linear_cross_entropy(x, weight, labels, impl=i), [h], d_losses)
        for impl in ("triton", "torch")
    )
    losses, dh = exact_linear(h, weight, labels, 1.0)
    for mine, theirs, best in zip(ours, reference, (losses, dh * d_losses[:, None].double()), strict=True):
        assert_no_less_accurate(mine, theirs, best)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [49_152, 128_256, 151_936, 262_144])
def test_real_vocabularies(vocab: int, dtype: torch.dtype) -> None:
    """A chunk of 300 rows of the vocabularies of SmolLM, Llama, Qwen and Gemma."""
    logits, labels = make(300, vocab, dtype)
    ours, reference, truth = run(logits, labels, "triton"), run(logits, labels, "torch"), exact(logits, labels)
    for mine, theirs, best in zip(ours, reference, truth, strict=True):
        assert_no_less_accurate(mine, theirs, best)
    assert torch.equal(run(logits, labels, "triton")[1], ours[1])


@pytest.mark.gpu
def test_beyond_int32_elements() -> None:
    """Row offsets beyond 2**31 elements are right."""
    vocab, rows = 262_144, 8200
    if torch.cuda.get_device_properties(0).total_memory < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    logits = torch.zeros(rows, vocab, dtype=torch.float16, device=DEVICE)
    logits[-1, 77] = 8.0
    labels = torch.full((rows,), 77, device=DEVICE)
    losses = torch.empty(rows, device=DEVICE)
    cross_entropy_(logits, labels, losses, impl="triton")
    flat = torch.log(torch.tensor(float(vocab)))
    torch.testing.assert_close(losses[:-1].cpu(), flat.expand(rows - 1), atol=1e-4, rtol=0)
    peak = torch.logsumexp(torch.cat([torch.zeros(vocab - 1), torch.tensor([8.0])]).double(), 0) - 8.0
    torch.testing.assert_close(losses[-1].cpu().double(), peak, atol=1e-4, rtol=0)
    assert abs(float(logits[-1, 77]) - (torch.exp(-peak).item() - 1.0)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_on_the_gpu(dtype: torch.dtype) -> None:
    """The product's fp32 output, the scaled product and both cuts, at the width and head of a 1B Llama."""
    h, weight, labels = problem(700, 2048, 128_256, dtype)
    scale = 1 / 700
    truth = exact_linear(h, weight, labels, scale)
    out = torch.full((700, 2048 + 64), torch.nan, dtype=dtype, device=DEVICE)
    losses, dh = linear_cross_entropy_backward_chunks(
        h, weight, labels, scale=scale, chunk_tokens=256, out_dh=out[:, 64:], impl="triton"
    )
    assert dh is not None and dh.data_ptr() == out[:, 64:].data_ptr() and out[:, :64].isnan().all()
    plain = linear_cross_entropy_backward_chunks(h, weight, labels, scale=scale, chunk_tokens=256, impl="torch")
    parts = [lambda part=part: part for part in weight.split(30_000)]
    parted = linear_cross_entropy_by_vocabulary(h, parts, labels, scale=scale, impl="triton")
    for ours in ((losses, dh), parted):
        for mine, theirs, best in zip(ours, plain, truth, strict=True):
            assert mine is not None and theirs is not None
            assert_no_less_accurate(mine, theirs, best)
    if dtype == torch.float32:
        torch.testing.assert_close(parted[0], losses, atol=1e-5, rtol=1e-5)
    assert torch.equal(linear_cross_entropy(h, weight, labels), losses)


@pytest.mark.gpu
def test_near_memory_speed() -> None:
    """Two reads and one write of 2,048 rows of 128,256 logits take at most twice their time at 2.5 TB/s on an H100."""
    if "H100" not in torch.cuda.get_device_name():
        pytest.skip("the bound is that of an H100")
    logits, labels = make(2048, 128_256, torch.bfloat16)
    losses = torch.empty(2048, device=DEVICE)
    cross_entropy_(logits, labels, losses)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        cross_entropy_(logits, labels, losses)
    end.record()
    torch.cuda.synchronize()
    milliseconds = start.elapsed_time(end) / 10
    floor = 3 * logits.nbytes / 2.5e9
    print(f"cross_entropy_: {milliseconds:.3f} ms, {3 * logits.nbytes / milliseconds / 1e9:.2f} TB/s")
    assert milliseconds < 2 * floor
