"""8-bit AdamW in Triton: one launch for a tensor, one program for a block of 256 elements.

What is computed stands in ``adamw_8bit.py``, bit for bit: products are not fused into sums, division and root are
rounded to nearest. Moments stay in registers between reading and writing their codes, so the traffic is 16 bytes an
element; the tables that turn codes into values and back stay in the L1 cache. Arguments are checked there. Offsets are
int64.

No argument is specialised: a step, a rate or a size compiles nothing anew. It also keeps Triton from giving a thread
four neighbouring elements, a layout that would go through shared memory before and after each of the six look-ups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepdoctor.kernels.adamw_8bit import BLOCK, Factors, code_values, search_tables

__all__ = ["update"]

# Four elements a thread.
WARPS = 2
# As in adamw_8bit.py; a smaller constant would be fp64 in Triton.
SMALLEST_ABSMAX = tl.constexpr(2.0**-126)


@triton.jit
def _nearest(x, table, middles):
    """Code (uint8) of the value nearest to x; middles (255,), table as in ``search_tables``."""
    key = (x.to(tl.int32, bitcast=True) >> 16) + 32768
    below = tl.load(table + key).to(tl.int32)
    return (below + (x > tl.load(middles + below)).to(tl.int32)).to(tl.uint8)


@triton.jit
def _largest(moment):
    """Largest size in the block, and what to scale the block by."""
    absmax = tl.max(tl.abs(moment), axis=0)
    return absmax, tl.div_rn(1.0, tl.maximum(absmax, SMALLEST_ABSMAX))


# fmt: off
@triton.jit(do_not_specialize=[
    "p", "g", "state1", "state2", "absmax1", "absmax2", "code1", "code2", "table1", "middles1", "table2", "middles2",
    "decay", "beta1", "rate1", "beta2", "rate2", "step_size", "eps", "n",
])
def _update(
    p, g, state1, state2, absmax1, absmax2, code1, code2, table1, middles1, table2, middles2,
    decay, beta1, rate1, beta2, rate2, step_size, eps, n,
    BLOCK: tl.constexpr,
):
    # fmt: on
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    gradient = tl.load(g + at, mask=mask, other=0.0)
    first = tl.load(state1 + at, mask=mask, other=0).to(tl.int32)
    second = tl.load(state2 + at, mask=mask, other=0).to(tl.int32)
    weight = tl.load(p + at, mask=mask, other=0.0)
    m = tl.load(code1 + first) * tl.load(absmax1 + block)
    v = tl.load(code2 + second) * tl.load(absmax2 + block)
    square = gradient * gradient
    counts = mask & (square < float("inf"))
    m = tl.where(counts, m * beta1 + gradient * rate1, 0.0)
    v = tl.where(counts, v * beta2 + square * rate2, 0.0)
    moved = weight * decay + step_size * tl.div_rn(m, tl.sqrt_rn(v) + eps)
    tl.store(p + at, tl.where(counts, moved, weight), mask=mask)
    absmax, inverse = _largest(m)
    tl.store(absmax1 + block, absmax)
    tl.store(state1 + at, _nearest(m * inverse, table1, middles1), mask=mask)
    absmax, inverse = _largest(v)
    tl.store(absmax2 + block, absmax)
    tl.store(state2 + at, _nearest(v * inverse, table2, middles2), mask=mask)


def update(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    factors: Factors,
) -> None:
    """Update parameter and state in place."""
    n, device = parameter.numel(), parameter.device
    if not n:
        return
    (table1, middles1), (table2, middles2) = search_tables(device)
    with torch.cuda.device_of(parameter):
        _update[(triton.cdiv(n, BLOCK),)](
            parameter, gradient, state1, state2, absmax1, absmax2,
            *code_values(device), table1, middles1, table2, middles2, *factors, n,
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
