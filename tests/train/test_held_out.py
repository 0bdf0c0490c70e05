"""Held-out losses are what transformers computes for each row on its own."""

import math

import pytest
import torch

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.model.load import load_decoder
from deepdoctor.train.held_out import RowLoss, held_out_losses, mean_loss
from helpers_train import new_adapter, short_section, synthetic_rows

ROWS = synthetic_rows(7, seed=3)


@pytest.fixture(scope="module")
def decoder(tiny_r1):
    """The tiny base in fp32."""
    return load_decoder(tiny_r1, "fp32")


@pytest.fixture
def adapter(decoder):
    """An adapter that changes the loss: its B is not zero."""
    made = new_adapter(decoder, short_section()).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for b in made.b.values():
            b.normal_(std=0.05)
    return made


def stock_model(folder, adapter=None):
    """The same weights in transformers, the adapter's product added to each projection."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        for name, module in model.named_modules():
            layer, _, projection = name.removeprefix("model.layers.").partition(".")
            delta = adapter.delta(int(layer), projection.split(".")[-1]) if projection.endswith("_proj") else None
            if delta is not None:
                module.weight.data += delta
    return model


def stock_loss(model, row, start, end):
    """Summed loss of the labels in [start, end), the row alone in the batch."""
    labels = [label if start <= place < end else IGNORE_INDEX for place, label in enumerate(row.labels)]
    count = sum(label != IGNORE_INDEX for label in labels[1:])
    with torch.inference_mode():
        mean = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
    return float(mean) * count, count


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("token_budget", [20, 1000])
def test_each_rows_losses_are_transformers(tiny_r1, decoder, adapter, side, token_budget):
    """Reasoning and answer apart, sums and counts, packed alone or together, base and with adapter."""
    on = adapter if side == "tuned" else None
    model = stock_model(tiny_r1, on)
    for row, found in zip(ROWS, held_out_losses(decoder, on, ROWS, token_budget), strict=True):
        for part, (start, end) in (("reasoning", row.reasoning), ("answer", row.answer)):
            loss, count = stock_loss(model, row, start, end)
            assert getattr(found, f"{part}_tokens") == count
            assert getattr(found, part) == pytest.approx(loss, rel=2e-5)
        assert found.tokens == sum(label != IGNORE_INDEX for label in row.labels[1:])
    both = zip(*(held_out_losses(decoder, a, ROWS, 1000) for a in (None, adapter)), strict=True)
    assert max(abs(base.total - tuned.total) for base, tuned in both) > 0.1, "the adapter must make a difference here"


def test_a_prompt_that_trains_is_not_reasoning(decoder):
    """With train_on all the prompt carries labels; its loss used to be booked as reasoning."""
    trained = [EncodedRow(row.input_ids, list(row.input_ids), row.reasoning, row.answer) for row in ROWS]
    assert held_out_losses(decoder, None, trained, 1000) == held_out_losses(decoder, None, ROWS, 1000)


def test_only_the_answer_labelled(decoder):
    """With train_on answer the reasoning has no tokens and no loss, the answer the same as ever."""
    answers = [
        EncodedRow(r.input_ids, [IGNORE_INDEX] * r.answer[0] + r.labels[r.answer[0] :], r.reasoning, r.answer)
        for r in ROWS
    ]
    for whole, part in zip(*(held_out_losses(decoder, None, rows, 1000) for rows in (ROWS, answers)), strict=True):
        assert (part.reasoning, part.reasoning_tokens) == (0.0, 0)
        assert part.answer_tokens == whole.answer_tokens
        assert part.answer == pytest.approx(whole.answer, rel=1e-6)


def test_progress_counts_every_row(decoder):
    """on_rows hears of all rows, whatever the budget."""
    heard = []
    held_out_losses(decoder, None, ROWS, 60, heard.append)
    assert sum(heard) == len(ROWS)
    assert len(heard) > 1


def test_the_mean_is_over_tokens():
    """A long row counts for more than a short one; without tokens there is no mean."""
    assert mean_loss([RowLoss(2.0, 1, 0.0, 0), RowLoss(3.0, 6, 6.0, 3)]) == pytest.approx(1.1)
    assert math.isnan(mean_loss([]))
