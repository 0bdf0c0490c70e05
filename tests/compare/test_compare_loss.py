"""Held-out loss of both sides: sums of row losses turned into token-weighted means with intervals over rows."""

import math

import pytest

from deepdoctor.compare.loss import compare_losses
from deepdoctor.train.held_out import RowLoss

BASE = [RowLoss(20.0, 10, 6.0, 2), RowLoss(33.0, 15, 8.0, 4), RowLoss(9.0, 5, 7.0, 3), RowLoss(44.0, 20, 10.0, 4)]
TUNED = [RowLoss(15.0, 10, 5.8, 2), RowLoss(24.0, 15, 8.4, 4), RowLoss(6.4, 5, 7.1, 3), RowLoss(31.0, 20, 9.6, 4)]


def test_losses_are_means_over_tokens() -> None:
    """A part's loss is its summed loss over its tokens, whatever the row; both sides see the same tokens."""
    found = compare_losses(BASE, TUNED)
    assert list(found) == ["all", "reasoning", "answer"]
    reasoning = found["reasoning"]
    assert reasoning["base"] == pytest.approx(106 / 50)
    assert reasoning["tuned"] == pytest.approx(76.4 / 50)
    assert reasoning["difference"] == pytest.approx((76.4 - 106) / 50)
    assert (reasoning["n_rows"], reasoning["n_tokens"]) == (4, 50)
    assert reasoning["base_perplexity"] == pytest.approx(math.exp(106 / 50))
    assert found["all"]["base"] == pytest.approx((106 + 31) / 63)
    assert found["all"]["n_tokens"] == 63


def test_lower_is_better_and_doubt_is_said() -> None:
    """A loss that falls on every row is better; swapped sides make it worse; a mixed one cannot be told."""
    found = compare_losses(BASE, TUNED)
    assert found["reasoning"]["verdict"] == "better"
    assert found["reasoning"]["ci_high"] < 0
    assert found["answer"]["verdict"] == "cannot tell"
    swapped = compare_losses(TUNED, BASE)
    assert swapped["reasoning"]["verdict"] == "worse"
    assert swapped["reasoning"]["difference"] == pytest.approx(-found["reasoning"]["difference"])
    assert swapped["reasoning"]["ci_low"] == pytest.approx(-found["reasoning"]["ci_high"])


def test_parts_without_tokens_are_left_out() -> None:
    """Rows without trained reasoning give no reasoning loss, and do not water down the rest."""
    base = [RowLoss(0.0, 0, 6.0, 2), RowLoss(0.0, 0, 9.0, 3)]
    found = compare_losses(base, base)
    assert list(found) == ["all", "answer"]
    assert found["answer"]["base"] == found["all"]["base"] == pytest.approx(3.0)
    mixed = compare_losses([*base, RowLoss(4.0, 2, 3.0, 1)], [*base, RowLoss(4.0, 2, 3.0, 1)])
    assert mixed["reasoning"]["n_rows"] == 1
    assert compare_losses([], []) == {}


def test_one_row_has_no_interval() -> None:
    """A single row gives a difference but no interval, so nothing can be told."""
    found = compare_losses(BASE[:1], TUNED[:1])["reasoning"]
    assert found["difference"] == pytest.approx(-0.5)
    assert found["verdict"] == "cannot tell"


def test_sides_must_have_the_same_rows() -> None:
    """A comparison of different rows is a fault of ours, not a result."""
    with pytest.raises(ValueError, match="shorter"):
        compare_losses(BASE, TUNED[:3])


def test_huge_losses_do_not_overflow() -> None:
    """A perplexity beyond what a float holds is capped, not an OverflowError."""
    found = compare_losses([RowLoss(2000.0, 1, 2000.0, 1)] * 2, [RowLoss(1.0, 1, 1.0, 1)] * 2)
    assert math.isfinite(found["all"]["base_perplexity"])
