"""Forward and backward over packed rows, on every backend that can run here, against float64."""

import importlib.util
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels import flash_attention
from deepdoctor.kernels.attention import attend_packed
from deepdoctor.kernels.flash_attention import (
    PackedRows,
    attention_backward,
    attention_forward,
    choose_attention,
)
from helpers_numeric import assert_no_less_accurate, run_with_gradients

LENGTHS = (1, 17, 300, 64, 1050)
GAP = 24
POISON = 7.0


def has_fa4() -> bool:
    """Whether the package flash-attn-4 is installed."""
    try:
        return all(importlib.util.find_spec(name) for name in ("cutlass", "flash_attn.cute"))
    except ImportError:
        return False


def gpu(name: str) -> object:
    """A backend that needs a CUDA device, and flash-attn-4 for "fa4"."""
    marks = [pytest.mark.gpu]
    if name == "fa4":
        major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
        marks.append(pytest.mark.skipif(not has_fa4(), reason="flash-attn-4 is not installed"))
        marks.append(pytest.mark.skipif(major not in (9, 10), reason="flash-attn-4 needs Hopper or Blackwell"))
        # Its compiler warns of its own deprecations.
        marks.append(pytest.mark.filterwarnings("ignore"))
    return pytest.param(name, marks=marks)


GPU_BACKENDS = [gpu("flash"), gpu("efficient"), gpu("fa4"), gpu("rows")]


