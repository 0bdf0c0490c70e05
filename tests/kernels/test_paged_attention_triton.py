"""Paged attention in Triton: the checks of its reference, and what only a kernel can get wrong."""

from dataclasses import replace

import pytest
import torch
from test_paged_attention import CASES, EIGHT_BITS, Case, check_attention, check_store, draw, plain

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.paged_attention import (
    no_eight_bits_because,
    paged_attention,
    paged_scratch_elements,
    rope_and_store,
)
from helpers_numeric import assert_no_less_accurate
from helpers_triton import DEVICE, INTERPRETED, needs_triton

pytestmark = needs_triton

# The interpreter's products know no bf16.
DTYPES = (torch.bfloat16, torch.float16) if DEVICE.type == "cuda" else (torch.float16,)
CONVERTED = [stored for stored in EIGHT_BITS if no_eight_bits_because(DEVICE, stored) is None]


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy 2.4 makes no int of an array of one element; that is how the interpreter reads the bounds of a loop."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_items(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_items)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_definition_triton(case: Case, dtype: torch.dtype) -> None:
    """One piece, pieces of several blocks, more pieces than blocks, a number of pieces that is no power of two."""
    check_attention(case, dtype, DEVICE, "triton", (1, 2, 5, 16))


@pytest.mark.parametrize("stored", CONVERTED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eight_bits_triton(case: Case, dtype: torch.dtype, stored: torch.dtype) -> None:
    """A cache of 8 bits: the codes of ``quantize_heads``, and as exact as the definition on what they stand for.

    The interpreter does not round to e4m3 as the format says.
    """
    check_attention(case, dtype, DEVICE, "triton", (1, 2, 5), stored)
    if stored == torch.int8 or not INTERPRETED:
        check_store(case, dtype, DEVICE, "triton", stored)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("stored", CONVERTED, ids=str)
def test_what_is_not_finite_shows(stored: torch.dtype) -> None:
    """A nan or an inf in a new key or value is not hidden by 8 bits: the slot's output is not finite."""
    for bad in (torch.nan, torch.inf):
        for head in (8, 11):
            paged = draw(Case((40, 40)), torch.float16, DEVICE, room=1, stored=stored)
            qkv = torch.ones(2, 12, 64, dtype=torch.float16, device=DEVICE)
            qkv[0, head, 5] = bad
            angles = torch.cat([torch.ones(64, 32), torch.zeros(64, 32)], 1).to(DEVICE)
            cache = (paged.k, paged.v, paged.block_table)
            rope_and_store(qkv, angles, paged.lengths, *cache, absmax=paged.absmax, impl="triton")
            out = paged_attention(
                qkv[:, :8], *cache, paged.lengths + 1, out=qkv.new_empty(2, 8, 64), absmax=paged.absmax, impl="triton"
            )
            assert not out[0].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_tokens_go_to_their_blocks_triton(case: Case, dtype: torch.dtype) -> None:
    """Bits of ``rope_qkv_`` in the right place, and no other changed."""
    check_store(case, dtype, DEVICE, "triton")


def test_what_the_kernel_does_not_take() -> None:
    """fp32, and sizes that are no power of two, go to PyTorch, or are refused when asked."""
    for case, dtype in (
        (Case((5,)), torch.float32),
        (Case((5,), head_dim=48), torch.float16),
        (Case((5,), size=24), torch.float16),
    ):
        paged = draw(case, dtype, DEVICE)
        arguments = (paged.q, paged.k, paged.v, paged.block_table, paged.lengths)
        with pytest.raises(KernelInputError, match="powers"):
            paged_attention(*arguments, out=torch.empty_like(paged.q), impl="triton")
        out = paged_attention(*arguments, out=torch.empty_like(paged.q))
        assert_no_less_accurate(out, plain(paged, dtype), plain(paged, torch.float64))


def test_scratch_too_small_is_refused() -> None:
    """A buffer for fewer splits is named."""
    paged = draw(Case((5,)), torch.float16, DEVICE)
    arguments = (paged.q, paged.k, paged.v, paged.block_table, paged.lengths)
    scratch = torch.empty(paged_scratch_elements(1, 8, 64, 4) - 1, device=DEVICE)
    with pytest.raises(KernelInputError, match="scratch"):
        paged_attention(*arguments, out=torch.empty_like(paged.q), splits=4, scratch=scratch, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", (1, 3, 17, 64))
def test_shapes_of_an_8b_model(slots: int, dtype: torch.dtype) -> None:
    """Eight key heads of 128, four query heads each, slots of all lengths."""
    generator = torch.Generator().manual_seed(slots)
    lengths = torch.randint(1, 1500, (slots,), generator=generator).tolist()
    lengths[slots // 2] = 0 if slots > 1 else 700
    case = Case(tuple(lengths), key_heads=8, group=4, head_dim=128)
    check_store(case, dtype, "cuda", "triton")
    paged = draw(case, dtype, "cuda")
    arguments = (paged.q, paged.k, paged.v, paged.block_table, paged.lengths)
    reference = paged_attention(*arguments, out=torch.empty_like(paged.q), impl="torch")
    wide = replace(paged, k=paged.k.double(), v=paged.v.double(), q=paged.q.double())
    exact = torch.zeros_like(wide.q)
    for slot, length in enumerate(lengths):
        blocks = paged.block_table[slot, : -(-length // 64)].long()
        keys, values = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for cache in (wide.k, wide.v))
        if length:
            weights = (wide.q[slot].unflatten(0, (8, 4)) @ keys.transpose(1, 2) * 128**-0.5).softmax(-1)
            exact[slot] = (weights @ values).flatten(0, 1)
    for splits in (1, 4, 32, 64):
        out = paged_attention(*arguments, out=torch.full_like(paged.q, torch.nan), splits=splits)
        assert_no_less_accurate(out, reference, exact)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """A captured step follows positions, lengths and blocks that change on the device, a slot that falls idle too."""
    case = Case((63, 64, 130), key_heads=2, group=4, head_dim=128)
    paged = draw(case, torch.bfloat16, "cuda", room=3)
    paged.k.nan_to_num_(0.0)
    paged.v.nan_to_num_(0.0)
    table = torch.randn(256, 128, device="cuda")
    qkv = torch.randn(3, 12, 128, dtype=torch.bfloat16, device="cuda")
    fresh, out = qkv.clone(), torch.empty(3, 8, 128, dtype=torch.bfloat16, device="cuda")
    lengths, positions = paged.lengths.clone(), paged.lengths - 1
    scratch = torch.empty(paged_scratch_elements(3, 8, 128, 4), device="cuda")

    def step(k: torch.Tensor, v: torch.Tensor) -> None:
        qkv.copy_(fresh)
        rope_and_store(qkv, table, positions, k, v, paged.block_table)
        paged_attention(qkv[:, :8], k, v, paged.block_table, lengths, out=out, splits=4, scratch=scratch)

    step(paged.k, paged.v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(paged.k, paged.v)
    for idle in (False, True):
        fresh.normal_()
        positions.add_(1)
        lengths.add_(1)
        if idle:
            positions[1], lengths[1] = -1, 0
        k, v = paged.k.clone(), paged.v.clone()
        graph.replay()
        replayed = out.clone()
        step(k, v)
        assert torch.equal(out, replayed) and torch.equal(k, paged.k) and torch.equal(v, paged.v)
