"""The paired statistics against scipy, hand-worked tables, exact enumeration and simulation."""

import gzip
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as scipy_stats

from deepdoctor.compare import stats
from deepdoctor.errors import DataError

Z = float(scipy_stats.norm.ppf(0.975))
DATA = Path(__file__).parents[2].parent / "shared" / "data"


def sides(both: int, b_only: int, t_only: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Base and tuned answers with the given table of right and wrong."""
    base = np.repeat([True, True, False, False], [both, b_only, t_only, neither])
    tuned = np.repeat([True, False, True, False], [both, b_only, t_only, neither])
    return base, tuned


@pytest.mark.parametrize(("b", "c"), [(0, 1), (0, 5), (3, 3), (4, 14), (12, 9), (150, 196), (40, 41)])
def test_mcnemar_equals_binomial_test(b: int, c: int) -> None:
    """The p value is scipy's exact binomial test of a fair coin over the discordant pairs."""
    assert stats.mcnemar_exact(b, c) == pytest.approx(scipy_stats.binomtest(b, b + c, 0.5).pvalue, rel=1e-9)


def test_mcnemar_by_hand() -> None:
    """No discordant pair gives 1; 5 to 0 is 2 / 32; a fraction lies between its neighbours; below 0 is refused."""
    assert stats.mcnemar_exact(0, 0) == 1.0
    assert stats.mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert stats.mcnemar_exact(2, 9) > stats.mcnemar_exact(2, 9.5) > stats.mcnemar_exact(2, 10)
    with pytest.raises(ValueError, match="at least 0"):
        stats.mcnemar_exact(-1, 2)


def constrained_score(b: int, c: int, n: int, delta: float) -> float:
    """Tango's statistic with the nuisance maximised numerically: an oracle that shares no formula with ours."""

    def unlikely(p_b: float) -> float:
        cells = ((b, p_b), (c, p_b + delta), (n - b - c, 1 - 2 * p_b - delta))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

    low, high = max(0.0, -delta), (1 - delta) / 2
    p_b = optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (c - b - n * delta) / math.sqrt(n * (2 * p_b + delta - delta**2))


@pytest.mark.parametrize(("b", "c", "n"), [(4, 14, 32), (9, 12, 44), (1, 7, 50), (0, 5, 40), (30, 11, 200)])
def test_interval_ends_are_where_the_score_test_turns(b: int, c: int, n: int) -> None:
    """At both ends of the interval the score statistic, maximised numerically, is 1.96 standard errors."""
    low, high = stats.tango_interval(b, c, n, Z)
    assert constrained_score(b, c, n, float(low)) == pytest.approx(Z, abs=2e-4)
    assert constrained_score(b, c, n, float(high)) == pytest.approx(-Z, abs=2e-4)


@pytest.mark.parametrize("n", [1, 2, 10, 250])
def test_no_discordant_pair_keeps_a_width(n: int) -> None:
    """Without discordant pairs the interval is plus or minus z^2 / (n + z^2), worked out by hand from the score."""
    both = stats.paired_difference(np.ones(n, bool), np.ones(n, bool))
    assert (both.ci_low, both.ci_high) == pytest.approx((-(Z**2) / (n + Z**2), Z**2 / (n + Z**2)))
    assert both.p_value == 1.0 and both.difference == 0.0
    assert stats.verdict(both.ci_low, both.ci_high, p_value=both.p_value) == "cannot tell"


def test_every_pair_discordant() -> None:
    """All pairs won by one side: the interval ends at 1 and still has a width."""
    won = stats.paired_difference(np.zeros(10, bool), np.ones(10, bool))
    assert won.ci_high == 1.0 and 0.4 < won.ci_low < 0.5 and won.t_only == 10


def test_table_by_hand() -> None:
    """A table of 10, 4, 14, 4: means, difference, standard error and p worked out by hand."""
    found = stats.paired_difference(*sides(10, 4, 14, 4))
    assert (found.n, found.b_only, found.t_only) == (32, 4, 14)
    assert (found.base_mean, found.tuned_mean, found.difference) == pytest.approx((14 / 32, 24 / 32, 10 / 32))
    assert found.se == pytest.approx(math.sqrt((18 - 100 / 32) / 31 / 32))
    assert found.p_value == pytest.approx(2 * (1 + 18 + 153 + 816 + 3060) / 2**18)
    assert found.ci_low < 10 / 32 < found.ci_high and found.design_effect == 1.0


def test_empty_and_single() -> None:
    """n = 0 says nothing at all, n = 1 next to nothing; both survive JSON without NaN."""
    nothing = stats.paired_difference([], [])
    assert (nothing.n, nothing.ci_low, nothing.ci_high, nothing.p_value) == (0, -1.0, 1.0, 1.0)
    assert nothing.difference is None and nothing.se is None
    single = stats.paired_difference([False], [True])
    assert single.ci_low < 0 < single.ci_high == 1.0 and single.se is None
    assert "NaN" not in json.dumps([asdict(nothing), asdict(single)], allow_nan=False)


@pytest.mark.parametrize("clustered", [False, True])
def test_swapping_sides_flips_the_sign_and_keeps_p(clustered: bool) -> None:
    """Base and tuned exchanged: the interval is mirrored, p, width and standard error stay."""
    rng = np.random.default_rng(1)
    base, tuned = rng.random(60) < 0.4, rng.random(60) < 0.6
    groups = rng.integers(0, 40, 60) if clustered else None
    one, two = stats.paired_difference(base, tuned, groups), stats.paired_difference(tuned, base, groups)
    assert two.difference == pytest.approx(-one.difference) and two.p_value == pytest.approx(one.p_value)
    assert (two.ci_low, two.ci_high) == pytest.approx((-one.ci_high, -one.ci_low), abs=1e-12)
    assert two.se == pytest.approx(one.se) and (two.b_only, two.t_only) == (one.t_only, one.b_only)


def exact_coverage(n: int, p_b: float, p_c: float) -> float:
    """Share of all tables of n pairs, weighted by their chance, whose interval holds the true difference."""
    b, c = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    b, c = b[b + c <= n], c[b + c <= n]
    low, high = stats.tango_interval(b, c, n, Z)
    chance = scipy_stats.multinomial.pmf(np.stack([b, c, n - b - c], 1), n, [p_b, p_c, 1 - p_b - p_c])
    return float(chance[(low <= p_c - p_b) & (p_c - p_b <= high)].sum())


@pytest.mark.parametrize("n", [10, 20, 50])
def test_exact_coverage_never_far_below_nominal(n: int) -> None:
    """Enumerated over all tables, coverage of the 95 % interval is at least 93 %, be discordance rare or common."""
    for discordance in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
        for share in (0.5, 0.6, 0.7, 0.9):
            covered = exact_coverage(n, discordance * (1 - share), discordance * share)
            assert covered >= 0.93, (discordance, share, covered)
            if n * discordance >= 10:
                assert covered <= 0.97, (discordance, share, covered)


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize(("p_b", "p_c"), [(0.1, 0.1), (0.08, 0.17), (0.15, 0.05)])
def test_simulated_coverage(n: int, p_b: float, p_c: float) -> None:
    """2,000 simulated comparisons: the 95 % interval holds the true difference in 93 to 97 % of them."""
    rng = np.random.default_rng(n)
    tables = rng.multinomial(n, [p_b, p_c, 1 - p_b - p_c], size=2000)
    low, high = stats.tango_interval(tables[:, 0], tables[:, 1], n, Z)
    assert 0.93 <= np.mean((low <= p_c - p_b) & (p_c - p_b <= high)) <= 0.97


@pytest.mark.parametrize("groups", [25, 100])
def test_simulated_coverage_with_repeated_questions(groups: int) -> None:
    """Questions asked in copies: clustered intervals cover as stated where ignoring the copies covers too rarely."""
    rng = np.random.default_rng(groups)
    names = np.repeat(np.arange(groups), np.arange(groups) % 4 + 1)
    covered = {"clustered": 0, "independent": 0}
    trials = 400
    for _ in range(trials):
        flips = rng.choice([-1, 1, 0], groups, p=[0.15, 0.25, 0.6])
        copied = np.where(
            rng.random(names.size) < 0.9, flips[names], rng.choice([-1, 1, 0], names.size, p=[0.15, 0.25, 0.6])
        )
        base, tuned = copied == -1, copied == 1
        for name, clusters in (("clustered", names), ("independent", None)):
            found = stats.paired_difference(base, tuned, clusters)
            covered[name] += found.ci_low <= 0.1 <= found.ci_high
    assert 0.92 <= covered["clustered"] / trials <= 0.985
    assert covered["independent"] / trials < 0.90


def cluster_sizes(n: int, rng: np.random.Generator) -> np.ndarray:
    """Cluster numbers of n questions of which about a third stand two or three times, as in MMLU-Pro health."""
    sizes = rng.choice([1, 2, 3], n, p=[0.81, 0.17, 0.02])
    return np.repeat(np.arange(n), sizes)[:n]


def simulated(
    codes: np.ndarray, p_b: float, p_c: float, alike: float, rng: np.random.Generator, trials: int = 2000
) -> tuple[np.ndarray, ...]:
    """Low, high and p of simulated comparisons; a question does as its cluster does with chance ``alike``."""
    chances = [p_b, p_c, 1 - p_b - p_c]
    own = rng.choice([-1, 1, 0], (trials, codes.size), p=chances)
    shared = rng.choice([-1, 1, 0], (trials, codes.max() + 1), p=chances)[:, codes]
    low, high, p_value, _ = stats.difference_intervals(np.where(rng.random(own.shape) < alike, shared, own), codes)
    return low, high, p_value


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize(("p_b", "p_c"), [(0.1, 0.1), (0.08, 0.17), (0.15, 0.25)])
@pytest.mark.parametrize("alike", [0.5, 0.9])
def test_simulated_coverage_with_clusters(n: int, p_b: float, p_c: float, alike: float) -> None:
    """2,000 simulated comparisons with repeated questions: 93 to 97 % of the reported intervals hold the truth."""
    rng = np.random.default_rng(n)
    low, high, _ = simulated(cluster_sizes(n, rng), p_b, p_c, alike, rng)
    assert 0.93 <= np.mean((low <= p_c - p_b) & (p_c - p_b <= high)) <= 0.97


@pytest.mark.parametrize(("n", "size"), [(50, 5), (200, 10), (1000, 25)])
def test_few_large_clusters_err_upwards(n: int, size: int) -> None:
    """Passages of many questions, ten to forty of them: coverage is never below 93 %, whatever it is above."""
    for alike in (0.1, 0.9):
        low, high, _ = simulated(np.arange(n) // size, 0.08, 0.17, alike, np.random.default_rng(size))
        assert np.mean((low <= 0.09) & (high >= 0.09)) >= 0.93


@pytest.mark.parametrize("n", [50, 200, 1000])
def test_equally_good_models_are_rarely_called(n: int) -> None:
    """Equally good models that differ by chance on 6 to 25 % of questions: called better in at most 3 % of trials."""
    rng = np.random.default_rng(n + 1)
    for half in (0.03, 0.1, 0.125):
        low, high, p_value = simulated(cluster_sizes(n, rng), half, half, 0.8, rng)
        called = (p_value < 0.05) & ((low > 0) | (high < 0))
        assert np.mean(called & (low > 0)) <= 0.03 and np.mean(called) <= 0.055


@pytest.mark.parametrize("n", [50, 200, 1000])
def test_identical_answers_are_never_called(n: int) -> None:
    """A model against itself with the same answers: always cannot tell, clusters or not."""
    codes = cluster_sizes(n, np.random.default_rng(n))
    low, high, p_value, _ = stats.difference_intervals(np.zeros((3, n)), codes)
    assert (low < 0).all() and (high > 0).all() and (p_value == 1).all()


def test_many_comparisons_at_once_equal_one_by_one() -> None:
    """The vectorised intervals are those of paired_difference, with and without clusters."""
    rng = np.random.default_rng(4)
    codes = cluster_sizes(60, rng)
    tuned, base = rng.random((5, 60)) < 0.6, rng.random((5, 60)) < 0.5
    for clusters in (codes, np.arange(60)):
        low, high, p_value, effect = stats.difference_intervals(tuned.astype(int) - base, clusters)
        for i in range(5):
            one = stats.paired_difference(base[i], tuned[i], clusters)
            assert (one.ci_low, one.ci_high, one.p_value, one.design_effect) == pytest.approx(
                (low[i], high[i], p_value[i], effect[i])
            )


def test_checks_agree_with_the_reported_interval() -> None:
    """600 questions in clusters: analytic cluster-robust, bootstrap and reported intervals agree to a few per cent."""
    rng = np.random.default_rng(6)
    codes = cluster_sizes(600, rng)
    base, tuned = rng.random(codes.max() + 1)[codes] < 0.4, rng.random(codes.max() + 1)[codes] < 0.5
    found = stats.paired_difference(base, tuned, codes)
    reported = (found.ci_low, found.ci_high)
    assert stats.cluster_robust_interval(found) == pytest.approx(reported, abs=0.05 * (reported[1] - reported[0]))
    drawn = stats.cluster_bootstrap(base, tuned, codes)
    assert drawn == pytest.approx(reported, abs=0.06 * (reported[1] - reported[0]))
    assert drawn == stats.cluster_bootstrap(base, tuned, codes), "seeded"
    ignoring = stats.cluster_bootstrap(base, tuned)
    assert ignoring[1] - ignoring[0] < 0.95 * (drawn[1] - drawn[0])
    single = stats.paired_difference([False], [True])
    assert stats.cluster_robust_interval(single) == (None, None)


def test_holm_by_hand() -> None:
    """Four p values worked out on paper, in any order; one task keeps its own; none at all is no error."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.03]) == [0.03] and stats.holm([]) == []
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


def test_heterogeneity_by_hand() -> None:
    """Two tasks: Cochran's Q is the squared z of their difference; like effects give 1; one task gives nothing."""
    z = 0.10 / math.sqrt(0.03**2 + 0.04**2)
    assert stats.heterogeneity([0.10, 0.0], [0.03, 0.04]) == pytest.approx(2 * scipy_stats.norm.sf(z))
    assert stats.heterogeneity([0.1, 0.1], [0.02, 0.05]) == pytest.approx(1.0)
    assert stats.heterogeneity([0.1], [0.02]) is None and stats.heterogeneity([0.1, 0.2], [0.0, 0.1]) is None


def test_harm_check() -> None:
    """A loss beyond the margin is ruled out, has happened, or neither, by the interval; the margin is a share."""
    flat = stats.paired_difference(*sides(380, 25, 25, 70))
    assert stats.harm_check(flat, 0.05).verdict == "ruled out"
    assert stats.harm_check(flat, 0.02).verdict == "cannot tell"
    assert stats.harm_check(stats.paired_difference(*sides(300, 90, 10, 100)), 0.05).verdict == "harm"
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.harm_check(flat, 5)


def test_clusters_of_one_change_nothing() -> None:
    """Distinct names, and None for items of their own, give exactly the result without clusters."""
    base, tuned = sides(10, 4, 14, 4)
    plain = stats.paired_difference(base, tuned)
    assert stats.paired_difference(base, tuned, [f"q{i}" for i in range(32)]) == plain
    assert stats.paired_difference(base, tuned, [None] * 32) == plain


def test_pure_copies_count_once() -> None:
    """Every question asked three times with the same outcome: the evidence is that of one copy."""
    base, tuned = sides(10, 4, 14, 4)
    tripled = stats.paired_difference(np.tile(base, 3), np.tile(tuned, 3), np.tile(np.arange(32), 3))
    once = stats.paired_difference(base, tuned)
    assert tripled.n == 96 and tripled.n_clusters == 32 and tripled.design_effect == pytest.approx(3, rel=0.05)
    assert tripled.se == pytest.approx(once.se, rel=0.01)
    assert tripled.p_value == pytest.approx(once.p_value, rel=0.1)
    assert tripled.ci_low < once.ci_low < once.ci_high < tripled.ci_high  # t instead of z quantile


def test_one_cluster_or_no_spread_stays_wide() -> None:
    """One cluster of 30 copies says as much as one question; identical sides in clusters keep a width."""
    copies = stats.paired_difference(np.zeros(30, bool), np.ones(30, bool), ["same"] * 30)
    assert copies.ci_low < 0 and copies.se is None and copies.p_value == pytest.approx(1.0)
    same = stats.paired_difference(np.ones(30, bool), np.ones(30, bool), np.arange(30) // 3)
    assert same.ci_high > stats.paired_difference(np.ones(30, bool), np.ones(30, bool)).ci_high > 0.1


def test_cluster_robust_error_by_hand() -> None:
    """Four questions in two clusters: the standard error is the one worked out on paper."""
    base, tuned = np.array([0, 0, 0, 1]), np.array([1, 1, 0, 0])
    found = stats.paired_difference(base, tuned, ["x", "x", "y", "y"])
    # mean 1/4; residual sums 1.5 and -1.5; variance 2/(2-1) * (2.25 + 2.25) / 16
    assert found.se == pytest.approx(math.sqrt(2 * 4.5 / 16))


@pytest.mark.parametrize(
    ("base_model", "tuned_model", "expected"),
    [
        ("Meta-Llama-3_1-8B", "Meta-Llama-3_1-8B-Instruct", "better"),
        ("Mistral-7B-v0.1", "Mistral-7B-Instruct-v0.1", "worse"),
        ("Meta-Llama-3-8B", "Meta-Llama-3_1-8B", "cannot tell"),
    ],
)
def test_real_pairs_can_be_better_worse_or_undecided(base_model: str, tuned_model: str, expected: str) -> None:
    """Published answers of real models on MMLU-Pro health: a gain, a loss and a tie, clustered by repeated question."""
    if not (DATA / "outputs").is_dir():
        pytest.skip(f"needs the model outputs in {DATA / 'outputs'}")

    def right(model: str) -> dict[str, bool]:
        with gzip.open(DATA / "outputs" / f"mmlu-pro-health.{model}.jsonl.gz", "rt", encoding="utf-8") as lines:
            return {r["id"]: r["stored_pred"] == r["answer"] for r in map(json.loads, lines)}

    text = (DATA / "eval" / "mmlu-pro-health-test.jsonl").read_text(encoding="utf-8")
    questions = [json.loads(line) for line in text.splitlines()]
    base, tuned = right(base_model), right(tuned_model)
    groups = [q["dup_group"] for q in questions]
    ids = [q["id"] for q in questions]
    found = stats.paired_difference([base[i] for i in ids], [tuned[i] for i in ids], groups)
    plain = stats.paired_difference([base[i] for i in ids], [tuned[i] for i in ids])
    assert stats.verdict(found.ci_low, found.ci_high, p_value=found.p_value) == expected
    assert 1.05 < found.se / plain.se < 1.2, "repeated questions widen the error by 11-14 % on the full set"


def test_paired_mean_is_the_t_interval() -> None:
    """Without weights or clusters: scipy's paired t test and interval."""
    rng = np.random.default_rng(3)
    base = rng.normal(10, 3, 25)
    tuned = base + rng.normal(-1, 2, 25)
    found, oracle = stats.paired_mean(base, tuned), scipy_stats.ttest_rel(tuned, base)
    interval = oracle.confidence_interval(0.95)
    assert (found.ci_low, found.ci_high, found.p_value) == pytest.approx((interval.low, interval.high, oracle.pvalue))
    swapped = stats.paired_mean(tuned, base)
    assert swapped.difference == pytest.approx(-found.difference) and swapped.p_value == pytest.approx(found.p_value)


def test_paired_mean_weights_and_clusters() -> None:
    """Weights average losses per token; equal weights change nothing; copies in clusters do not add evidence."""
    base, tuned, tokens = np.array([2.0, 1.0, 3.0]), np.array([1.0, 1.5, 2.0]), np.array([100, 300, 600])
    found = stats.paired_mean(base, tuned, weights=tokens)
    assert found.base_mean == pytest.approx((200 + 300 + 1800) / 1000)
    assert found.difference == pytest.approx((-100 + 150 - 600) / 1000)
    residuals = np.array([0.1 * (-1 + 0.55), 0.3 * (0.5 + 0.55), 0.6 * (-1 + 0.55)])
    assert found.se == pytest.approx(math.sqrt(1.5 * (residuals**2).sum()))
    plain = stats.paired_mean(base, tuned)
    assert stats.paired_mean(base, tuned, weights=[7, 7, 7]).ci_low == pytest.approx(plain.ci_low)
    copied = stats.paired_mean(np.tile(base, 4), np.tile(tuned, 4), clusters=[0, 1, 2] * 4)
    assert (copied.ci_low, copied.se) == pytest.approx((plain.ci_low, plain.se))
    assert stats.paired_mean([*base, 9.0], [*tuned, 1.0], weights=[1, 1, 1, 0], clusters=list("abcd")) == plain


def test_paired_mean_simulated_coverage() -> None:
    """1,000 simulated comparisons of skewed lengths on 50 items: 92 to 97 % of the t intervals hold the truth."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(1000):
        base = rng.gamma(2, 100, 50)
        found = stats.paired_mean(base, base * 0.5 + rng.gamma(2, 60, 50))
        hits += found.ci_low <= 20 <= found.ci_high
    assert 0.92 <= hits / 1000 <= 0.97


@pytest.mark.parametrize(
    ("base", "tuned"), [([], []), ([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [2.0, 3.0])]
)
def test_paired_mean_without_spread_has_no_interval(base: list[float], tuned: list[float]) -> None:
    """None, one, identical or equally shifted pairs give no interval rather than one of zero width."""
    found = stats.paired_mean(base, tuned)
    assert found.ci_low is None and found.ci_high is None and found.p_value is None
    assert stats.verdict(found.ci_low, found.ci_high) == "cannot tell"


def test_wilson_equals_scipy() -> None:
    """Shares from none to all: scipy's Wilson interval; no observation leaves 0 to 1 open; nonsense is refused."""
    for k, n in [(0, 7), (1, 1), (7, 7), (3, 20), (500, 1000)]:
        oracle = scipy_stats.binomtest(k, n).proportion_ci(method="wilson")
        assert stats.proportion_interval(k, n) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
    assert stats.proportion_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        stats.proportion_interval(3, 2)


def test_minimum_detectable_difference() -> None:
    """MedQA's 1,273 questions at discordance 0.15 show 3.0 points; simulated power is 80 %; too few show nothing."""
    assert stats.minimum_detectable_difference(1273, 0.15) == pytest.approx(0.0304, abs=5e-4)
    assert stats.minimum_detectable_difference(4183, 0.25) == pytest.approx(0.0217, abs=5e-4)
    assert stats.minimum_detectable_difference(0, 0.2) is None and stats.minimum_detectable_difference(5, 0.2) is None
    few = stats.minimum_detectable_difference(32, 0.0)
    assert few == pytest.approx((Z + scipy_stats.norm.ppf(0.8)) ** 2 / 32)
    n, discordance = 800, 0.2
    delta = stats.minimum_detectable_difference(n, discordance)
    tables = np.random.default_rng(2).multinomial(
        n, [(discordance - delta) / 2, (discordance + delta) / 2, 1 - discordance], size=4000
    )
    low, _ = stats.tango_interval(tables[:, 0], tables[:, 1], n, Z)
    assert 0.77 <= np.mean(low > 0) <= 0.83


def test_verdict() -> None:
    """The interval decides, the exact test may hold it back, and for losses lower is better."""
    assert stats.verdict(0.01, 0.2) == "better" and stats.verdict(-0.2, -0.01) == "worse"
    assert stats.verdict(-0.2, -0.01, higher_is_better=False) == "better"
    assert stats.verdict(-0.1, 0.1) == stats.verdict(0.0, 0.1) == stats.verdict(None, None) == "cannot tell"
    few = stats.paired_difference(*sides(20, 0, 4, 8))
    assert few.ci_low > 0 and few.p_value == 0.125
    assert stats.verdict(few.ci_low, few.ci_high, p_value=few.p_value) == "cannot tell"


def test_identical_sides_cannot_tell() -> None:
    """A model compared with itself is never better or worse, whatever it answers."""
    answers = np.random.default_rng(0).random(300) < 0.5
    same = stats.paired_difference(answers, answers.copy())
    assert stats.verdict(same.ci_low, same.ci_high, p_value=same.p_value) == "cannot tell"


def test_unusable_input_is_refused() -> None:
    """Sides of different length, a missing value, a score that is no yes or no, and short clusters name their fault."""
    with pytest.raises(DataError, match="base has 2 values and tuned 1"):
        stats.paired_difference([True, False], [True])
    with pytest.raises(DataError, match=r"tuned\[1\] is nan"):
        stats.paired_mean([1.0, 2.0], [1.0, math.nan])
    with pytest.raises(DataError, match="right \\(1\\) or wrong"):
        stats.paired_difference([0.5], [1.0])
    with pytest.raises(DataError, match="clusters has 1 entries for 2 pairs"):
        stats.paired_difference([True, False], [True, True], ["a"])
    with pytest.raises(DataError, match="weights"):
        stats.paired_mean([1.0], [2.0], weights=[-1])
