"""AdamW whose two moments are kept in one byte per element, in the state format of bitsandbytes' AdamW8bit.

Maths. m and v are the moments, t the step from 1 on, lr the learning rate; all in fp32, each operation rounded::

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps sqrt(1 - beta2^t))

An element whose g^2 is not finite (nan, inf, |g| > 1.8e19) is skipped: p stays, m and v start anew from zero.

State. Elements are cut into blocks of 256, the last may be shorter. A block keeps absmax = max |m| in fp32 and, for
each element, the index of the value of `dynamic_map()` nearest to m / absmax, the lower index where it lies half way;
likewise v with `dynamic_map_unsigned()`. A block of zeros has absmax 0 and reads back as zeros, whatever its codes.

The nearest value takes two look-ups: floats that share their upper 16 bits have at most one middle of two neighbouring
values among them, so a table of 65,536 bytes gives the index, and a comparison with that one middle finishes it.

bitsandbytes (0.50.2) differs in what does not matter at a usual learning rate:

- Its CUDA kernel decays the weight after the update, so decay also takes lr^2 weight_decay of the step. Its CPU code,
  PyTorch and the paper decay before, and so do we.
- Its CUDA kernel moves the code of a negative m that is nearest to zero to the value below zero, 5.5e-7 absmax. Its CPU
  code and ours leave it at zero.
- Its CUDA kernel takes 1 - beta in fp32 (5e-5 off for 0.999) and divides approximately. Its CPU code rounds m / absmax
  and v / absmax to a grid of 65,536 points over [-1, 1] first, and one gradient that is not finite spoils its block.

The PyTorch code below is the reference; `adamw_8bit_triton.py` does the same on CUDA in one launch.

Source: Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861); Loshchilov and Hutter
2017 (arXiv 1711.05101) for the decay.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.nf4 import dynamic_map

__all__ = ["BLOCK", "Factors", "adamw_8bit", "adamw_fp32", "code_values", "dynamic_map_unsigned", "search_tables"]

BLOCK = 256
"""Elements that share one absmax."""
KEY_BITS = 16
"""Upper bits of a float that the table of `search_tables` is indexed by."""
SMALLEST_ABSMAX = 2.0**-126
"""Blocks are scaled by no less, the smallest normal fp32 number, so that a block of zeros stays zeros."""
# Multiples of BLOCK: 256 KiB of fp32 scratch stays in a CPU core's cache, 16 MiB fills a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}

Factors = tuple[float, float, float, float, float, float, float]
"""1 - lr weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, minus the step size, eps sqrt(1 - beta2^t)."""


@torch.no_grad()
def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    impl: Impl = "auto",
) -> None:
    """Update parameter and state in place. All tensors contiguous, on one device; blocks = ceil(n / 256).

    parameter, gradient  n elements, any shape, fp32
    state1, state2       n elements, any shape, uint8: codes of the first and the second moment
    absmax1, absmax2     (blocks,) fp32; all zeros before the first step
    step                 1 for the first update
    impl                 "torch" works in chunks of fp32; state is the same bits either way, p too where torch rounds
                         its root to nearest (on a CPU with MKL it may be one unit off)

    Nothing waits for the device. Raises KernelInputError on any mismatch above.
    """
    n = parameter.numel()
    _check("parameter", parameter, torch.float32, n, parameter)
    _check("gradient", gradient, torch.float32, n, parameter)
    _check("state1", state1, torch.uint8, n, parameter)
    _check("state2", state2, torch.uint8, n, parameter)
    _check("absmax1", absmax1, torch.float32, -(-n // BLOCK), parameter)
    _check("absmax2", absmax2, torch.float32, -(-n // BLOCK), parameter)
    factors = _factors(step, learning_rate, betas, eps, weight_decay)
    if use_triton(impl, parameter):
        from deepdoctor.kernels import adamw_8bit_triton

        adamw_8bit_triton.update(parameter, gradient, state1, state2, absmax1, absmax2, factors)
        return
    code1, code2 = code_values(parameter.device)
    flat = [t.view(-1) for t in (parameter, gradient, state1, state2)]
    for start, stop in _spans(n, CHUNK_ELEMENTS.get(parameter.device.type, CHUNK_ELEMENTS["cuda"])):
        p, g, codes1, codes2 = (t[start:stop].view(-1, min(BLOCK, stop - start)) for t in flat)
        largest1, largest2 = (t[start // BLOCK : -(-stop // BLOCK)].unsqueeze(1) for t in (absmax1, absmax2))
        m, v = _read(codes1, largest1, code1), _read(codes2, largest2, code2)
        _advance(p, g, m, v, factors)
        tables = search_tables(parameter.device)
        _write(m, codes1, largest1, *tables[0])
        _write(v, codes2, largest2, *tables[1])


@torch.no_grad()
def adamw_fp32(
    parameter: Tensor,
    gradient: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The same update with moments in fp32, for tensors too small to be worth codes; in place, in PyTorch.

    All tensors: fp32, of one shape and device.
    """
    _advance(parameter, gradient, moment1, moment2, _factors(step, learning_rate, betas, eps, weight_decay))


