"""Packed and cached attention against float64, and rows against themselves alone."""

import math

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.attention import attend_cached, attend_packed
from helpers_numeric import assert_matches, assert_no_less_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(qkv: Tensor, key_heads: int, row_lengths: list[int]) -> Tensor:
    """One masked softmax over all tokens: the mask allows the same row and not the future."""
    heads = qkv.shape[1] - 2 * key_heads
    q, k, v = qkv.split([heads, key_heads, key_heads], 1)
    k, v = (t.repeat_interleave(heads // key_heads, 1) for t in (k, v))
    row = torch.repeat_interleave(torch.arange(len(row_lengths)), torch.tensor(row_lengths))
    allowed = (row[:, None] == row) & torch.ones(len(row), len(row), dtype=torch.bool).tril()
    scores = torch.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("nts,snh->tnh", scores.masked_fill(~allowed, -math.inf).softmax(-1), v)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim", "rows"),
    [(1, 1, 8, [1]), (4, 4, 16, [7]), (6, 2, 24, [5, 1, 9]), (3, 1, 64, [33, 70]), (4, 2, 32, [1, 1, 1])],
)
def test_forward_and_gradient(heads: int, key_heads: int, head_dim: int, rows: list[int], dtype: torch.dtype) -> None:
    """Output and gradients of q, k and v, with shared keys and packed rows, are as exact as one masked softmax."""
    qkv = draw(sum(rows), heads + 2 * key_heads, head_dim, dtype=dtype)
    dy = draw(sum(rows), heads, head_dim, dtype=dtype, seed=1)
    assert_matches(lambda x: attend_packed(x, key_heads, rows), lambda x: plain(x, key_heads, rows), [qkv], dy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_alone(dtype: torch.dtype) -> None:
    """Packed rows equal rows alone; changing one row, even to nan, leaves the others' bits and gradients alone."""
    rows = [3, 8, 1, 5]
    qkv = draw(sum(rows), 8, 16, dtype=dtype)
    out = attend_packed(qkv, 2, rows)
    alone = torch.cat([attend_packed(part, 2, [len(part)]) for part in qkv.split(rows)])
    assert torch.equal(out, alone)
    changed = qkv.clone()
    changed[3:11] = math.nan
    changed.requires_grad_()
    again = attend_packed(changed, 2, rows)
    kept = torch.ones(sum(rows), dtype=torch.bool)
    kept[3:11] = False
    assert torch.equal(again[kept], out[kept]) and again[~kept].isnan().all()
    again[:3].sum().backward()
    assert changed.grad is not None
    assert changed.grad[:3].any() and not changed.grad[11:].any()


def test_the_future_does_not_matter() -> None:
    """A token's output does not change when later tokens of its row do."""
    qkv = draw(9, 4, 16)
    changed = torch.cat([qkv[:6], draw(3, 4, 16, seed=1)])
    assert torch.allclose(attend_packed(qkv, 1, [9])[:6], attend_packed(changed, 1, [9])[:6], rtol=0, atol=1e-6)


def test_strided_and_empty_rows() -> None:
    """A view into a wider tensor gives what a copy gives; a row of no tokens adds nothing."""
    wide = draw(9, 10, 16)
    view = wide[:, 1:9]
    assert torch.equal(attend_packed(view, 2, [4, 5]), attend_packed(view.contiguous(), 2, [4, 5]))
    assert torch.equal(attend_packed(view, 2, [4, 0, 5]), attend_packed(view, 2, [4, 5]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_equals_packed(dtype: torch.dtype) -> None:
    """One new token per slot over caches of different fill equals the last token of whole rows."""
    lengths, heads, key_heads, head_dim = [4, 1, 7], 6, 2, 16
    rows = [draw(n, heads + 2 * key_heads, head_dim, dtype=dtype, seed=n) for n in lengths]
    k_cache, v_cache = torch.full((2, 3, key_heads, 7, head_dim), 5.0, dtype=dtype)  # leftovers beyond each length
    for slot, row in enumerate(rows):
        k_cache[slot, :, : len(row)] = row[:, heads : heads + key_heads].transpose(0, 1)
        v_cache[slot, :, : len(row)] = row[:, heads + key_heads :].transpose(0, 1)
    mask = torch.where(torch.arange(7) < torch.tensor(lengths)[:, None], 0.0, -math.inf).to(dtype)[:, None, None]
    q = torch.stack([row[-1, :heads] for row in rows])
    out = attend_cached(q, k_cache, v_cache, mask)
    for slot, row in enumerate(rows):
        truth = plain(row.double(), key_heads, [len(row)])[-1]
        assert_no_less_accurate(out[slot], plain(row, key_heads, [len(row)])[-1], truth)
    full = attend_cached(q[2:], k_cache[2:], v_cache[2:], None)
    assert_no_less_accurate(full[0], out[2], plain(rows[2].double(), key_heads, [7])[-1])


@pytest.mark.parametrize(
    ("shape", "key_heads", "rows"),
    [
        ((5, 8, 16), 2, [4]),
        ((5, 8, 16), 2, [6, -1]),
        ((5, 8, 16), 3, [5]),
        ((5, 8, 16), 0, [5]),
        ((5, 4, 16), 2, [5]),
        ((5, 8), 2, [5]),
    ],
)
def test_refuses_what_does_not_fit(shape: tuple[int, ...], key_heads: int, rows: list[int]) -> None:
    """Lengths that do not add up and heads that do not divide are refused with the numbers."""
    with pytest.raises(KernelInputError, match=r"attend_packed: qkv .*rows must add up to T"):
        attend_packed(torch.zeros(shape), key_heads, rows)
