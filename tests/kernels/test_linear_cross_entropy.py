"""Loss from hidden states against float64 logits that are kept."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels import linear_cross_entropy as module
from deepdoctor.kernels.linear_cross_entropy import (
    CHUNK_TOKENS,
    cross_entropy_,
    linear_cross_entropy,
    linear_cross_entropy_backward_chunks,
    linear_cross_entropy_by_vocabulary,
)
from helpers_numeric import assert_matches, assert_no_less_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, labels and the gradient of each token's loss."""
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, width, generator=draw).to(dtype)
    weight = (torch.randn(vocab, width, generator=draw) * 2 / width**0.5).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=draw)
    return h, weight, labels, torch.rand(tokens, generator=draw) / max(tokens, 1)


def plain(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the whole logits, in fp32 at least."""
    logits = h @ weight.to(h.dtype).T
    return functional.cross_entropy(logits if h.dtype == torch.float64 else logits.float(), labels, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "vocab"), [(1, 1, 2), (1, 24, 97), (5, 33, 130), (2 * CHUNK_TOKENS + 3, 16, 50)]
)
def test_loss_and_gradient(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> None:
    """Losses (fp32) and the hidden states' gradient are as exact as kept logits give, over one chunk and several."""
    h, weight, labels, d_losses = make(tokens, width, vocab, dtype)
    ours = linear_cross_entropy(h, weight, labels)
    assert ours.dtype == torch.float32 and ours.shape == (tokens,)
    assert_matches(lambda h: linear_cross_entropy(h, weight, labels), lambda h: plain(h, weight, labels), [h], d_losses)


def test_without_gradient_the_losses_are_the_same() -> None:
    """The path that makes no gradient gives the same bits, under no_grad and for frozen states."""
    h, weight, labels, _ = make(300, 16, 50, torch.float32)
    wanted = linear_cross_entropy(h.clone().requires_grad_(), weight, labels)
    assert wanted.requires_grad
    assert torch.equal(linear_cross_entropy(h, weight, labels), wanted)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(h.clone().requires_grad_(), weight, labels), wanted)


def test_no_label_at_all() -> None:
    """No token gives an empty tensor whose sum has a zero gradient, not an error."""
    h = torch.empty(0, 8, requires_grad=True)
    losses = linear_cross_entropy(h, torch.randn(11, 8), torch.empty(0, dtype=torch.int64))
    assert losses.shape == (0,) and losses.dtype == torch.float32
    losses.sum().backward()
    assert h.grad is not None and h.grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Logits of +-20,000 neither overflow nor give nan: a sure right answer costs nothing, a sure wrong one the gap."""
    h = torch.tensor([[100.0], [100.0], [-100.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[200.0], [-200.0], [0.0]], dtype=dtype)
    losses = linear_cross_entropy(h, weight, torch.tensor([0, 1, 1]))
    wanted = [0.0, 2 * float(torch.tensor(20000.0, dtype=dtype)), 0.0]
    assert losses.tolist() == wanted
    losses.sum().backward()
    assert h.grad is not None and h.grad[:, 0].tolist() == [0.0, 400.0, 0.0]


def test_strided_input() -> None:
    """Every second token of a wider tensor gives what a copy gives, gradient included."""
    h, weight, labels, d_losses = make(20, 16, 30, torch.float32)
    for view in (h[::2], torch.cat([h, h], 1)[:10, 5:21], h[:16, :10].T[:, :16]):
        assert not view.is_contiguous()
        marks, weights = labels[: len(view)], weight[:, : view.shape[1]]
        assert torch.allclose(
            linear_cross_entropy(view, weights, marks), linear_cross_entropy(view.contiguous(), weights, marks)
        )
        assert_matches(
            lambda h, w=weights, m=marks: linear_cross_entropy(h, w, m),
            lambda h, w=weights, m=marks: plain(h, w, m),
            [view],
            d_losses[: len(view)],
        )


def test_logits_are_not_kept() -> None:
    """What stays for backward is one (T, D) gradient."""
    h, weight, labels, _ = make(600, 8, 1000, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(h.requires_grad_(), weight, labels)
    assert [tuple(t.shape) for t in saved] == [(600, 8)]


def test_refuses_what_does_not_fit() -> None:
    """Shapes, dtypes and labels outside the vocabulary are named; -100 is the caller's to leave out."""
    h, weight, labels = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(KernelInputError, match=r"weight \(7, 5\).*expected \(T, D\), \(V, D\), \(T,\)"):
        linear_cross_entropy(h, torch.zeros(7, 5), labels)
    with pytest.raises(KernelInputError, match=r"labels \(2,\)"):
        linear_cross_entropy(h, weight, labels[:2])
    with pytest.raises(KernelInputError, match=r"weight torch\.bfloat16"):
        linear_cross_entropy(h, weight.bfloat16(), labels)
    with pytest.raises(KernelInputError, match=r"labels torch\.int32"):
        linear_cross_entropy(h, weight, labels.int())
    for wrong in (-100, 7):
        with pytest.raises(KernelInputError, match=rf"a label is {wrong}; expected 0 to 6"):
            linear_cross_entropy(h, weight, torch.tensor([0, wrong, 1]))