def dynamic_map_unsigned() -> Tensor:
    """The 256 values of bitsandbytes' unsigned dynamic 8-bit type, (256,) fp32 on CPU, ascending.

    As ``nf4.dynamic_map``, with the sign's bit spent on twice as many values: decade d (0 to 6) has 2**(d + 1).
    """
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + 1) + 1, dtype=torch.float32, device="cpu")
        values.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    return torch.cat(values).sort().values


@functools.cache
def code_values(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of the codes of state1 and state2, (256,) fp32 each; shared by all callers on the device."""
    return dynamic_map().to(device), dynamic_map_unsigned().to(device)


@functools.cache
def search_tables(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For state1 and for state2: (65536,) uint8 and (255,) fp32, to find the nearest code of a float x.

    The float's upper 16 bits, read as a signed number plus 32768, index the first: how many middles between
    neighbouring values lie below every float of those bits, at most 254. The second: the middles.
    """
    (first, middles1), (second, middles2) = (_search_table(code) for code in (dynamic_map(), dynamic_map_unsigned()))
    return (first.to(device), middles1.to(device)), (second.to(device), middles2.to(device))


def _search_table(code: Tensor) -> tuple[Tensor, Tensor]:
    middles = (code[:-1] + code[1:]) / 2
    keys = torch.arange(-(1 << KEY_BITS - 1), 1 << KEY_BITS - 1, dtype=torch.int32, device="cpu") << 32 - KEY_BITS
    ends = torch.stack((keys, keys | (1 << 32 - KEY_BITS) - 1)).view(torch.float32)
    below = torch.bucketize(ends.sort(dim=0).values, middles)
    real = ends.isfinite().all(dim=0)
    assert int((below[1] - below[0])[real].max()) == 1, "two middles share their upper bits"
    return below[0].clamp_(max=middles.numel() - 1).to(torch.uint8), middles


def _factors(step: int, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Factors:
    if step < 1:
        raise KernelInputError(f"adamw_8bit: step is {step}, expected 1 for the first update")
    beta1, beta2 = float(betas[0]), float(betas[1])
    root = math.sqrt(1 - beta2**step)
    step_size = -learning_rate * root / (1 - beta1**step)
    return float(1 - learning_rate * weight_decay), beta1, 1 - beta1, beta2, 1 - beta2, float(step_size), eps * root


def _spans(n: int, chunk: int) -> list[tuple[int, int]]:
    """Whole blocks in chunks, then the shorter last block."""
    whole = n // BLOCK * BLOCK
    spans = [(start, min(start + chunk, whole)) for start in range(0, whole, chunk)]
    return [*spans, (whole, n)] if whole < n else spans


def _read(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """The moments that codes (rows, columns) with absmax (rows, 1) stand for, fp32."""
    return code.index_select(0, codes.reshape(-1).int()).view(codes.shape).mul_(absmax)


def _write(moments: Tensor, codes: Tensor, absmax: Tensor, table: Tensor, middles: Tensor) -> None:
    """Fill codes (rows, columns) and absmax (rows, 1) for moments (rows, columns), which are overwritten."""
    torch.amax(moments.abs(), dim=1, keepdim=True, out=absmax)
    scaled = moments.mul_(absmax.clamp(min=SMALLEST_ABSMAX).reciprocal_()).view(-1)
    keys = (scaled.view(torch.int32) >> 32 - KEY_BITS).add_(1 << KEY_BITS - 1)
    found = table.index_select(0, keys)
    above = torch.gt(scaled, middles.index_select(0, keys.copy_(found)))
    codes.copy_(found.add_(above.view(torch.uint8)).view(codes.shape))


def _advance(p: Tensor, g: Tensor, m: Tensor, v: Tensor, factors: Factors) -> None:
    """One update in place. Product and sum are rounded one by one, as in the Triton kernel."""
    decay, beta1, rate1, beta2, rate2, step_size, eps = factors
    square = g * g
    skipped = torch.lt(square, math.inf).logical_not_()
    m.mul_(beta1).add_(g * rate1).masked_fill_(skipped, 0)
    v.mul_(beta2).add_(square.mul_(rate2)).masked_fill_(skipped, 0)
    moved = torch.div(m, v.sqrt().add_(eps)).mul_(step_size).add_(p * decay)
    p.copy_(torch.where(skipped, p, moved))


def _check(name: str, tensor: Tensor, dtype: torch.dtype, n: int, like: Tensor) -> None:
    if tensor.dtype != dtype or tensor.numel() != n or tensor.device != like.device or not tensor.is_contiguous():
        raise KernelInputError(
            f"adamw_8bit: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides "
            f"{tensor.stride()}; expected {n} contiguous elements of {dtype} on {like.device}"
        )