def device_of(backend: str) -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def plain(qkv: Tensor, key_heads: int, lengths: tuple[int, ...]) -> Tensor:
    """Masked softmax of each row, in the dtype of qkv."""
    heads = qkv.shape[1] - 2 * key_heads
    outs = []
    for row in qkv.split(lengths):
        q, k, v = row.split([heads, key_heads, key_heads], 1)
        k, v = (t.repeat_interleave(heads // key_heads, 1) for t in (k, v))
        future = torch.ones(len(row), len(row), dtype=torch.bool, device=qkv.device).triu(1)
        scores = torch.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
        outs.append(torch.einsum("nts,snh->tnh", scores.masked_fill(future, -math.inf).softmax(-1), v))
    return torch.cat(outs)


def row_view(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers as a column slice of a wider, poisoned buffer (T, GAP + N * H + GAP), and that buffer."""
    tokens, heads, head_dim = tensor.shape
    wide = torch.full((tokens, heads * head_dim + 2 * GAP), POISON, dtype=tensor.dtype, device=tensor.device)
    view = wide[:, GAP : GAP + heads * head_dim].unflatten(1, (heads, head_dim))
    view.copy_(tensor)
    return view, wide


def gap_untouched(wide: Tensor) -> bool:
    """Whether nothing was written beside the slice."""
    return bool((wide[:, :GAP] == POISON).all() and (wide[:, -GAP:] == POISON).all())


def check(
    backend: str,
    heads: int,
    key_heads: int,
    head_dim: int,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    factor: float = 2.0,
) -> None:
    """Output into a row view and the gradients from a d_out row view are no less accurate than the plain form."""
    device = device_of(backend)
    tokens = sum(lengths)
    qkv = draw(tokens, heads + 2 * key_heads, head_dim, dtype=dtype, device=device)
    d_out, _ = row_view(draw(tokens, heads, head_dim, dtype=dtype, device=device, seed=1))
    rows = PackedRows.of(lengths, device)

    alone, _ = attention_forward(qkv, key_heads, rows, backend=backend)
    place, wide = row_view(torch.full_like(alone, math.nan))
    before = qkv.clone()
    out, saved = attention_forward(qkv, key_heads, rows, backend=backend, out=place)
    assert out.data_ptr() == place.data_ptr() and out.stride() == place.stride()
    assert torch.equal(out, alone) and gap_untouched(wide)
    dq, dk, dv = attention_backward(d_out, qkv, out, saved, key_heads, rows, backend=backend)
    assert torch.equal(qkv, before) and torch.equal(out, alone) and gap_untouched(wide)
    assert [t.shape[1] for t in (dq, dk, dv)] == [heads, key_heads, key_heads]
    for t in (out, dq, dk, dv, *saved):
        assert not t.requires_grad and (t.dim() == 0 or t.stride(-1) == 1)

    reference = run_with_gradients(lambda x: plain(x, key_heads, lengths), [qkv], d_out)
    truth = run_with_gradients(lambda x: plain(x, key_heads, lengths), [qkv], d_out, torch.float64)
    parts = [heads, key_heads, key_heads]
    wanted = zip(reference[1].split(parts, 1), truth[1].split(parts, 1), strict=True)
    for ours, (theirs, exact) in zip((out, dq, dk, dv), [(reference[0], truth[0]), *wanted], strict=True):
        assert ours.dtype == dtype
        # Row by row: an error in a long row must not hide behind the larger values of a short one. The luck of few
        # numbers asks for twice the allowance.
        for mine, other, best in zip(ours.split(lengths), theirs.split(lengths), exact.split(lengths), strict=True):
            # In a row of one token dq and dk are 0, but for the rounding of two sums that cancel.
            if len(best) == 1 and best.abs().max() < 1e-9 and mine.abs().max() <= 32 * torch.finfo(torch.float32).eps:
                continue
            # One token copies its value, which plain fp32 does exactly and three tf32 products to a few last bits.
            if len(best) == 1 and factor > 2 and (mine.double() - best).abs().max() <= 1e-6 * best.abs().max():
                continue
            assert_no_less_accurate(mine, other, best, 2 * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim", "lengths"),
    [(1, 1, 8, (1,)), (4, 4, 16, (7,)), (6, 2, 24, (5, 1, 9)), (4, 2, 32, (1, 1, 1)), (8, 2, 64, (33, 1, 70))],
)
def test_rows_backend(heads: int, key_heads: int, head_dim: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Row by row, on any device: output and gradients against float64, with row views on both sides."""
    check("rows", heads, key_heads, head_dim, lengths, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 2), (4, 4)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_backend(backend: str, head_dim: int, heads: int, key_heads: int, dtype: torch.dtype) -> None:
    """Rows of 1 to 1,050 tokens in one launch, shared key heads or not: output and gradients against float64."""
    if backend == "fa4" and dtype == torch.float16 and (head_dim, key_heads) != (128, 2):
        pytest.skip("one shape in fp16 is enough: each one is compiled for many seconds")
    check(backend, heads, key_heads, head_dim, LENGTHS, dtype)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (2048,), (129, 128, 127)])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_edges(backend: str, lengths: tuple[int, ...]) -> None:
    """Only rows of one token, one long row, rows around a block's size: where kernels take other paths."""
    check(backend, 8, 2, 128, lengths, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_efficient_takes_fp32(head_dim: int) -> None:
    """fp32 on any card; its products are sums of three tf32 products, so a few more last bits than plain fp32."""
    check("efficient", 8, 2, head_dim, LENGTHS, torch.float32, factor=8.0)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 80, 96])
@pytest.mark.parametrize("backend", ["flash", "efficient"])
def test_other_head_sizes(backend: str, head_dim: int) -> None:
    """Head sizes of small models, and of Phi and Gemma, on the backends inside PyTorch."""
    check(backend, 4, 2, head_dim, (5, 130, 64), torch.float16)


@pytest.mark.parametrize("backend", [pytest.param("rows"), *GPU_BACKENDS[:3]])
def test_packed_equals_alone(backend: str) -> None:
    """The packed output has the bits that each row gives alone, and a row of nan spoils no other row's gradients."""
    device, dtype = device_of(backend), torch.bfloat16
    lengths = (3, 80, 1, 200)
    qkv = draw(sum(lengths), 12, 64, dtype=dtype, device=device)
    out, _ = attention_forward(qkv, 2, PackedRows.of(lengths, device), backend=backend)
    for row, packed in zip(qkv.split(lengths), out.split(lengths), strict=True):
        alone, _ = attention_forward(row, 2, PackedRows.of([len(row)], device), backend=backend)
        assert torch.equal(packed, alone)
    if backend == "fa4":
        return  # it reads past the end of a row, where 0 times nan is nan
    d_out = draw(*out.shape, dtype=dtype, device=device, seed=1)
    changed = qkv.clone()
    changed[3:83] = math.nan
    rows = PackedRows.of(lengths, device)
    again, saved = attention_forward(changed, 2, rows, backend=backend)
    grads = attention_backward(d_out, changed, again, saved, 2, rows, backend=backend)
    for start, end in [(0, 3), (83, 284)]:
        assert torch.equal(again[start:end], out[start:end])
        assert all(torch.isfinite(grad[start:end]).all() for grad in grads)


