"""Draws: from the distribution that transformers' own warpers make, and from nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zipmoe.sampling import draw


def warped(logits, temperature, top_k, top_p, min_p):
    """Probabilities [vocabulary] by transformers, in float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    return torch.softmax(warpers(torch.zeros(1, 0, dtype=torch.long), scores), -1)[0].numpy()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    size=st.sampled_from([1, 2, 7, 300, 3000]),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 200, 10_000]),
    top_p=st.sampled_from([1.0, 0.99, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_draws_are_those_of_transformers_distribution(
    seed, size, spread, temperature, top_k, top_p, min_p
):
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal(size)).astype(np.float32)
    rule = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = warped(logits, **rule)
    reached = np.cumsum(expected)
    uniforms = [0.0, *rng.random(50), np.nextafter(1.0, 0.0)]
    for uniform in uniforms:
        token = draw(logits, uniform, **rule)
        assert expected[token] > 0
        assert reached[token] >= uniform - 1e-9
        assert reached[token] - expected[token] <= uniform + 1e-9


def test_of_equals_in_the_nucleus_the_first_are_kept_and_of_top_k_all():
    logits = np.zeros(8, np.float32)
    uniforms = np.linspace(0, 0.999, 100)
    assert {draw(logits, u, temperature=1.0, top_p=0.3) for u in uniforms} == {0, 1, 2}
    assert {draw(logits, u, temperature=1.0, top_k=2) for u in uniforms} == set(range(8))
    assert {draw(logits, u, temperature=1.0, min_p=1.0) for u in uniforms} == set(range(8))


@pytest.mark.parametrize("rule", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_what_may_not_be_drawn_never_is(rule):
    logits = np.full(50, -np.inf, np.float32)
    logits[[7, 30]] = [1.0, 1.5]
    drawn = {draw(logits, u, temperature=1.0, **rule) for u in np.linspace(0, 0.9999, 200)}
    assert drawn == {7, 30}


def test_the_logits_stay_as_they_are():
    logits = np.arange(10, dtype=np.float32)
    draw(logits, 0.5, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1)
    assert logits.tolist() == list(range(10))
