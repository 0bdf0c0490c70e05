"""Loss from hidden states against float64 logits that are kept."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.linear_cross_entropy import CHUNK_TOKENS, linear_cross_entropy
from helpers_numeric import assert_matches

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