def test_gradients_equal_autograd_through_the_packed_op() -> None:
    """Row by row, the bits are those of autograd through `attend_packed`."""
    lengths = (4, 1, 9)
    qkv = draw(14, 10, 16, dtype=torch.float32, device=torch.device("cpu"))
    d_out = draw(14, 6, 16, dtype=torch.float32, device=torch.device("cpu"), seed=1)
    wanted, d_qkv = run_with_gradients(lambda x: attend_packed(x, 2, lengths), [qkv], d_out)
    rows = PackedRows.of(lengths, "cpu")
    out, saved = attention_forward(qkv, 2, rows, backend="rows")
    assert saved == () and torch.equal(out, wanted)
    assert torch.equal(torch.cat(attention_backward(d_out, qkv, out, saved, 2, rows, backend="rows"), 1), d_qkv)


@pytest.mark.parametrize("backend", [pytest.param("rows"), *GPU_BACKENDS[:3]])
def test_no_token_at_all(backend: str) -> None:
    """No row, or only rows of no tokens, gives empty tensors; an empty row between others is left out."""
    device = device_of(backend)
    for lengths in ((), (0, 0)):
        rows = PackedRows.of(lengths, device)
        qkv = torch.empty(0, 8, 64, dtype=torch.float16, device=device)
        out, saved = attention_forward(qkv, 2, rows, backend=backend)
        assert out.shape == (0, 4, 64)
        grads = attention_backward(out, qkv, out, saved, 2, rows, backend=backend)
        assert [tuple(grad.shape) for grad in grads] == [(0, 4, 64), (0, 2, 64), (0, 2, 64)]
    rows = PackedRows.of((5, 0, 1), device)
    assert rows.row_lengths == (5, 1) and rows.cu_seqlens.tolist() == [0, 5, 6] and rows.longest == 5
    assert rows.cu_seqlens.dtype == torch.int32 and rows.tokens == 6


@pytest.mark.gpu
def test_prefill_takes_one_call() -> None:
    """Several rows on a GPU without a gradient: one FlashAttention call, as exact as the calls per row."""
    device = torch.device("cuda")
    qkv = draw(sum(LENGTHS), 12, 128, dtype=torch.float16, device=device)
    ours = attend_packed(qkv, 2, LENGTHS)
    per_row = attend_packed(qkv.clone().requires_grad_(), 2, LENGTHS).detach()
    assert_no_less_accurate(ours, per_row, plain(qkv.double(), 2, LENGTHS))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS[:3])