def exact(h: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of scale times their sum, in float64."""
    return rounded(h.double(), weight, labels, scale)


def rounded(h: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same through PyTorch's own cross-entropy on kept logits of h's dtype."""
    leaf = h.detach().requires_grad_()
    losses = plain(leaf, weight, labels)
    (dh,) = torch.autograd.grad((losses * scale).sum(), leaf)
    return losses.detach(), dh


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_backward_chunks(chunk_tokens: int, dtype: torch.dtype) -> None:
    """Losses and scaled gradient for any chunk, into a row view over nan, or over h itself."""
    h, weight, labels, _ = make(11, 24, 97, dtype)
    out = torch.full((11, 40), torch.nan, dtype=dtype)
    losses, dh = linear_cross_entropy_backward_chunks(
        h, weight, labels, scale=0.125, chunk_tokens=chunk_tokens, out_dh=out[:, 8:32]
    )
    assert dh is not None and dh.data_ptr() == out[:, 8:32].data_ptr()
    assert out[:, :8].isnan().all() and out[:, 32:].isnan().all()
    for ours, reference, truth in zip(
        (losses, dh), rounded(h, weight, labels, 0.125), exact(h, weight, labels, 0.125), strict=True
    ):
        assert_no_less_accurate(ours, reference, truth)
    over = h.clone()
    again, same = linear_cross_entropy_backward_chunks(
        over, weight, labels, scale=0.125, chunk_tokens=chunk_tokens, out_dh=over
    )
    assert same is not None and same.data_ptr() == over.data_ptr()
    assert torch.equal(over, dh) and torch.equal(again, losses)
    only, none = linear_cross_entropy_backward_chunks(h, weight, labels, scale=None, chunk_tokens=chunk_tokens)
    assert none is None and torch.equal(only, losses)


def test_backward_chunks_give_the_bits_of_the_autograd_op() -> None:
    """With scale 1 and the same chunks both ways give the same losses and gradient."""
    h, weight, labels, _ = make(300, 16, 50, torch.float32)
    leaf = h.clone().requires_grad_()
    wanted = linear_cross_entropy(leaf, weight, labels)
    wanted.sum().backward()
    losses, dh = linear_cross_entropy_backward_chunks(h, weight, labels, scale=1.0)
    assert torch.equal(losses, wanted) and dh is not None and leaf.grad is not None and torch.equal(dh, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[97], [1, 96], [50, 40, 7]])
