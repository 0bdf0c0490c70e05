"""Packing keeps every row once and apart, whatever the lengths and limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepdoctor.data.pack import count_labels, micro_batches, pack
from deepdoctor.data.prompt import EncodedRow
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX

LENGTHS = st.lists(st.integers(1, 60), max_size=30)
LIMITS = st.one_of(st.none(), st.integers(1, 8))


@st.composite
def encoded_rows(draw) -> list[EncodedRow]:
    """Rows of random tokens, each with its own mask."""
    rows = []
    for length in draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)):
        ids = draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
        trains = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        labels = [token if on else IGNORE_INDEX for token, on in zip(ids, trains, strict=True)]
        rows.append(EncodedRow(ids, labels, (0, 0), (0, length)))
    return rows


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 100), LIMITS)
def test_every_row_stands_in_one_micro_batch_within_the_limits(lengths, budget, max_rows):
    """No row is lost or doubled; only a row that alone exceeds the budget does so, and then alone."""
    groups = micro_batches(lengths, budget, max_rows)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert group == sorted(group)
        assert len(group) <= (max_rows or len(lengths))
        assert sum(lengths[row] for row in group) <= budget or len(group) == 1
    assert groups == micro_batches(lengths, budget, max_rows), "the same rows are cut the same way again"


@settings(deadline=None)
@given(LENGTHS, st.integers(60, 200))
def test_micro_batches_are_well_filled(lengths, budget):
    """Any two micro-batches together exceed the budget, so at most one is less than half full."""
    sums = [sum(lengths[row] for row in group) for group in micro_batches(lengths, budget)]
    assert all(a + b > budget for n, a in enumerate(sums) for b in sums[n + 1 :])


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 100), LIMITS)
def test_balanced_micro_batches_keep_to_the_same_limits(lengths, budget, max_rows):
    """Every row once, within the limits, in as many micro-batches as without, and the same way again."""
    groups = micro_batches(lengths, budget, max_rows, balanced=True)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert group == sorted(group) != []
        assert len(group) <= (max_rows or len(lengths))
        assert sum(lengths[row] for row in group) <= budget or len(group) == 1
    assert len(groups) == len(micro_batches(lengths, budget, max_rows))
    assert groups == micro_batches(lengths, budget, max_rows, balanced=True)


@settings(deadline=None)
@given(LENGTHS, st.integers(60, 200))
def test_balanced_micro_batches_differ_by_one_row(lengths, budget):
    """The fullest has no more than one row's tokens over the emptiest, unless balancing broke the budget."""
    groups = micro_batches(lengths, budget, balanced=True)
    sums = [sum(lengths[row] for row in group) for group in groups]
    if groups != micro_batches(lengths, budget):
        assert max(sums) - min(sums) <= max(lengths)


def test_balancing_evens_out_and_gives_way():
    """110 and 30 become 70 and 70; where only 3 + 3 and 2 + 2 + 2 fit, balancing would need a third and gives way."""
    assert micro_batches([40, 30, 30, 40], 110) == [[0, 1, 3], [2]]
    assert micro_batches([40, 30, 30, 40], 110, balanced=True) == [[0, 1], [2, 3]]
    assert micro_batches([3, 3, 2, 2, 2], 6, balanced=True) == [[0, 1], [2, 3, 4]]


@settings(deadline=None)
@given(encoded_rows())
def test_labels_never_cross_rows(rows):
    """Each label is predicted from the token before it in its own row; a row's first token is never predicted."""
    batch = pack(rows)
    assert batch.row_lengths == tuple(len(row.input_ids) for row in rows)
    assert batch.input_ids.tolist() == [token for row in rows for token in row.input_ids]
    assert batch.positions.tolist() == [place for row in rows for place in range(len(row.input_ids))]
    wanted = [
        (number, place, label)
        for number, row in enumerate(rows)
        for place, label in enumerate(row.labels)
        if place and label != IGNORE_INDEX
    ]
    starts = [sum(batch.row_lengths[:number]) for number in range(len(rows))]
    found = zip(batch.row_of.tolist(), batch.predict.tolist(), batch.labels.tolist(), strict=True)
    assert [(number, at - starts[number] + 1, label) for number, at, label in found] == wanted
    tensors = (batch.input_ids, batch.positions, batch.predict, batch.labels, batch.row_of)
    assert all(t.dtype == torch.int64 for t in tensors)
    assert count_labels(rows) == len(wanted)
    assert batch.longest == max(batch.row_lengths)
    for tensor in tensors:
        assert tensor.untyped_storage().data_ptr() == batch.buffer.untyped_storage().data_ptr()
        assert tensor.storage_offset() * 8 % 128 == 0, "kernels see one alignment, whatever the lengths"


def test_a_batch_moves_whole():
    """``to`` keeps every tensor and the row lengths."""
    batch = pack([EncodedRow([1, 2, 3], [IGNORE_INDEX, 2, 3], (0, 1), (1, 3))])
    same(batch.to(torch.device("cpu")), batch)


@pytest.mark.gpu
def test_a_batch_moves_to_the_gpu_in_one_copy():
    """The tensors are views of one buffer there too; the copy comes from pinned memory and waits for nothing."""
    rows = [EncodedRow([*range(n)], [*range(n)], (0, 0), (0, n)) for n in (3, 700, 41)]
    batch = pack(rows)
    batch.to(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to(torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moved.labels.untyped_storage().data_ptr() == moved.input_ids.untyped_storage().data_ptr()
    same(moved, batch)


def same(moved, batch):
    """Assert equal row lengths and tensors."""
    assert moved.row_lengths == batch.row_lengths
    for name in ("input_ids", "positions", "predict", "labels", "row_of"):
        assert torch.equal(getattr(moved, name).cpu(), getattr(batch, name))


@pytest.mark.parametrize("rows", [[], [EncodedRow([7], [7], (0, 0), (0, 1))]])
def test_nothing_to_predict(rows):
    """No rows, or a row of one token, give a batch without labels."""
    batch = pack(rows)
    assert batch.labels.shape == batch.predict.shape == (0,)
    assert count_labels(rows) == 0
    assert batch.longest == len(rows)
