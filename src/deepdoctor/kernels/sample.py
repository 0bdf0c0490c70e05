"""Drawing the next token of many rows of logits: greedy, or temperature with top-k, top-p and min-p.

For one row, with y its logits after the repetition penalty, m the largest of them and T the temperature:

    d = (y - m) / T                  w = exp(d), so w / sum(w) are the probabilities
    top-k    a token stays where fewer than k tokens have a larger y
    top-p    of these: where the w of those with a larger y sum to less than top_p times the w of all of these
    min-p    of these: where w >= min_p, which is p >= min_p * max p
    token    of these: the one with the largest w / -log(1 - u), the lowest id where two are equal

The last line draws from the probabilities of what stays (the Gumbel-max trick; Maddison et al. 2014, arXiv 1411.0030).
Temperature 0 is greedy: the largest y, the lowest id where two are equal. Tokens of equal y stay or go together, so
top_k 1 is greedy only where one y is largest; where several are, it draws among them. No definition asks for an order,
so a row needs no sort. A row that has a nan or +inf, or nothing but -inf, gives BROKEN.

The noise u has no state: it follows from the request's seed, the number of the draw and the token's id by a hash. It is
a multiple of 2^-31 plus 2^-32, rounded to fp32 and at most 1 - 2^-24. It is small where a token is favoured, so a token
of probability 2^-30 is still drawn about as often as it should be. CPU and GPU agree on every bit of y, d and u, and
differ in the last bits of exp, log and sums.

n rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepdoctor.errors import KernelInputError
from deepdoctor.kernels.choose import Impl, use_triton
from deepdoctor.kernels.rows import check_contiguous, check_rows

__all__ = ["BROKEN", "SampleSettings", "pack_settings", "penalise", "sample", "uniform", "weaken"]

BROKEN = -1
"""Instead of a token, where the row's largest logit is not finite."""
LARGEST_INVERSE = 3e38
"""Of 1 / temperature: a product of zero and infinity would be nan."""
DEPTHS = (2.0, 4.0, 8.0, math.inf)
"""Tokens looked at for top_p, by their distance -d from the likeliest; deeper where those do not hold top_p."""
_MASK = 0xFFFFFFFF
_STEP = 0x9E3779B9
_FIELDS = 8


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """Settings of n rows on a device, one (n, 8) int32 tensor, so that one copy brings them.

    packed: seed (low word, high word), number, top_k; then, as bits of fp32, temperature, top_p, log(min_p), penalty.
    sampled: some row has a temperature above 0. cut: some such row has top_k or top_p. A replayed CUDA graph reads
    packed alone, so it does for settings whose sampled and cut are not above those it was captured with.
    """

    packed: Tensor
    sampled: bool
    cut: bool

    def _floats(self, field: int) -> Tensor:
        return self.packed.view(torch.float32)[:, field]

    @property
    def top_k(self) -> Tensor:
        """(n,) int32; 0 is off."""
        return self.packed[:, 3]

    @property
    def temperature(self) -> Tensor:
        """(n,) fp32; 0 is greedy."""
        return self._floats(4)

    @property
    def top_p(self) -> Tensor:
        """(n,) fp32; 1 is off."""
        return self._floats(5)

    @property
    def log_min_p(self) -> Tensor:
        """(n,) fp32; -inf is off."""
        return self._floats(6)

    @property
    def penalty(self) -> Tensor:
        """(n,) fp32; 1 is off."""
        return self._floats(7)


