"""Paired statistics: the same questions answered by ``base`` and ``tuned``.

Every difference is tuned minus base. Shares and differences of shares lie in 0..1 and -1..1 (not points).

Which interval, and why. The usual normal interval for a paired difference of proportions collapses to zero width when
no pair is discordant and covers too rarely when few are. We use Tango's score interval (Statistics in Medicine
17:891-908, 1998): it stays inside -1..1, keeps a width with no discordant pair (plus or minus z^2 / (n + z^2)), and
its exact coverage at 95 % is never below 93 % from 10 pairs on and errs upwards where discordant pairs are rare (the
tests enumerate it).

Questions that repeat, or share a passage, are clusters. The design effect is the cluster-robust variance over the
variance of independent pairs (never below 1); counts are divided by it and enter the same interval with a t quantile
on clusters - 1 degrees of freedom (Rao and Scott, Biometrics 48:577-585, 1992). This interval is the one reported. The
plain cluster-robust interval and a cluster bootstrap stand beside it in ``stats.json`` as a check; they agree where
questions are many, and are too narrow where discordant pairs are few.

Several tasks: Holm's step-down keeps the chance of any false verdict at 5 %; the pooled difference counts every
question once. A harm check asks whether a loss beyond a margin, stated beforehand, can be ruled out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from deepdoctor.errors import DataError

__all__ = [
    "HarmCheck",
    "PairedDifference",
    "PairedMean",
    "Verdict",
    "cluster_bootstrap",
    "cluster_robust_interval",
    "difference_intervals",
    "harm_check",
    "heterogeneity",
    "holm",
    "mcnemar_exact",
    "minimum_detectable_difference",
    "paired_difference",
    "paired_mean",
    "proportion_interval",
    "tango_interval",
    "verdict",
]

Verdict = Literal["better", "worse", "cannot tell"]
Clusters = Sequence[Any] | NDArray[Any] | None
Floats = NDArray[np.float64]
BISECTIONS = 60  # halves an interval of width 2 down to float64 resolution


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of two shares measured on the same n questions, tuned minus base.

    n: pairs. base_mean, tuned_mean: shares in 0..1. difference: in -1..1. These three are None where n is 0.
    ci_low, ci_high: confidence interval of the difference. se: its standard error, None below two clusters.
    b_only, t_only: questions only base, only tuned got right. p_value: two-sided McNemar. method: interval and test in
    words. n_clusters: independent units (n where nothing repeats). design_effect: variance inflation by clusters, >= 1.
    """

    n: int
    base_mean: float | None
    tuned_mean: float | None
    difference: float | None
    ci_low: float
    ci_high: float
    se: float | None
    b_only: int
    t_only: int
    p_value: float
    method: str
    n_clusters: int = 0
    design_effect: float = 1.0
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class PairedMean:
    """Difference of two means measured on the same n items, tuned minus base, in the unit of the values.

    The means and the difference are None where n is 0. ci_low, ci_high, se and p_value are None where the values cannot
    say how far the difference would vary: fewer than two clusters, or no spread at all among the differences.
    """

    n: int
    base_mean: float | None
    tuned_mean: float | None
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    se: float | None
    p_value: float | None
    method: str
    n_clusters: int = 0
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class HarmCheck:
    """Whether a loss of more than ``margin`` (a share, > 0) is ruled out.

    ci_low, ci_high: interval of tuned minus base; its lower end alone is a one-sided 97.5 % bound. verdict: "ruled out"
    where ci_low lies above -margin, "harm" where ci_high lies below it, else "cannot tell".
    """

    margin: float
    ci_low: float
    ci_high: float
    verdict: Literal["ruled out", "harm", "cannot tell"]


def _mcnemar(b: ArrayLike, c: ArrayLike) -> Floats:
    """Exact two-sided McNemar p of counts or fractions of counts that broadcast."""
    low, high = np.minimum(b, c), np.maximum(b, c)
    return np.where(low == high, 1.0, np.minimum(1.0, 2.0 * special.betainc(np.maximum(high, 1e-300), low + 1.0, 0.5)))


