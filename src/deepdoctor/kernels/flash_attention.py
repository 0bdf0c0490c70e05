"""Causal attention over packed rows with forward and backward apart, on the fastest backend that can run.

o_t = sum_s p_ts v_s over the tokens s <= t of the same row, p = softmax(q k^T / sqrt(H)). The forward keeps one fp32
logsumexp per token and head; from it the backward recomputes p in blocks, so memory is linear in T.

| backend     | runs where                                     | how                                          |
|-------------|------------------------------------------------|----------------------------------------------|
| `fa4`       | Hopper and Blackwell, bf16 and fp16, H 64, 128 | the package flash-attn-4                     |
| `flash`     | capability 8.0, bf16 and fp16, H % 8 == 0      | FlashAttention-2 inside PyTorch              |
| `efficient` | capability 7.5, bf16 from 8.0, H % 8 == 0      | PyTorch's memory-efficient attention; k, v   |
|             |                                                | are repeated for the heads that share them   |
| `rows`      | everywhere                                     | row by row; the backward computes it again   |

Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor
from torch.nn import functional

from deepdoctor.errors import KernelInputError

__all__ = [
    "Backend",
    "PackedRows",
    "attend_row",
    "attention_backward",
    "attention_forward",
    "choose_attention",
    "flash_can",
]

log = logging.getLogger(__name__)

Backend = Literal["fa4", "flash", "efficient", "rows"]

HALF_DTYPES = (torch.bfloat16, torch.float16)
CAUSAL_FROM_TOP_LEFT = 1
"""PyTorch's number of the mask in which token t of a row sees the tokens 0 to t of that row."""


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Where the packed rows lie; rows of no tokens are left out.

    row_lengths  tokens of each row, in order
    cu_seqlens   (rows + 1,) int32 on the device: where each row starts, and T
    longest      tokens of the longest row; 0 where there is none
    """

    row_lengths: tuple[int, ...]
    cu_seqlens: Tensor
    longest: int

    @classmethod
    def of(cls, row_lengths: Sequence[int], device: torch.device | str) -> PackedRows:
        """Rows of these lengths, with their starts copied to ``device``; a GPU is waited for.

        The last few are remembered. Raises KernelInputError for a negative length.
        """
        return _packed_rows(tuple(row_lengths), torch.device(device))

    @property
    def tokens(self) -> int:
        """Tokens of all rows, T."""
        return sum(self.row_lengths)


# Every layer of a generator's prefill asks for the same rows again.
@functools.lru_cache(maxsize=16)
def _packed_rows(row_lengths: tuple[int, ...], device: torch.device) -> PackedRows:
    if min(row_lengths, default=0) < 0:
        raise KernelInputError(f"row_lengths hold {min(row_lengths)}; expected lengths of at least 0")
    lengths = tuple(length for length in row_lengths if length)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return PackedRows(lengths, starts, max(lengths, default=0))


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """Name the fastest backend for tensors of ``dtype`` with ``head_dim`` on ``device``; the log says why, once."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _choose(device, dtype, head_dim)


@functools.cache
def _choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    chosen, why = _fastest(device, dtype, head_dim)
    log.info("attention of %s, head size %d, on %s: %s (%s)", dtype, head_dim, device, chosen, why)
    return chosen


def _fastest(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Backend, str]:
    if device.type != "cuda":
        return "rows", "no CUDA device"
    if torch.version.hip is not None:
        return "rows", "the other backends were not tried on ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    card = f"compute capability {major}.{minor}"
    missing = ""
    if major in (9, 10) and dtype in HALF_DTYPES and head_dim in (64, 128):
        if _has_fa4():
            return "fa4", card
        missing = "; flash-attn-4 is not installed"
    if flash_can(device, dtype, head_dim):
        return "flash", card + missing
    oldest = (8, 0) if dtype == torch.bfloat16 else (7, 5)
    if (major, minor) >= oldest and dtype in (*HALF_DTYPES, torch.float32) and head_dim % 8 == 0:
        return "efficient", f"{card}; flash takes bf16 and fp16 from 8.0, head sizes that are multiples of 8 up to 256"
    return "rows", f"{card}; no fused kernel takes this dtype and head size"