def pack_settings(
    temperature: Sequence[float],
    *,
    top_k: Sequence[int] | None = None,
    top_p: Sequence[float] | None = None,
    min_p: Sequence[float] | None = None,
    penalty: Sequence[float] | None = None,
    seed: Sequence[int] | None = None,
    number: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    out: SampleSettings | None = None,
) -> SampleSettings:
    """Bring the settings of n rows to a device with one copy, which the host does not wait for.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and penalty 1 are off, and so is a list that is None.
    seed: 64 bits count. number: draws of the request before this one; 31 bits count. out: settings whose tensor is
    written instead of a new one, for a CUDA graph; device is then its device. Nothing is checked: ranges are those of
    ``model.sampling.check_sampling``. Raises KernelInputError where out has another number of rows.
    """
    rows = len(temperature)
    if out is not None and len(out.packed) != rows:
        raise KernelInputError(f"pack_settings: out has {len(out.packed)} rows, expected {rows}")
    device = torch.device(device) if out is None else out.packed.device
    host = torch.empty(rows, _FIELDS, dtype=torch.int32, pin_memory=device.type == "cuda")
    words = host.numpy()
    bits, floats = words.view(np.uint32), words.view(np.float32)
    seeds = [0] * rows if seed is None else seed
    bits[:, 0] = [value & _MASK for value in seeds]
    bits[:, 1] = [value >> 32 & _MASK for value in seeds]
    words[:, 2] = 0 if number is None else number
    words[:, 3] = 0 if top_k is None else top_k
    floats[:, 4] = temperature
    floats[:, 5] = 1 if top_p is None else top_p
    floats[:, 6] = -math.inf if min_p is None else [math.log(value) if value else -math.inf for value in min_p]
    floats[:, 7] = 1 if penalty is None else penalty
    drawn = floats[:, 4] > 0
    packed = host.to(device, non_blocking=True) if out is None else out.packed.copy_(host, non_blocking=True)
    cut = drawn & ((words[:, 3] > 0) | (floats[:, 5] < 1))
    return SampleSettings(packed, bool(drawn.any()), bool(cut.any()))


@torch.no_grad()
def sample(
    logits: Tensor,
    settings: SampleSettings,
    seen: Tensor | None = None,
    *,
    out: Tensor | None = None,
    logprobs: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Draw one token from every row of logits. A row's token depends on its own logits and settings alone.

    logits    (n, V)  bf16 | fp16 | fp32, rows contiguous, any row stride; never written
    settings          of n rows, on the same device
    seen      (n, V)  bool, rows contiguous: tokens that the penalty acts on; None: no row has a penalty
    out       (n,)    int64 for the tokens; a new tensor where None
    logprobs  (n,)    fp32, or None: written with the log probability of each token under the plain softmax of logits,
                      before any setting; nan for a BROKEN row
    returns   out: tokens in [0, V), or BROKEN

    The kernel does not wait for the device, so it can be captured in a CUDA graph; the reference does, on any device.
    Raises KernelInputError on any mismatch above.
    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise KernelInputError(f"sample: logits are {tuple(logits.shape)}, expected (n, V), V at least 1")
    check_rows("sample", "logits", logits, logits.shape, logits)
    rows, device = logits.shape[0], logits.device
    check_contiguous("sample", "settings", settings.packed, (rows, _FIELDS), torch.int32, device)
    if seen is not None:
        if seen.dtype != torch.bool:
            raise KernelInputError(f"sample: seen is {seen.dtype}, expected bool")
        if seen.shape != logits.shape or seen.device != device or (seen.numel() > 1 and seen.stride(1) != 1):
            raise KernelInputError(
                f"sample: seen is {tuple(seen.shape)} on {seen.device}, strides {seen.stride()}; expected "
                f"{tuple(logits.shape)} on {device}, contiguous rows"
            )
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=device)
    check_contiguous("sample", "out", out, (rows,), torch.int64, device)
    if logprobs is not None:
        check_contiguous("sample", "logprobs", logprobs, (rows,), torch.float32, device)
    if not rows:
        return out
    if use_triton(impl, logits):
        from deepdoctor.kernels import sample_triton

        sample_triton.sample(logits, settings.packed, seen, out, logprobs, settings.sampled, settings.cut)
        return out
    return _reference(logits, settings, seen, out, logprobs)