def test_memory_is_linear(backend: str) -> None:
    """8,192 tokens in one row: the peak stays below what a matrix of scores of one head would need."""
    device, tokens, head_dim = torch.device("cuda"), 8192, 64
    qkv = draw(tokens, 4, head_dim, dtype=torch.float16, device=device)
    rows = PackedRows.of([tokens], device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, saved = attention_forward(qkv, 1, rows, backend=backend)
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    attention_backward(out, qkv, out, saved, 1, rows, backend=backend)
    assert torch.cuda.max_memory_allocated() - before < 2 * tokens * tokens
    assert kept < 0.2 * qkv.nbytes


def test_choice_by_capability(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """CPU, Turing, Ampere and Hopper with and without flash-attn-4 get what they can run, and the log says why."""
    assert choose_attention(torch.device("cpu"), torch.float32, 64) == "rows"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    expected = [
        ((7, 5), False, {fp16: "efficient", bf16: "rows", fp32: "efficient"}, 128),
        ((8, 0), True, {fp16: "flash", bf16: "flash", fp32: "efficient"}, 128),
        ((9, 0), False, {fp16: "flash", bf16: "flash", fp32: "efficient"}, 128),
        ((9, 0), True, {fp16: "fa4", bf16: "fa4", fp32: "efficient"}, 128),
        ((9, 0), True, {bf16: "flash", fp32: "efficient"}, 80),
        ((9, 0), True, {bf16: "rows"}, 12),
        ((12, 0), True, {bf16: "flash"}, 64),
    ]
    device = torch.device("cuda", 0)
    for capability, installed, wanted, head_dim in expected:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        monkeypatch.setattr(flash_attention, "_has_fa4", lambda i=installed: i)
        flash_attention.flash_can.cache_clear()
        for dtype, name in wanted.items():
            chosen, why = flash_attention._fastest(device, dtype, head_dim)
            assert chosen == name, (capability, dtype, head_dim)
            assert f"capability {capability[0]}.{capability[1]}" in why
            if capability == (9, 0) and head_dim == 128 and dtype != fp32 and not installed:
                assert "flash-attn-4 is not installed" in why
    flash_attention.flash_can.cache_clear()
    flash_attention._choose.cache_clear()
    with caplog.at_level("INFO", logger=flash_attention.__name__):
        for _ in range(2):
            choose_attention(torch.device("cpu"), fp32, 64)
    assert [record.message for record in caplog.records] == [
        "attention of torch.float32, head size 64, on cpu: rows (no CUDA device)"
    ]


def test_a_refusal_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend raises becomes a KernelInputError that names it; running out of memory stays what it is."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no kernel for this\nand a long trace")

    def exhaust(*_: object) -> None:
        raise torch.OutOfMemoryError("none left")

    qkv = torch.zeros(3, 4, 8)
    rows = PackedRows.of([3], "cpu")
    monkeypatch.setitem(flash_attention._FORWARD, "flash", refuse)
    monkeypatch.setitem(flash_attention._BACKWARD, "flash", refuse)
    with pytest.raises(KernelInputError, match=r"'flash' refused qkv \(3, 4, 8\).*no kernel for this") as caught:
        attention_forward(qkv, 1, rows, backend="flash")
    assert caught.value.hint is not None and "long trace" not in caught.value.message
    with pytest.raises(KernelInputError, match="refused"):
        attention_backward(qkv[:, :2], qkv, qkv[:, :2], (), 1, rows, backend="flash")
    monkeypatch.setitem(flash_attention._FORWARD, "flash", exhaust)
    with pytest.raises(torch.OutOfMemoryError):
        attention_forward(qkv, 1, rows, backend="flash")


def test_refuses_what_does_not_fit() -> None:
    """Lengths, heads, layouts and names that do not fit are named."""
    qkv = torch.zeros(5, 8, 16)
    rows = PackedRows.of([5], "cpu")
    with pytest.raises(KernelInputError, match="4 tokens in 1 rows"):
        attention_forward(qkv, 2, PackedRows.of([4], "cpu"), backend="rows")
    for key_heads in (0, 3, 4):
        with pytest.raises(KernelInputError, match=f"{key_heads} key heads"):
            attention_forward(qkv, key_heads, rows, backend="rows")
    with pytest.raises(KernelInputError, match="qkv be contiguous"):
        attention_forward(torch.zeros(5, 16, 8).transpose(1, 2), 2, rows, backend="rows")
    with pytest.raises(KernelInputError, match="backend is 'fa5'"):
        attention_forward(qkv, 2, rows, backend="fa5")
    with pytest.raises(KernelInputError, match="hold -1"):
        PackedRows.of([3, -1], "cpu")
    for out in (torch.zeros(5, 4, 8), torch.zeros(5, 4, 16).double(), torch.zeros(4, 5, 16).transpose(0, 1)):
        with pytest.raises(KernelInputError, match="attention_forward: out is"):
            attention_forward(qkv, 2, rows, backend="rows", out=out)
    good = torch.zeros(5, 4, 16)
    with pytest.raises(KernelInputError, match="attention_backward: d_out is"):
        attention_backward(good[:, :3], qkv, good, (), 2, rows, backend="rows")


def test_rows_are_remembered() -> None:
    """The same lengths on the same device are described once."""
    first = PackedRows.of([3, 4], "cpu")
    assert PackedRows.of((3, 4), torch.device("cpu")) is first
    assert [end - start for start, end in pairwise(first.cu_seqlens.tolist())] == [3, 4]