@functools.cache
def _keep_compiled() -> None:
    """Let flash-attn-4 keep what it compiles on disk, unless the user decided otherwise; before its first import."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


@functools.cache
def flash_can(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's FlashAttention-2 takes such tensors."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    fits = dtype in HALF_DTYPES and head_dim % 8 == 0 and head_dim <= 256
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


def _has_fa4() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("cutlass", "flash_attn.cute"))
    except ImportError:  # flash_attn itself is missing, or an older one that cannot be imported
        return False


@torch.no_grad()
def attention_forward(
    qkv: Tensor, key_heads: int, rows: PackedRows, *, backend: Backend, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attend causally within each packed row.

    qkv        (T, N + 2K, H)  contiguous, rotated; N query heads, then K key heads, then K value heads
    key_heads  K; N is a multiple of it
    rows       lengths that add up to T, starts on qkv's device
    backend    what `choose_attention` named
    out        (T, N, H) to write to, strides (any, H, 1); allocated when None
    returns    out and what the backward needs beside it: small fp32 tensors, no copy of qkv or out

    Raises KernelInputError on any mismatch above, and where the backend refuses.
    """
    heads = _query_heads("attention_forward", qkv, key_heads, rows, backend)
    shape = (qkv.shape[0], heads, qkv.shape[2])
    if out is not None and (
        tuple(out.shape) != shape or out.dtype != qkv.dtype or out.device != qkv.device or not _is_row_view(out)
    ):
        raise KernelInputError(
            f"attention_forward: out is {tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}; "
            f"expected {shape} {qkv.dtype} on {qkv.device}, strides (any, {qkv.shape[2]}, 1)"
        )
    if backend == "rows" or not rows.longest:
        if out is None:
            out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
        for row, place in zip(qkv.split(rows.row_lengths), out.split(rows.row_lengths), strict=True):
            place.copy_(attend_row(row, key_heads))
        return out, ()
    q, k, v = qkv.split([heads, key_heads, key_heads], 1)
    try:
        attended, saved = _FORWARD[backend](q, k, v, rows, out)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _refused(backend, qkv, error)
    if out is None or out is attended:
        return attended, saved
    return out.copy_(attended), saved


@torch.no_grad()
def attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    saved: tuple[Tensor, ...],
    key_heads: int,
    rows: PackedRows,
    *,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from the gradient of `attention_forward`'s output.

    d_out       (T, N, H)  strides (any, H, 1)
    out, saved  what the forward returned; the other arguments as there
    returns     dq (T, N, H), dk (T, K, H), dv (T, K, H), last dimension contiguous

    Raises KernelInputError on any mismatch above, and where the backend refuses.
    """
    heads = _query_heads("attention_backward", qkv, key_heads, rows, backend)
    shape = (qkv.shape[0], heads, qkv.shape[2])
    for name, given in (("d_out", d_out), ("out", out)):
        if tuple(given.shape) != shape or given.dtype != qkv.dtype or not _is_row_view(given):
            raise KernelInputError(
                f"attention_backward: {name} is {tuple(given.shape)} {given.dtype}, strides {given.stride()}; "
                f"expected {shape} {qkv.dtype}, strides (any, {qkv.shape[2]}, 1)"
            )
    q, k, v = qkv.split([heads, key_heads, key_heads], 1)
    if not rows.longest:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if backend == "rows":
        d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        places = d_qkv.split(rows.row_lengths)
        for row, upstream, place in zip(
            qkv.split(rows.row_lengths), d_out.split(rows.row_lengths), places, strict=True
        ):
            leaf = row.detach().requires_grad_()
            with torch.enable_grad():
                again = attend_row(leaf, key_heads)
            place.copy_(torch.autograd.grad(again, leaf, upstream)[0])
        dq, dk, dv = d_qkv.split([heads, key_heads, key_heads], 1)
        return dq, dk, dv
    try:
        return _BACKWARD[backend](d_out, q, k, v, out, saved, rows)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _refused(backend, qkv, error)


def attend_row(qkv: Tensor, key_heads: int) -> Tensor:
    """Causal attention within one row: qkv (T, N + 2K, H) gives (T, N, H), by PyTorch's fused attention."""
    heads = qkv.shape[1] - 2 * key_heads
    q, k, v = qkv.transpose(0, 1).unsqueeze(0).split([heads, key_heads, key_heads], dim=1)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != key_heads)
    return out.squeeze(0).transpose(0, 1)


def _fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, out: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    _keep_compiled()
    from flash_attn.cute.interface import _flash_attn_fwd

    # The kernel writes rows whose start and strides are multiples of 16 bytes.
    if out is not None and (out.data_ptr() % 16 or out.stride(0) * out.itemsize % 16):
        out = None
    attended, lse = _flash_attn_fwd(q, k, v, causal=True, return_lse=True, out=out, **_fa4_rows(rows))[:2]
    return attended, (lse,)


def _fa4_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Tensor, ...], rows: PackedRows
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (q, k, v))
    _flash_attn_bwd(q, k, v, out, d_out, saved[0], causal=True, dq=dq, dk=dk, dv=dv, **_fa4_rows(rows))
    return dq, dk, dv