def _reference(
    logits: Tensor, settings: SampleSettings, seen: Tensor | None, out: Tensor, logprobs: Tensor | None
) -> Tensor:
    scores = logits
    if seen is not None and bool((settings.penalty != 1).any()):
        scores = penalise(logits.float(), seen, settings.penalty[:, None])
    torch.argmax(scores, -1, out=out)
    largest = scores.gather(-1, out[:, None]).squeeze(-1).float()
    broken = ~largest.isfinite()
    if settings.sampled:
        inverse = settings.temperature.reciprocal().clamp_(max=LARGEST_INVERSE)
        temperatures = settings.temperature.tolist()
        # Row by row: what one row needs stays in the cache of a core.
        for row in (~broken).nonzero()[:, 0].tolist():
            if temperatures[row] > 0:
                y = scores[row].float()
                out[row] = _draw(y, (y - largest[row]).mul_(inverse[row]), *_host_values(settings, row))
    if logprobs is not None:
        chosen = logits.gather(-1, out[:, None]).squeeze(-1).float()
        torch.sub(chosen, logits.float().logsumexp(-1), out=logprobs)
        logprobs[broken] = math.nan
    return out.masked_fill_(broken, BROKEN)


def _host_values(settings: SampleSettings, row: int) -> tuple[int, int, int, float, float]:
    """Seed, number, top_k, top_p and log(min_p) of one row."""
    low, high, number, top_k = settings.packed[row, :4].tolist()
    return (low & _MASK) | high << 32, number, top_k, float(settings.top_p[row]), float(settings.log_min_p[row])


def _draw(y: Tensor, d: Tensor, seed: int, number: int, top_k: int, top_p: float, log_min_p: float) -> Tensor:
    """Token () int64 of one row: y, d (V,) fp32."""
    size = y.shape[0]
    total = None
    if 0 < top_k < size:
        tokens = (y >= y.topk(top_k).values[-1]).nonzero()[:, 0]
    elif top_p < 1:
        w = d.exp()
        total = w.sum(dtype=torch.float64)
        for depth in DEPTHS:
            # Where the w of the tokens down to here reach top_p, none below them stays.
            within = d >= -depth
            if bool((w * within).sum(dtype=torch.float64) >= top_p * total):
                break
        tokens = within.nonzero()[:, 0]
    elif log_min_p > -math.inf:
        tokens = (d >= log_min_p).nonzero()[:, 0]
    else:
        return _take(d.exp_(), uniform(seed, number, torch.arange(size, device=y.device)))
    d = d[tokens]
    stay = d >= log_min_p
    if top_p < 1:
        ordered, order = y[tokens].sort(descending=True)
        w = d[order].double().exp_()
        end = w.cumsum(-1)
        # Those before a token in this order are those of larger y, and some of equal y, whose first decides for them.
        count = int((end - w < top_p * (end[-1] if total is None else total)).sum())
        stay &= y[tokens] >= ordered[max(count, 1) - 1]
    tokens = tokens[stay]
    return tokens[_take(d[stay].exp_(), uniform(seed, number, tokens))]


def _take(w: Tensor, u: Tensor) -> Tensor:
    return (w / u.neg_().log1p_().neg_()).argmax()


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens seen before less likely.

    logits (n, V) fp32; seen (n, V) bool; penalty (n, 1) fp32; returns (n, V). Source: CTRL (arXiv 1909.05858).
    """
    return torch.where(seen, weaken(logits, penalty), logits)


def weaken(logits: Tensor, penalty: Tensor) -> Tensor:
    """Logits (n, m) fp32 under a penalty (n, 1): positive ones divided by it, negative ones multiplied."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _mixed(h: int) -> int:
    """A bijection of 32-bit numbers in which every input bit reaches every output bit.

    Constants: lowbias32, C. Wellons, public domain.
    """
    h = (h ^ h >> 16) * 0x7FEB352D & _MASK
    h = (h ^ h >> 15) * 0x846CA68B & _MASK
    return h ^ h >> 16


def _mix(h: Tensor) -> Tensor:
    """_mixed of every element, in place: int32, whose products wrap and whose shifts bring copies of the sign."""
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= 0x7FEB352D
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= 0x846CA68B - (1 << 32)
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h


def uniform(seed: int, number: int, tokens: Tensor) -> Tensor:
    """Numbers in (0, 1), (n,) fp32, that look independent for every seed (64 bits), draw and token (n,) int64."""
    keys = []
    for key in (0, _STEP):
        for part in (seed, seed >> 32, number):
            key = _mixed(key + (part & _MASK) + _STEP & _MASK)
        keys.append(key - (key >> 31 << 32))
    h = _mix(_mix(tokens.to(torch.int32) ^ keys[0]).add_(keys[1]))
    return (h >> 1).bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
