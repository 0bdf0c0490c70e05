"""How exact a kernel must be: measured against float64, not against taste."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_no_less_accurate(kernel: Tensor, reference: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """The kernel's largest error is at most ``factor`` times the plain form's, plus one rounding of the largest value.

    kernel, reference: results in the kernel's dtype; truth: the same maths in float64.
    """
    assert kernel.shape == truth.shape, f"shape {tuple(kernel.shape)}, expected {tuple(truth.shape)}"
    assert truth.dtype == torch.float64
    if not truth.numel():
        return
    assert torch.isfinite(kernel).all()
    unit = torch.finfo(kernel.dtype).eps * truth.abs().max()
    allowed = factor * (reference.double() - truth).abs().max() + unit
    error = (kernel.double() - truth).abs().max()
    assert error <= allowed, f"max error {error:.2e}, allowed {allowed:.2e}"


def run_with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], d_out: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return function(*inputs) and the gradient of every input, for the upstream gradient ``d_out``.

    inputs: strides are kept; dtype converts inputs and d_out first. An input of an integer dtype gets no gradient.
    """
    leaves = [t.detach() if dtype is None or not t.is_floating_point() else t.detach().to(dtype) for t in inputs]
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    out = function(*leaves)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_matches(
    kernel: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], d_out: Tensor
) -> None:
    """Output and every gradient of ``kernel`` are no less accurate than those of ``plain``, which also gives the truth.

    Both take ``inputs``; the truth is ``plain`` in float64 on the same numbers.
    """
    ours = run_with_gradients(kernel, inputs, d_out)
    reference = run_with_gradients(plain, inputs, d_out)
    truth = run_with_gradients(plain, inputs, d_out, torch.float64)
    assert len(ours) == len(truth)
    for mine, theirs, exact in zip(ours, reference, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert_no_less_accurate(mine, theirs, exact)
