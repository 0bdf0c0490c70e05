"""Attention of one new token per slot over keys and values that lie in blocks, and the way of that token into them.

B slots, N query heads, K key heads, H head dim. Position p of a slot lies in block
``block_table[slot, p // block_size]`` of a cache (blocks, K, block_size, H), at place p % block_size. N / K query heads
share one key head (GQA, arXiv 2305.13245)::

    out = softmax(scale · q k^T) v        over the positions 0 to length - 1 of the slot

``rope_and_store`` comes first: it rotates q and k of the new token, as ``rope.py`` does, and writes k and v to their
block; lengths then count the new token too. A slot that is idle has length 0 and position -1: its output is zeros, and
nothing of it is read or written.

A cache holds the dtype of q, or 8 bits: e4m3 or int8 under the largest magnitude of each head of each position, in
fp32 and beside it. With L the largest number of the format (448, 127)::

    stored = round(x · L / absmax)        x ~ stored · absmax / L

Scores and weights are multiplied by the absmax, so that keys and values enter the products as they are stored.

Everything that changes from step to step (positions, lengths, block table) is read on the device and every result has
its place given, so the kernels may be captured in a CUDA graph.

The PyTorch code below is the reference and the CPU path: it gathers a slot's blocks, attends in fp32 and rounds once.
``paged_attention_triton.py`` holds the kernels. Paging: Kwon et al. 2023 (arXiv 2309.06180).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.fp8 import E4M3
from deepdoctor.kernels.rows import FLOAT_DTYPES, check_contiguous

__all__ = [
    "LARGEST",
    "as_indexed",
    "no_eight_bits_because",
    "paged_attention",
    "paged_scratch_elements",
    "quantize_heads",
    "rope_and_store",
]

LARGEST = {E4M3: 448.0, torch.int8: 127.0}
"""The largest number of each 8-bit format that a cache may hold."""
SMALLEST_HEAD = 1e-30
"""Heads whose largest value is less get the absmax of this: zeros stay zeros."""
CAPABILITY = (8, 9)
"""First compute capability that converts to and from e4m3: Ada (8.9), Hopper (9.0)."""


def no_eight_bits_because(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot read a cache of this dtype on a GPU, or None where they can."""
    if dtype == E4M3 and device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return f"{name} cannot convert fp8 (compute capability {capability[0]}.{capability[1]}, 8.9 or more needed)"
    return None


def quantize_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x (..., H) as a cache of ``dtype`` (e4m3 or int8) stores it, and the absmax (...) in fp32.

    Rounded to nearest even; the scale is taken in fp32. The absmax of a head with a nan or inf is nan.
    """
    wide = x.float()
    absmax = wide.abs().amax(-1).clamp_(min=SMALLEST_HEAD)
    absmax.masked_fill_(absmax.isinf(), torch.nan)
    scaled = wide * (LARGEST[dtype] / absmax)[..., None]
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), absmax


def paged_scratch_elements(slots: int, heads: int, head_dim: int, splits: int) -> int:
    """Return how many fp32 elements of scratch ``paged_attention`` needs; 0 for one split."""
    return slots * heads * splits * (head_dim + 2) if splits > 1 else 0


@torch.no_grad()
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    out: Tensor,
    absmax: Tensor | None = None,
    splits: int = 1,
    scratch: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend from one token per slot and write into out, which is returned.

    q            (B, N, H)  bf16 | fp16 | fp32, heads contiguous and side by side: a slice of qkv will do
    k, v         (blocks, K, block_size, H)  contiguous, dtype of q, or e4m3 | int8 with absmax; K divides N
    block_table  (B, M)     int32, contiguous; entries past a slot's length are not read
    lengths      (B,)       int32, contiguous: filled positions, at most M · block_size; 0: the slot is idle
    out          (B, N, H)  contiguous, dtype of q
    absmax       (2, blocks, K, block_size)  fp32, contiguous: of k and of v where they are 8 bits, else None
    splits       pieces that each slot's positions are cut into, for the GPU: slots · K · splits programs run
    scratch      fp32, contiguous, ``paged_scratch_elements`` or more, overwritten; allocated when None
    scale        1 / sqrt(H) when None
    impl         "triton" takes bf16 and fp16, H of 16 to 256 and block_size of 16 to 128, each a power of two; "auto"
                 takes PyTorch for others, and for e4m3 below compute capability 8.9; that waits for the device

    Raises KernelInputError on any mismatch above; values of block_table and lengths are not looked at.
    """
    op = "paged_attention"
    _check_cache(op, k, v, absmax, q, "q")
    slots, heads, head_dim = q.shape
    if heads % k.shape[1] or q.stride()[1:] != (head_dim, 1):
        raise KernelInputError(
            f"{op}: q is {tuple(q.shape)}, strides {q.stride()}; expected contiguous heads side by side, "
            f"a multiple of the {k.shape[1]} key heads"
        )
    check_contiguous(op, "out", out, q.shape, q.dtype, q.device)
    _check_table(op, block_table, "lengths", lengths, slots, q.device)
    if splits < 1:
        raise KernelInputError(f"{op}: splits is {splits}, expected 1 or more")
    scale = head_dim**-0.5 if scale is None else scale
    if not _kernel(op, impl, q, k):
        return _attend(q, (k, v), absmax, block_table, lengths, out, scale)
    elements = paged_scratch_elements(slots, heads, head_dim, splits)
    if scratch is None:
        scratch = torch.empty(elements, dtype=torch.float32, device=q.device)
    if scratch.numel() < elements or scratch.dtype != torch.float32 or not scratch.is_contiguous():
        raise KernelInputError(f"{op}: scratch has {scratch.numel()} {scratch.dtype}, expected {elements} of fp32")
    from deepdoctor.kernels import paged_attention_triton

    paged_attention_triton.attend(q, k, v, absmax, block_table, lengths, out, splits, scratch, scale)
    return out


