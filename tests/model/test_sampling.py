"""Drawing tokens: shares against transformers' warpers, and what a request's settings become."""

import pytest
import torch

from deepdoctor.errors import ModelError
from deepdoctor.kernels import sample as sample_module
from deepdoctor.kernels.sample import sample
from deepdoctor.model.drawer import Drawer
from deepdoctor.model.sampling import Sampling, settings_of

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.4, 0.9, -3.0, 1.2])


def draw(logits: torch.Tensor, sampling: Sampling, number: int) -> int:
    """The token of a request that is alone, after so many draws; logits (V,)."""
    tokens, _ = Drawer(1, len(logits), logits.device).draw(logits[None], 0, [sampling], [number], {})
    return tokens[0]


def frequencies(logits: torch.Tensor, sampling: Sampling, draws: int = 3000) -> torch.Tensor:
    """Share of every token over many draws of one request."""
    tokens = sample(logits.expand(draws, -1).contiguous(), settings_of([sampling] * draws, range(draws), "cpu"))
    return torch.bincount(tokens, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0.0),
        (0.6, 1.0, 0, 0.0),
        (1.0, 0.75, 0, 0.0),
        (0.6, 0.95, 0, 0.0),
        (2.0, 0.5, 0, 0.0),
        (1.0, 1.0, 3, 0.0),
        (1.0, 0.7, 4, 0.0),
        (1.0, 1.0, 0, 0.3),
        (1.5, 0.9, 5, 0.2),
    ],
)
@pytest.mark.parametrize("depths", [sample_module.DEPTHS, (0.5, 1.0, float("inf"))])
def test_draws_follow_the_settings(temperature, top_p, top_k, min_p, depths, monkeypatch):
    """3,000 draws show transformers' probabilities within five standard errors, and nothing that they leave out."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    monkeypatch.setattr(sample_module, "DEPTHS", depths)
    scores = TemperatureLogitsWarper(temperature)(None, LOGITS[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    wanted = scores[0].softmax(-1)
    found = frequencies(LOGITS, Sampling(1, temperature, top_p, top_k=top_k, min_p=min_p))
    assert not found[wanted == 0].any()
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / 3000).sqrt() + 1e-9).all()


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    """Of 0.5, 0.3, 0.2: a top_p up to 0.5 keeps one token, up to 0.8 two, above it three; the first always stays."""
    logits = torch.tensor([0.3, 0.5, 0.2]).log()
    for top_p, kept in ((1e-9, [1]), (0.49, [1]), (0.51, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2])):
        found = frequencies(logits, Sampling(1, 1.0, top_p), 300)
        assert found.nonzero()[:, 0].tolist() == kept, top_p


def test_the_seed_and_the_number_decide_a_draw():
    """The same pair draws the same token; many seeds, or many numbers, draw all tokens."""
    flat = torch.zeros(5)
    assert draw(flat, Sampling(1, 1.0, seed=3), 2) == draw(flat.clone(), Sampling(9, 1.0, seed=3), 2)
    assert {draw(flat, Sampling(1, 1.0, seed=seed), 0) for seed in range(60)} == set(range(5))
    assert {draw(flat, Sampling(1, 1.0), number) for number in range(60)} == set(range(5))


def test_a_draw_is_a_row_of_the_op():
    """A request draws alone what the op gives for it among others; logits that are nan are refused."""
    samplings = [Sampling(1, 0.8, 0.9, seed=5, top_k=4, min_p=0.01), Sampling(1), Sampling(1, 1.0, seed=1 << 40)]
    tokens = sample(LOGITS.expand(3, -1).contiguous(), settings_of(samplings, [7, 8, 9], "cpu"))
    assert tokens.tolist() == [draw(LOGITS, s, 7 + n) for n, s in enumerate(samplings)]
    with pytest.raises(ModelError, match="nan"):
        draw(LOGITS * float("nan"), samplings[0], 0)