def test_by_vocabulary(sizes: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the head, of any size, give the losses and gradient of the whole head; each is made twice."""
    monkeypatch.setattr(module, "PART_LOGITS", 250)  # several steps of tokens for each part
    h, weight, labels, _ = make(11, 24, 97, dtype)
    labels[:3] = torch.tensor([0, 96, sizes[0] - 1])
    asked: list[int] = []

    def part(number: int) -> Tensor:
        asked.append(number)
        return weight.split(sizes)[number]

    parts = [lambda number=number: part(number) for number in range(len(sizes))]
    losses, dh = linear_cross_entropy_by_vocabulary(h, parts, labels, scale=0.125)
    assert asked == [*range(len(sizes))] * 2
    assert dh is not None and dh.dtype == dtype
    for ours, reference, truth in zip(
        (losses, dh), rounded(h, weight, labels, 0.125), exact(h, weight, labels, 0.125), strict=True
    ):
        assert_no_less_accurate(ours, reference, truth)
    whole, _ = linear_cross_entropy_backward_chunks(h, weight, labels, scale=None)
    if dtype == torch.float32:  # in 16 bits a product of other size may round a logit the other way
        torch.testing.assert_close(losses, whole, atol=1e-6, rtol=1e-6)
    only, none = linear_cross_entropy_by_vocabulary(h, parts, labels, scale=None)
    assert none is None and torch.equal(only, losses) and len(asked) == 3 * len(sizes)


def test_no_token_in_the_functional_forms() -> None:
    """No token gives empty losses and an empty gradient."""
    h, weight, labels, _ = make(0, 8, 11, torch.float32)
    for losses, dh in (
        linear_cross_entropy_backward_chunks(h, weight, labels, scale=1.0),
        linear_cross_entropy_by_vocabulary(h, [lambda: weight], labels, scale=1.0),
    ):
        assert losses.shape == (0,) and dh is not None and dh.shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_in_place(dtype: torch.dtype) -> None:
    """Logits become softmax - onehot in their dtype; without gradient they stay."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 41, generator=draw).to(dtype), torch.randint(41, (12,), generator=draw)[::2]
    kept, losses = logits.clone(), torch.full((6,), torch.nan)
    assert cross_entropy_(kept, labels, losses, want_grad=False) is kept
    assert torch.equal(kept, logits)
    truth = functional.cross_entropy(logits.double(), labels, reduction="none")
    assert_no_less_accurate(losses, functional.cross_entropy(logits.float(), labels, reduction="none"), truth)
    again = torch.empty(6)
    assert cross_entropy_(kept, labels, again) is kept and torch.equal(again, losses)
    p = logits.double().softmax(1).scatter_add(1, labels[:, None], torch.full((6, 1), -1.0, dtype=torch.float64))
    assert_no_less_accurate(kept, p.to(dtype), p)


def test_functional_forms_refuse_what_does_not_fit() -> None:
    """Layouts, parts, labels and sizes that do not fit are named."""
    h, weight, labels = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(KernelInputError, match="chunk_tokens is 0"):
        linear_cross_entropy_backward_chunks(h, weight, labels, scale=1.0, chunk_tokens=0)
    for out in (torch.zeros(3, 5), torch.zeros(3, 4).double(), torch.zeros(4, 3).T):
        with pytest.raises(KernelInputError, match="out_dh is"):
            linear_cross_entropy_backward_chunks(h, weight, labels, scale=1.0, out_dh=out)
    with pytest.raises(KernelInputError, match="0 parts"):
        linear_cross_entropy_by_vocabulary(h, [], labels, scale=1.0)
    with pytest.raises(KernelInputError, match=r"a part is \(7, 4\) torch\.float64"):
        linear_cross_entropy_by_vocabulary(h, [lambda: weight.double()], labels, scale=1.0)
    with pytest.raises(KernelInputError, match="a label is 7; expected 0 to 6"):
        linear_cross_entropy_by_vocabulary(h, [lambda: weight], labels + 7, scale=1.0)
    with pytest.raises(KernelInputError, match=r"labels are torch\.int32"):
        linear_cross_entropy_by_vocabulary(h, [lambda: weight], labels.int(), scale=1.0)
    losses = torch.zeros(3)
    for logits in (torch.zeros(7, 3).T, torch.zeros(3, 7).double(), torch.zeros(4, 7)):
        with pytest.raises(KernelInputError, match="cross_entropy_: logits"):
            cross_entropy_(logits, labels, losses)
    with pytest.raises(KernelInputError, match="a label is -100"):
        cross_entropy_(torch.zeros(3, 7), labels - 100, losses)
    with pytest.raises(KernelInputError, match="impl is 'fast'"):
        linear_cross_entropy(h, weight, labels, impl="fast")