def _fa4_rows(rows: PackedRows) -> dict[str, Any]:
    return {
        "cu_seqlens_q": rows.cu_seqlens,
        "cu_seqlens_k": rows.cu_seqlens,
        "max_seqlen_q": rows.longest,
        "max_seqlen_k": rows.longest,
    }


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, out: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    starts, longest = rows.cu_seqlens, _flash_longest(rows)
    attended, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False
    )
    return attended, (lse, seed, unused)


def _flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Tensor, ...], rows: PackedRows
) -> tuple[Tensor, Tensor, Tensor]:
    lse, seed, unused = saved
    starts, longest = rows.cu_seqlens, _flash_longest(rows)
    return torch.ops.aten._flash_attention_backward(
        d_out, q, k, v, out, lse, starts, starts, longest, longest, 0.0, True, seed, unused
    )


def _flash_longest(rows: PackedRows) -> int:
    # Only a bound. For 1 the forward takes a path for decoding whose logsumexp has another layout.
    return max(rows.longest, 2)


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, out: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    starts = rows.cu_seqlens
    attended, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
        q.unsqueeze(0),
        _repeat(k, q.shape[1]),
        _repeat(v, q.shape[1]),
        None,
        starts,
        starts,
        rows.longest,
        rows.longest,
        0.0,
        CAUSAL_FROM_TOP_LEFT,
        True,
    )
    return attended.squeeze(0), (lse, seed, offset)


def _efficient_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Tensor, ...], rows: PackedRows
) -> tuple[Tensor, Tensor, Tensor]:
    lse, seed, offset = saved
    starts = rows.cu_seqlens
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        d_out.contiguous().unsqueeze(0),
        q.unsqueeze(0),
        _repeat(k, q.shape[1]),
        _repeat(v, q.shape[1]),
        None,
        out.contiguous().unsqueeze(0),
        starts,
        starts,
        rows.longest,
        rows.longest,
        lse,
        0.0,
        seed,
        offset,
        CAUSAL_FROM_TOP_LEFT,
        False,
    )
    return dq.squeeze(0), _sum_groups(dk.squeeze(0), k.shape[1]), _sum_groups(dv.squeeze(0), k.shape[1])


def _repeat(kv: Tensor, heads: int) -> Tensor:
    """(T, K, H) as (1, T, N, H): each key head once for every query head of its group."""
    if kv.shape[1] != heads:
        kv = kv.repeat_interleave(heads // kv.shape[1], dim=1)
    return kv.unsqueeze(0)


def _sum_groups(grad: Tensor, key_heads: int) -> Tensor:
    """(T, N, H) summed within each group, in fp32: (T, K, H)."""
    if grad.shape[1] == key_heads:
        return grad
    return grad.unflatten(1, (key_heads, -1)).sum(2)


_FORWARD = {"fa4": _fa4_forward, "flash": _flash_forward, "efficient": _efficient_forward}
_BACKWARD = {"fa4": _fa4_backward, "flash": _flash_backward, "efficient": _efficient_backward}


def _query_heads(name: str, qkv: Tensor, key_heads: int, rows: PackedRows, backend: str) -> int:
    """N, after checking what forward and backward share."""
    heads = qkv.shape[1] - 2 * key_heads if qkv.dim() == 3 else 0
    fits = heads >= 1 and key_heads >= 1 and heads % key_heads == 0 and qkv.is_contiguous()
    if not fits or rows.tokens != qkv.shape[0] or rows.cu_seqlens.device != qkv.device:
        raise KernelInputError(
            f"{name}: qkv {tuple(qkv.shape)} strides {qkv.stride()} on {qkv.device}, {key_heads} key heads, "
            f"{rows.tokens} tokens in {len(rows.row_lengths)} rows on {rows.cu_seqlens.device} do not fit: rows must "
            "add up to T, query heads be a multiple of key heads, qkv be contiguous"
        )
    if backend not in get_args(Backend):
        raise KernelInputError(f"{name}: backend is {backend!r}; expected one of {', '.join(get_args(Backend))}")
    return heads


def _is_row_view(tensor: Tensor) -> bool:
    """Strides (any, H, 1); those of dimensions of one element do not matter."""
    _, heads, head_dim = tensor.shape
    return (tensor.stride(2) == 1 or head_dim == 1) and (tensor.stride(1) == head_dim or heads == 1)


def _refused(backend: str, qkv: Tensor, error: Exception) -> NoReturn:
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    raise KernelInputError(
        f"attention backend {backend!r} refused qkv {tuple(qkv.shape)} {qkv.dtype} on {qkv.device}: {first}",
        hint="backend='rows' runs everywhere; choose_attention names the fastest that this card can run",
    ) from error
