"""The row order follows from the seed alone and gives every row its turn."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdoctor.train.order import step_rows, total_steps


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_an_epoch_shows_every_row_once(n_rows, batch, epochs, seed, shuffle):
    """Each row comes once an epoch, in batches of the size asked for, the last of an epoch perhaps smaller."""
    per_epoch = math.ceil(n_rows / batch)
    steps = step_rows(n_rows, batch, epochs * per_epoch, seed, shuffle)
    assert len(steps) == epochs * per_epoch == total_steps(n_rows, batch, None, epochs)
    for epoch in range(epochs):
        mine = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for rows in mine for row in rows) == list(range(n_rows))
        assert all(len(rows) == batch for rows in mine[:-1])


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
def test_more_steps_begin_with_the_same_rows(n_rows, batch, fewer, more, seed):
    """The order does not depend on how many steps are asked for, so a resumed run sees the same rows."""
    assert step_rows(n_rows, batch, fewer + more, seed)[:fewer] == step_rows(n_rows, batch, fewer, seed)


def test_seed_and_epoch_change_the_order_and_the_source_keeps_its_own():
    """Another seed or epoch is another permutation; shuffle off is the source's order every epoch."""
    one, two = (step_rows(64, 64, 3, seed) for seed in (1, 2))
    assert len({tuple(rows) for rows in (*one[:2], two[0])}) == 3
    assert one == step_rows(64, 64, 3, 1)
    assert step_rows(5, 2, 6, 1, shuffle=False) == [[0, 1], [2, 3], [4]] * 2


@pytest.mark.parametrize(
    ("n_rows", "batch", "max_steps", "epochs", "expected"),
    [(100, 8, None, 1, 13), (100, 8, None, 0.5, 7), (100, 8, 60, 1, 60), (3, 8, None, 1, 1), (100, 8, None, 0.01, 1)],
)
def test_number_of_steps(n_rows, batch, max_steps, epochs, expected):
    """max_steps wins; otherwise epochs of ceil(rows / batch), at least one."""
    assert total_steps(n_rows, batch, max_steps, epochs) == expected
