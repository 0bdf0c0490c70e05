"""Drawing tokens: shares against transformers' warpers, and noise that depends on seed, number and token alone."""

import math

import pytest
import torch

from deepdoctor.model import sampling as sampling_module
from deepdoctor.model.sampling import Sampling, draw, uniform

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.4, 0.9, -3.0, 1.2])


def frequencies(logits: torch.Tensor, sampling: Sampling, draws: int = 3000) -> torch.Tensor:
    """Share of every token over many draws of one request."""
    tokens = torch.tensor([draw(logits, sampling, number) for number in range(draws)])
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
@pytest.mark.parametrize("candidates", [2, 512])
def test_draws_follow_the_settings(temperature, top_p, top_k, min_p, candidates, monkeypatch):
    """3,000 draws show transformers' probabilities within five standard errors, and nothing that they leave out."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    monkeypatch.setattr(sampling_module, "FIRST_CANDIDATES", candidates)
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


def test_noise_is_uniform_and_independent():
    """Means, spread and correlations of neighbouring seeds, numbers and tokens are those of independent uniforms."""
    tokens = torch.arange(20_000)
    base = uniform(7, 3, tokens)
    assert float(base.min()) > 0 and float(base.max()) < 1
    assert abs(float(base.mean()) - 0.5) < 5 / math.sqrt(12 * len(tokens))
    others = [uniform(8, 3, tokens), uniform(7, 4, tokens), uniform(7 + (1 << 32), 3, tokens), base.roll(1)]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(len(tokens))
    counts = torch.histc(base, 100, 0, 1)
    assert float(((counts - 200) ** 2 / 200).sum()) < 150  # chi square of 99 degrees: 1 in 1,000 above 148
    assert torch.equal(uniform(7, 3, torch.tensor([5, 19])), base[[5, 19]])


def test_the_seed_and_the_number_decide_a_draw():
    """The same pair draws the same token; many seeds, or many numbers, draw all tokens."""
    flat = torch.zeros(5)
    assert draw(flat, Sampling(1, 1.0, seed=3), 2) == draw(flat.clone(), Sampling(9, 1.0, seed=3), 2)
    assert {draw(flat, Sampling(1, 1.0, seed=seed), 0) for seed in range(60)} == set(range(5))
    assert {draw(flat, Sampling(1, 1.0), number) for number in range(60)} == set(range(5))
