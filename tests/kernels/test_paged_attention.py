"""Paged attention and the way of a new token into its block: the reference against float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.paged_attention import (
    LARGEST,
    no_eight_bits_because,
    paged_attention,
    paged_scratch_elements,
    quantize_heads,
    rope_and_store,
)
from deepdoctor.kernels.rope import rope_qkv_, rope_tables
from helpers_numeric import assert_no_less_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EIGHT_BITS = (torch.float8_e4m3fn, torch.int8)


@dataclass(frozen=True)
class Case:
    """lengths: of the slots, 0 for an idle one; key_heads, group: N = key_heads · group; size: positions of a block."""

    lengths: tuple[int, ...]
    key_heads: int = 2
    group: int = 4
    head_dim: int = 64
    size: int = 64


# One slot and many, around the end of a block, long, idle; groups of 1, 3, 4 and 8; blocks of 16.
CASES = (
    Case((1,), head_dim=128),
    Case((700, 0, 64), group=1),
    Case((63, 65, 0), key_heads=1, group=8, head_dim=128),
    Case((5, 0, 64, 1, 130, 63, 65, 2, 0, 17, 31, 33, 128, 127, 129, 3, 90), key_heads=1, group=3),
    Case((33, 16, 17), key_heads=3, group=2, head_dim=32, size=16),
    Case((0, 0)),
)


@dataclass
class Paged:
    """A cache whose blocks are dealt out at random; nan lies wherever no position is filled."""

    k: Tensor
    v: Tensor
    block_table: Tensor
    lengths: Tensor
    q: Tensor
    absmax: Tensor | None = None

    def cached(self) -> tuple[Tensor, ...]:
        """What the op reads of the cache."""
        return self.k, self.v, self.block_table, self.lengths

    def values(self) -> tuple[Tensor, Tensor]:
        """k and v as they are meant, in float64."""
        if self.absmax is None:
            return self.k.double(), self.v.double()
        scale = self.absmax.double()[..., None] / LARGEST[self.k.dtype]
        return self.k.to(torch.float32).double() * scale[0], self.v.to(torch.float32).double() * scale[1]


def draw(
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    room: int = 0,
    stored: torch.dtype | None = None,
) -> Paged:
    """room: positions past each length that have a block, too. Blocks that no slot has are nan as a whole.

    stored: 8 bits that hold the values drawn, some heads far larger than others; None: as they are.
    """
    generator = torch.Generator().manual_seed(len(case.lengths))
    needed = [-(-(length + room) // case.size) if length else 0 for length in case.lengths]
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    shape = (len(order), case.key_heads, case.size, case.head_dim)
    k, v = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    # Entries that must not be used point outside.
    table = torch.full((len(needed), max(needed) + 1), 1 << 20, dtype=torch.int32)
    for slot, (length, count) in enumerate(zip(case.lengths, needed, strict=True)):
        for number in range(count):
            block = order.pop()
            table[slot, number] = block
            filled = min(max(length - number * case.size, 0), case.size)
            for cache in (k, v):
                rows = torch.randn(case.key_heads, filled, case.head_dim, generator=generator)
                cache[block, :, :filled] = rows.to(dtype)
    q = torch.randn(len(needed), case.key_heads * case.group, case.head_dim, generator=generator).to(dtype)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    drawn = [tensor.to(device) for tensor in (k, v, table, lengths, q)]
    if stored is None:
        return Paged(*drawn)
    sizes = 4.0 ** torch.randint(-1, 2, (2, *shape[:3], 1), generator=generator).to(device)
    (k8, k_absmax), (v8, v_absmax) = (quantize_heads(drawn[n] * sizes[n], stored) for n in (0, 1))
    return Paged(k8, v8, *drawn[2:], torch.stack([k_absmax, v_absmax]))


def plain(paged: Paged, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """Attention slot by slot in one dtype, as its definition is written."""
    out = torch.zeros(paged.q.shape, dtype=dtype, device=paged.q.device)
    group, size = paged.q.shape[1] // paged.k.shape[1], paged.k.shape[2]
    k, v = paged.values()
    for slot, length in enumerate(paged.lengths.tolist()):
        for head in range(paged.q.shape[1] if length else 0):
            places = [(int(paged.block_table[slot, p // size]), head // group, p % size) for p in range(length)]
            keys = torch.stack([k[place] for place in places]).to(dtype)
            values = torch.stack([v[place] for place in places]).to(dtype)
            scores = keys @ paged.q[slot, head].to(dtype) * (scale or paged.q.shape[2] ** -0.5)
            out[slot, head] = scores.softmax(0) @ values
    return out


def check_attention(
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str,
    impl: str,
    splits: Sequence[int],
    stored: torch.dtype | None = None,
) -> None:
    """Against float64 on what is stored, for every number of splits; q is a slice of qkv, scratch starts as nan."""
    paged = draw(case, dtype, device, stored=stored)
    slots, heads, head_dim = paged.q.shape
    wide = torch.full((slots, heads + 2, head_dim), torch.nan, dtype=dtype, device=device)
    wide[:, :heads] = paged.q
    exact, reference = plain(paged, torch.float64), plain(paged, dtype)
    for pieces in splits:
        scratch = torch.full((paged_scratch_elements(slots, heads, head_dim, pieces),), torch.nan, device=device)
        out = paged_attention(
            wide[:, :heads],
            *paged.cached(),
            absmax=paged.absmax,
            out=torch.full_like(paged.q, torch.nan),
            splits=pieces,
            scratch=scratch,
            impl=impl,
        )
        assert_no_less_accurate(out, reference, exact)
        assert torch.count_nonzero(out[paged.lengths == 0]) == 0


def check_store(
    case: Case, dtype: torch.dtype, device: torch.device | str, impl: str, stored: torch.dtype | None = None
) -> None:
    """q and the new k are rotated as ``rope_qkv_`` does; nothing but one place per slot that is not idle changes."""
    paged = draw(case, dtype, device, room=1, stored=stored)
    generator = torch.Generator().manual_seed(1)
    slots, heads, head_dim = paged.q.shape
    keys = case.key_heads
    qkv = torch.randn(slots, heads + 2 * keys, head_dim, generator=generator).to(device, dtype)
    half = torch.arange(head_dim // 2)
    table = torch.cat(rope_tables(torch.arange(2048), 10000.0 ** -(half / len(half))), 1).to(device)
    positions = torch.where(paged.lengths > 0, paged.lengths, -1)

    at = positions.clamp(min=0).long()
    cos, sin = table[at].chunk(2, dim=1)
    turned = rope_qkv_(qkv.clone(), cos.contiguous(), sin.contiguous(), heads + keys, impl=impl)
    if stored is not None and slots:
        # Zeros, and magnitudes far apart: every head has a scale of its own.
        qkv[0, heads:] = 0
        qkv[-1, heads:] *= 2.0 ** torch.arange(2 * keys, device=device)[:, None]
        turned = rope_qkv_(qkv.clone(), cos.contiguous(), sin.contiguous(), heads + keys, impl=impl)
    expected, k, v = qkv.clone(), paged.k.clone(), paged.v.clone()
    absmax = None if paged.absmax is None else paged.absmax.clone()
    for slot, position in enumerate(positions.tolist()):
        if position >= 0:
            expected[slot, :heads] = turned[slot, :heads]
            block = paged.block_table[slot, position // case.size]
            new = torch.stack([turned[slot, heads : heads + keys], qkv[slot, heads + keys :]])
            if absmax is not None:
                new, absmax[:, block, :, position % case.size] = quantize_heads(new, paged.k.dtype)
            _bytes(k)[block, :, position % case.size], _bytes(v)[block, :, position % case.size] = _bytes(new)
    cache = (paged.k, paged.v, paged.block_table)
    assert rope_and_store(qkv, table, positions, *cache, absmax=paged.absmax, impl=impl) is qkv
    # In fp32 a compiler may fuse another one of the two products with the sum.
    slack = 2**-22 if dtype == torch.float32 else 0.0
    found = [(qkv, expected), (_bytes(paged.k), _bytes(k)), (_bytes(paged.v), _bytes(v))]
    for got, wanted in found + ([] if absmax is None else [(paged.absmax, absmax)]):
        torch.testing.assert_close(got, wanted, rtol=slack, atol=slack, equal_nan=True)


def _bytes(cache: Tensor) -> Tensor:
    """What can be indexed and compared: e4m3 as its bytes."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_definition(case: Case, dtype: torch.dtype) -> None:
    """The PyTorch form, for every case and dtype."""
    check_attention(case, dtype, "cpu", "auto", (1, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_tokens_go_to_their_blocks(case: Case, dtype: torch.dtype) -> None:
    """The PyTorch form, for every case and dtype."""
    check_store(case, dtype, "cpu", "auto")


@pytest.mark.parametrize("stored", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cache_of_eight_bits(case: Case, dtype: torch.dtype, stored: torch.dtype) -> None:
    """The PyTorch form, for every case in 16 bits: the codes of ``quantize_heads``, and attention over their values."""
    check_store(case, dtype, "cpu", "auto", stored)
    check_attention(case, dtype, "cpu", "auto", (1,), stored)


@pytest.mark.parametrize("stored", EIGHT_BITS, ids=str)
def test_eight_bits(stored: torch.dtype) -> None:
    """Each head's largest value is kept, the others to half a step of the format; zeros stay, nan and inf are seen."""
    x = torch.randn(7, 3, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 4)[:, None, None]
    codes, absmax = quantize_heads(x, stored)
    assert torch.equal(absmax, x.abs().amax(-1)) and codes.dtype == stored
    back = codes.float() * (absmax / LARGEST[stored])[..., None]
    torch.testing.assert_close(back.abs().amax(-1), absmax)
    step = absmax[..., None] / LARGEST[stored]
    allowed = 0.5 * step if stored == torch.int8 else torch.maximum(x.abs() / 16, step * 2**-10)
    assert ((back - x).abs() <= 1.0001 * allowed).all()
    assert not quantize_heads(torch.zeros(2, 64), stored)[0].float().any()
    for bad in (torch.nan, torch.inf):
        broken = torch.ones(64).index_fill(0, torch.tensor(3), bad)
        assert quantize_heads(broken, stored)[1].isnan()


def test_what_cards_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    """e4m3 needs compute capability 8.9, and the reason names the card; int8 and 16 bits run anywhere."""
    gpu, e4m3 = torch.device("cuda"), torch.float8_e4m3fn
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = no_eight_bits_because(gpu, e4m3)
    assert reason and "Tesla T4" in reason and "7.5" in reason
    for device, dtype in ((gpu, torch.int8), (gpu, torch.float16), (torch.device("cpu"), e4m3)):
        assert no_eight_bits_because(device, dtype) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert no_eight_bits_because(gpu, e4m3) is None


def test_scale() -> None:
    """A scale other than 1 / sqrt(H) is used."""
    paged = draw(Case((70,)), torch.float32)
    out = paged_attention(
        paged.q, paged.k, paged.v, paged.block_table, paged.lengths, out=torch.empty_like(paged.q), scale=0.3
    )
    assert_no_less_accurate(out, plain(paged, torch.float32, 0.3), plain(paged, torch.float64, 0.3))


def test_refusals() -> None:
    """Every argument of another shape, dtype or layout is named."""
    paged = draw(Case((5, 7)), torch.float32)
    out = torch.empty_like(paged.q)

    def attend(**changed: object) -> None:
        given = {
            "q": paged.q,
            "k": paged.k,
            "v": paged.v,
            "block_table": paged.block_table,
            "lengths": paged.lengths,
            "out": out,
        }
        paged_attention(**(given | changed))

    wrong = (
        ("q", paged.q[..., :32]),
        ("q", paged.q[:, :7]),
        ("q", paged.q.transpose(0, 1).contiguous().transpose(0, 1)),
        ("k", paged.k[:, :, ::2]),
        ("k", paged.k.double()),
        ("v", paged.v.half()),
        ("block_table", paged.block_table.long()),
        ("block_table", paged.block_table[:1]),
        ("lengths", paged.lengths.long()),
        ("out", out[:1]),
        ("out", out.half()),
        ("splits", 0),
        ("absmax", torch.ones(2, *paged.k.shape[:3])),
    )
    for name, value in wrong:
        with pytest.raises(KernelInputError, match=f"{name} is"):
            attend(**{name: value})
    small = draw(Case((5, 7)), torch.float32, stored=torch.int8)
    for name, value in (("absmax", None), ("absmax", torch.ones(2, 3, 2, 64)), ("v", small.v.float())):
        with pytest.raises(KernelInputError, match=f"{name} is"):
            attend(**{"k": small.k, "v": small.v, "absmax": small.absmax, name: value})
    qkv, table, positions = torch.zeros(2, 12, 64), torch.zeros(9, 64), torch.zeros(2, dtype=torch.int32)
    cache = (paged.k, paged.v, paged.block_table)
    for arguments, name in (
        ((qkv[:, :4], table, positions, *cache), "qkv"),
        ((qkv.transpose(0, 1), table, positions, *cache), "qkv"),
        ((qkv, table[:, :32], positions, *cache), "cos_sin"),
        ((qkv, table, positions.long(), *cache), "positions"),
        ((qkv, table, positions, paged.k, paged.v[:1], paged.block_table), "v"),
    ):
        with pytest.raises(KernelInputError, match=f"{name} is"):
            rope_and_store(*arguments)