@torch.no_grad()
def rope_and_store(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    *,
    absmax: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Rotate q in place; write the rotated k, and v, of each slot's new token to its block.

    qkv          (B, N + 2K, H)  bf16 | fp16 | fp32, contiguous, H even: q, k and v side by side
    cos_sin      (P, H)     fp32, contiguous: cos and sin of each position side by side (``rope.rope_tables``); rounded
                 to qkv's dtype, the products summed in fp32 and rounded once, as ``rope.rope_qkv_`` does
    positions    (B,)       int32, contiguous: of the new token, below P and M · block_size; -1: the slot is idle
    k, v         (blocks, K, block_size, H)  contiguous, dtype of qkv, or e4m3 | int8 with absmax: ``quantize_heads`` of
                 what is rounded to qkv's dtype
    block_table  (B, M)     int32, contiguous
    absmax       (2, blocks, K, block_size)  fp32, contiguous, where k and v are 8 bits: gets those of the new token
    returns      qkv, whose k and v heads are as they were

    Raises KernelInputError on any mismatch above; values of positions and block_table are not looked at.
    """
    op = "rope_and_store"
    _check_cache(op, k, v, absmax, qkv, "qkv")
    slots, heads, head_dim = qkv.shape
    key_heads = k.shape[1]
    if head_dim % 2 or not qkv.is_contiguous() or heads <= 2 * key_heads:
        raise KernelInputError(
            f"{op}: qkv is {tuple(qkv.shape)}, strides {qkv.stride()}; expected a contiguous (B, more than "
            f"{2 * key_heads}, even H)"
        )
    check_contiguous(op, "cos_sin", cos_sin, (cos_sin.shape[0], head_dim), torch.float32, qkv.device)
    _check_table(op, block_table, "positions", positions, slots, qkv.device)
    if _use_triton(op, impl, qkv, k):
        from deepdoctor.kernels import paged_attention_triton

        paged_attention_triton.rope_and_store(qkv, cos_sin, positions, k, v, absmax, block_table)
        return qkv
    live = (positions >= 0).nonzero().flatten()
    at = positions[live].long()
    cos, sin = cos_sin[at].to(qkv.dtype).float()[:, None].chunk(2, dim=-1)
    rotated, values = qkv[live].split([heads - key_heads, key_heads], dim=1)
    a, b = rotated.float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(qkv.dtype)
    blocks, places = block_table[live, at // k.shape[2]].long(), at % k.shape[2]
    qkv[live, : heads - 2 * key_heads] = turned[:, :-key_heads]
    for which, (cache, new) in enumerate(((k, turned[:, -key_heads:]), (v, values))):
        if absmax is not None:
            new, absmax[which][blocks, :, places] = quantize_heads(new, cache.dtype)
        as_indexed(cache)[blocks, :, places] = as_indexed(new)
    return qkv


def as_indexed(cache: Tensor) -> Tensor:
    """A view that PyTorch can index: the bytes of e4m3, any other dtype as it is."""
    return cache.view(torch.uint8) if cache.dtype == E4M3 else cache


def _attend(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    absmax: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    out: Tensor,
    scale: float,
) -> Tensor:
    """Slot by slot in fp32, over the blocks that are filled."""
    _, key_heads, size, _ = kv[0].shape
    group = q.shape[1] // key_heads
    for slot, length in enumerate(lengths.tolist()):
        if not length:
            out[slot] = 0
            continue
        blocks = block_table[slot, : -(-length // size)].long()
        held = [as_indexed(cache)[blocks].view(cache.dtype).float() for cache in kv]
        if absmax is not None:
            scales = absmax[:, blocks, ..., None].double() / LARGEST[kv[0].dtype]
            held = [(part * scale).float() for part, scale in zip(held, scales, strict=True)]
        # (blocks, K, block_size, H) -> (K, positions, H)
        keys, values = (part.transpose(0, 1).flatten(1, 2)[:, :length] for part in held)
        heads = q[slot].unflatten(0, (-1, group)).float()
        weights = (heads @ keys.transpose(1, 2)).mul_(scale).softmax(-1)
        out[slot] = (weights @ values).flatten(0, 1)
    return out


def _kernel(op: str, impl: Impl, q: Tensor, k: Tensor) -> bool:
    """Whether the Triton kernel attends."""
    if not _use_triton(op, impl, q, k):
        return False
    size, head_dim = k.shape[2:]
    fits = q.dtype != torch.float32 and _power(head_dim, 16, 256) and _power(size, 16, 128)
    if impl == "triton" and not fits:
        raise KernelInputError(
            f"{op}: impl is 'triton', but the kernel takes 16 bits, H of 16 to 256 and block_size of 16 to 128, powers "
            f"of two; they are {q.dtype}, {head_dim} and {size}",
            "use impl='auto'",
        )
    return fits


def _use_triton(op: str, impl: Impl, heads: Tensor, k: Tensor) -> bool:
    """As ``use_triton``; older cards have no conversion of e4m3."""
    if not use_triton(impl, heads):
        return False
    reason = no_eight_bits_because(k.device, k.dtype)
    if reason and impl == "triton":
        raise KernelInputError(f"{op}: impl is 'triton', but {reason}", "use impl='auto', or a cache of int8")
    return reason is None


def _power(number: int, low: int, high: int) -> bool:
    return low <= number <= high and number & (number - 1) == 0


def _check_cache(op: str, k: Tensor, v: Tensor, absmax: Tensor | None, heads: Tensor, name: str) -> None:
    """Refuse a cache that is not (blocks, K, block_size, H), and heads that are not (B, heads, H) beside it."""
    if k.dim() != 4 or k.dtype not in (*FLOAT_DTYPES, *LARGEST) or not k.is_contiguous() or 0 in k.shape[1:]:
        raise KernelInputError(
            f"{op}: k is {tuple(k.shape)} {k.dtype}, strides {k.stride()}; "
            "expected a contiguous (blocks, K, block_size, H) of bf16, fp16, fp32, e4m3 or int8"
        )
    check_contiguous(op, "v", v, k.shape, k.dtype, k.device)
    dtypes: tuple[torch.dtype, ...] = (k.dtype,)
    if k.dtype in LARGEST:
        dtypes = FLOAT_DTYPES
        if absmax is None:
            raise KernelInputError(f"{op}: absmax is None, but k is {k.dtype}; expected the absmax of k and v")
        check_contiguous(op, "absmax", absmax, (2, *k.shape[:3]), torch.float32, k.device)
    elif absmax is not None:
        raise KernelInputError(f"{op}: absmax is given, but k is {k.dtype}; expected e4m3 or int8")
    if heads.dim() != 3 or heads.shape[2] != k.shape[3] or heads.dtype not in dtypes or heads.device != k.device:
        wanted = " or ".join(map(str, dtypes))
        raise KernelInputError(
            f"{op}: {name} is {tuple(heads.shape)} {heads.dtype} on {heads.device}, "
            f"expected (B, heads, {k.shape[3]}) {wanted} on {k.device}"
        )


def _check_table(op: str, block_table: Tensor, name: str, numbers: Tensor, slots: int, device: torch.device) -> None:
    width = block_table.shape[1] if block_table.dim() == 2 else 1
    check_contiguous(op, "block_table", block_table, (slots, width), torch.int32, device)
    check_contiguous(op, name, numbers, (slots,), torch.int32, device)