def mcnemar_exact(b: float, c: float) -> float:
    """Two-sided exact McNemar test: p of a split at least as uneven as b to c under a fair coin.

    b, c: pairs only one side got right, >= 0; 1.0 where both are 0. Fractions (counts over a design effect) are taken
    through the incomplete beta function, which equals the binomial tail at whole numbers. Raises ValueError below 0.
    Source: McNemar, Psychometrika 12:153-157, 1947, exact form.
    """
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar_exact counts pairs: b={b}, c={c} must both be at least 0")
    return float(_mcnemar(b, c))


def tango_interval(b: ArrayLike, c: ArrayLike, n: ArrayLike, quantile: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Score interval for (c - b) / n, the paired difference of two proportions.

    b, c, n: pairs only base, only tuned got right, and all pairs; numbers or arrays that broadcast (float64), n > 0,
    b + c <= n. quantile: half width in standard errors, e.g. 1.96. Returns (low, high), each in -1..1, shape of the
    broadcast. Source: Tango 1998, equations 8 to 11, solved by bisection.
    """
    b, c, n = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (b, c, n)))
    estimate = (c - b) / n

    def score(delta: NDArray[Any]) -> NDArray[Any]:
        """Distance of the data from a true difference delta, in standard errors under delta."""
        linear = (2 * n - c + b) * delta - b - c
        nuisance = (np.sqrt(np.maximum(linear**2 + 8 * n * b * delta * (1 - delta), 0.0)) - linear) / (4 * n)
        variance = np.maximum(n * (2 * nuisance + delta * (1 - delta)), 0.0)
        distance = c - b - n * delta
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(distance == 0, 0.0, distance / np.sqrt(variance))

    def solve(outer: float, target: float) -> NDArray[Any]:
        inside, outside = estimate.copy(), np.full(estimate.shape, outer)
        for _ in range(BISECTIONS):
            middle = (inside + outside) / 2
            within = np.abs(score(middle)) <= abs(target)
            inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
        return inside

    return solve(-1.0, quantile), solve(1.0, quantile)


def _cluster_codes(clusters: Clusters, n: int) -> NDArray[np.int64]:
    """Number the clusters 0..G-1, (n,) int64; without clusters every item is its own. None marks a cluster of one."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise DataError(f"clusters has {len(clusters)} entries for {n} pairs", "give one cluster name per pair")
    seen: dict[Any, int] = {}
    return np.array(
        [seen.setdefault(("own", i) if g is None else g, len(seen)) for i, g in enumerate(clusters)], np.int64
    )


def _pairs(base: ArrayLike, tuned: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both sides as (n,) float64; refuses sides of different length and values that are not finite."""
    sides = np.asarray(base, np.float64).reshape(-1), np.asarray(tuned, np.float64).reshape(-1)
    if sides[0].shape != sides[1].shape:
        raise DataError(
            f"base has {sides[0].size} values and tuned {sides[1].size}; pairs need the same items on both sides",
            "compare only items that both sides answered",
        )
    for name, values in zip(("base", "tuned"), sides, strict=True):
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(f"{name}[{at}] is {values[at]}: every value of a paired comparison must be finite")
    return sides


def paired_difference(
    base: ArrayLike, tuned: ArrayLike, clusters: Clusters = None, confidence: float = 0.95
) -> PairedDifference:
    """Compare two shares measured on the same questions.

    base, tuned: (n,) bool (or 0/1), True where that side is right. clusters: (n,) names of what repeats together, None
    for an item of its own; None altogether if nothing repeats. confidence: of the interval, in 0..1. n = 0 gives the
    interval -1..1 and p = 1. Raises DataError for sides or clusters of different length. Sources: module docstring.
    """
    one, two = _pairs(base, tuned)
    if not (np.isin(one, (0, 1)).all() and np.isin(two, (0, 1)).all()):
        raise DataError(
            "a paired difference of shares takes right (1) or wrong (0) per question", "use paired_mean for values"
        )
    n, difference = one.size, two - one
    if n == 0:
        return PairedDifference(0, None, None, None, -1.0, 1.0, None, 0, 0, 1.0, "no pairs", 0, 1.0, confidence)
    codes = _cluster_codes(clusters, n)
    n_clusters = int(codes.max()) + 1
    low, high, p_value, effects = difference_intervals(difference, codes, confidence)
    effect = float(effects)
    method = "Tango score interval; exact McNemar test"
    if n_clusters < n:
        method += (
            f"; counts divided by the design effect {effect:.2f} of {n_clusters} clusters (Rao-Scott), "
            f"t quantile with {max(n_clusters - 1, 1)} degrees of freedom"
        )
    return PairedDifference(
        n=n,
        base_mean=float(one.mean()),
        tuned_mean=float(two.mean()),
        difference=float(difference.mean()),
        ci_low=float(low),
        ci_high=float(high),
        se=math.sqrt(effect * float(difference.var(ddof=1)) / n) if n_clusters > 1 else None,
        b_only=int((difference < 0).sum()),
        t_only=int((difference > 0).sum()),
        p_value=float(p_value),
        method=method,
        n_clusters=n_clusters,
        design_effect=effect,
        confidence=confidence,
    )


def difference_intervals(
    difference: ArrayLike, codes: NDArray[np.int64], confidence: float = 0.95
) -> tuple[Floats, Floats, Floats, Floats]:
    """Interval, p value and design effect of one or many comparisons on the same clusters.

    difference: (..., n) of -1 (only base right), 0 and 1 (only tuned right), n > 0. codes: (n,) cluster numbers
    0..G-1, all of which occur. Returns (low, high, p_value, design_effect), each (...) float64. With a cluster per item
    the design effect is 1 and the quantile normal; else it is a t quantile on G - 1 degrees of freedom.
    """
    difference = np.asarray(difference, np.float64)
    n, n_clusters = difference.shape[-1], int(codes.max()) + 1
    clustered, tail = n_clusters < n, (1 + confidence) / 2
    effect = _design_effect(difference, codes, n_clusters) if clustered else np.ones(difference.shape[:-1])
    quantile = float(special.stdtrit(max(n_clusters - 1, 1), tail) if clustered else special.ndtri(tail))
    b, c = (difference < 0).sum(-1) / effect, (difference > 0).sum(-1) / effect
    return *tango_interval(b, c, n / effect, quantile), _mcnemar(b, c), effect


def _design_effect(difference: Floats, codes: NDArray[np.int64], n_clusters: int) -> Floats:
    """Cluster-robust variance of the mean over that of independent items, at least 1; (..., n) -> (...).

    Where the items show no spread, or there is one cluster, nothing can be estimated: then items of a cluster count as
    copies of one another, n_effective = n^2 / sum of squared cluster sizes (Kish 1965).
    """
    n, sizes = difference.shape[-1], np.bincount(codes).astype(float)
    copies = np.asarray((sizes**2).sum() / n)
    if n_clusters < 2:
        return np.broadcast_to(copies, difference.shape[:-1])
    independent = difference.var(axis=-1, ddof=1) * n
    starts = np.concatenate([[0], np.cumsum(sizes[:-1])]).astype(np.int64)
    residuals = (difference - difference.mean(-1, keepdims=True))[..., np.argsort(codes, kind="stable")]
    robust = (np.add.reduceat(residuals, starts, axis=-1) ** 2).sum(-1) * n_clusters / (n_clusters - 1)
    ratio = robust / np.where(independent > 0, independent, 1.0)
    return np.where(independent > 0, np.maximum(1.0, ratio), copies)


def cluster_robust_interval(found: PairedDifference) -> tuple[float | None, float | None]:
    """Difference plus and minus t times the cluster-robust standard error: a check on the reported interval.

    t has clusters - 1 degrees of freedom. (None, None) where there is no standard error, or none above 0.
    """
    if found.difference is None or not found.se:
        return None, None
    reach = float(special.stdtrit(found.n_clusters - 1, (1 + found.confidence) / 2)) * found.se
    return found.difference - reach, found.difference + reach


def cluster_bootstrap(
    base: ArrayLike,
    tuned: ArrayLike,
    clusters: Clusters = None,
    confidence: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the difference when whole clusters are drawn again with replacement: a check.

    base, tuned, clusters: as in paired_difference, n > 0. draws: resamples. seed: of the generator; the same seed gives
    the same interval. Source: Cameron, Gelbach and Miller, Review of Economics and Statistics 90:414-427, 2008.
    """
    one, two = _pairs(base, tuned)
    codes = _cluster_codes(clusters, one.size)
    sizes, sums = np.bincount(codes), np.bincount(codes, weights=two - one)
    rng = np.random.default_rng(seed)
    values = []
    for part in range(0, draws, 500):  # 500 x clusters counts at once: some 16 MiB for 4,000 clusters
        counts = rng.multinomial(sizes.size, np.full(sizes.size, 1 / sizes.size), size=min(500, draws - part))
        values.append((counts @ sums) / (counts @ sizes))
    low, high = np.quantile(np.concatenate(values), ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number by Holm's step-down, in the order given.

    The smallest is multiplied by their number m, the next by m - 1, and so on; none falls below the one before it, none
    exceeds 1. Source: Holm, Scandinavian Journal of Statistics 6:65-70, 1979.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted.tolist()


def heterogeneity(differences: Sequence[float], errors: Sequence[float]) -> float | None:
    """P value that the tasks share one true difference (Cochran's Q); None below two tasks with an error above 0.

    differences, errors: per task, with its standard error. A small value says that a pooled difference hides unlike
    ones. Source: Cochran, Biometrics 10:101-129, 1954.
    """
    pairs = [(d, e) for d, e in zip(differences, errors, strict=True) if e]
    if len(pairs) < 2:
        return None
    d, weight = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]) ** -2.0
    q = float((weight * (d - np.average(d, weights=weight)) ** 2).sum())
    return float(special.chdtrc(len(pairs) - 1, q))


def harm_check(found: PairedDifference, margin: float) -> HarmCheck:
    """Say whether tuned can have lost more than ``margin`` (a share in 0..1, fixed before the answers are seen).

    Raises ValueError for a margin outside 0..1. Source: non-inferiority by confidence interval, ICH E9, section 3.3.2.
    """
    if not 0 < margin < 1:
        raise ValueError(f"a margin is a share between 0 and 1, not {margin}")
    said: Literal["ruled out", "harm", "cannot tell"] = "cannot tell"
    if found.ci_low > -margin:
        said = "ruled out"
    elif found.ci_high < -margin:
        said = "harm"
    return HarmCheck(margin, found.ci_low, found.ci_high, said)


def paired_mean(
    base: ArrayLike,
    tuned: ArrayLike,
    clusters: Clusters = None,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
) -> PairedMean:
    """Compare two means (answer lengths, losses) measured on the same items, with a t interval.

    base, tuned: (n,) finite floats. clusters: as in paired_difference. weights: (n,) >= 0, e.g. label tokens per row,
    so that rows' mean losses average to the loss per token; the row stays the unit that varies (linearised variance,
    Cochran, Sampling Techniques, 1977, section 6.3), and rows of weight 0 are left out of n. Raises DataError as
    paired_difference does, and for weights that are negative or all zero.
    """
    one, two = _pairs(base, tuned)
    n = one.size
    w = np.ones(n) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    if w.shape != one.shape or not np.isfinite(w).all() or (w < 0).any() or (n and not w.any()):
        raise DataError(f"weights must be {n} finite numbers of at least 0, not all of them 0")
    if (w == 0).any():
        keep = w > 0
        clusters = None if clusters is None else [g for g, kept in zip(clusters, keep, strict=True) if kept]
        one, two, w, n = one[keep], two[keep], w[keep], int(keep.sum())
    codes = _cluster_codes(clusters, n)
    n_clusters = int(codes.max()) + 1 if n else 0
    if n == 0:
        return PairedMean(0, None, None, None, None, None, None, None, "no pairs", 0, confidence)
    w = w / w.sum()
    difference = two - one
    mean = float(w @ difference)
    sums = np.bincount(codes, weights=w * (difference - mean), minlength=n_clusters)
    se = math.sqrt(float((sums**2).sum()) * n_clusters / (n_clusters - 1)) if n_clusters > 1 else 0.0
    known = se > 1e-12 * float(np.abs(np.concatenate([one, two])).max())
    low = high = p_value = None
    if known:
        reach = float(special.stdtrit(n_clusters - 1, (1 + confidence) / 2)) * se
        low, high = mean - reach, mean + reach
        p_value = float(2 * special.stdtr(n_clusters - 1, -abs(mean) / se))
    method = (
        f"paired t interval, {n_clusters - 1} degrees of freedom" if known else "no interval: the pairs show no spread"
    )
    if known and n_clusters < n:
        method += f", cluster-robust over {n_clusters} clusters"
    return PairedMean(
        n=n,
        base_mean=float(w @ one),
        tuned_mean=float(w @ two),
        difference=mean,
        ci_low=low,
        ci_high=high,
        se=se if known else None,
        p_value=p_value,
        method=method,
        n_clusters=n_clusters,
        confidence=confidence,
    )


def minimum_detectable_difference(
    n: float, discordance: float, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """Smallest true paired difference that n questions would show with the given power.

    n: pairs, divided by the design effect where questions repeat. discordance: share of pairs on which the sides
    disagree, in 0..1. Returns (z_alpha/2 + z_power) * sqrt(discordance / n), a share; a difference cannot exceed the
    discordance, so where that formula does, the discordance is raised to the difference itself. None where not even a
    difference of 1 would show. Source: normal approximation to McNemar (Connor, Biometrics 43:207-211, 1987).
    """
    if not 0 <= discordance <= 1:
        raise ValueError(f"discordance is a share of pairs in 0..1, not {discordance}")
    if n <= 0:
        return None
    reach = float(special.ndtri(1 - alpha / 2) + special.ndtri(power))
    smallest = reach * math.sqrt(discordance / n)
    if smallest >= discordance:
        smallest = reach**2 / n
    return smallest if smallest <= 1 else None


def proportion_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (low, high) of the share k / n; (0, 1) where n is 0.

    Raises ValueError unless 0 <= k <= n. Source: Wilson, JASA 22:209-212, 1927.
    """
    if not 0 <= k <= n:
        raise ValueError(f"a share needs 0 <= k <= n, not k={k}, n={n}")
    if n == 0:
        return 0.0, 1.0
    z2 = float(special.ndtri((1 + confidence) / 2)) ** 2
    centre, reach = k + z2 / 2, math.sqrt(z2 * k * (n - k) / n + z2 * z2 / 4)
    low, high = (centre - reach) / (n + z2), (centre + reach) / (n + z2)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def verdict(
    ci_low: float | None,
    ci_high: float | None,
    higher_is_better: bool = True,
    p_value: float | None = None,
    alpha: float = 0.05,
) -> Verdict:
    """Say whether tuned is better, worse, or one cannot tell.

    ci_low, ci_high: interval of tuned minus base; None means that there is none. p_value: when given it must lie below
    alpha too, so that a handful of discordant pairs (4 to 0 excludes zero, yet exact p = 0.125) is not called.
    """
    if ci_low is None or ci_high is None or ci_low <= 0 <= ci_high or (p_value is not None and p_value >= alpha):
        return "cannot tell"
    return "better" if (ci_low > 0) == higher_is_better else "worse"
