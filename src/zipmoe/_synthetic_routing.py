"""A seed → a routing trace with the statistics of trained models, for whoever has no recorded one.

A token's logit for an expert is the sum of four parts: the expert's popularity, which hardly
differs; its fit to the conversation; its fit to the passage, which drifts from token to token; and
what the single token brings. The k largest win. docs/planning.md names the statistics that the
constants were fitted to; `benchmarks/routing.py` prints both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zipmoe.routing import Popularity, Trace, by_recency

__all__ = ["Routing", "synthetic_trace", "typical_popularity"]

# Standard deviations of the parts, where the token's own is that of a Gumbel variable (1.28).
POPULARITY = 0.42
CONVERSATION = 0.50
PASSAGE = 0.80
# Correlation of a passage's part from one token to the next: it is another after a dozen.
PERSISTENCE = 0.8


@dataclass(frozen=True)
class Routing:
    """Sizes of a trace to be made."""

    num_experts: int
    num_layers: int
    top_k: int
    num_requests: int
    prompt_tokens: int
    decode_tokens: int


def synthetic_trace(sizes: Routing, seed: int) -> Trace:
    """Make a trace of requests that run one after the other, each a prompt and then single tokens.

    Same seed and sizes, same trace.
    """
    rng = np.random.default_rng(seed)
    shape = (sizes.num_layers, sizes.num_experts)
    popularity = POPULARITY * rng.standard_normal(shape)
    num_tokens = sizes.prompt_tokens + sizes.decode_tokens
    chosen = []
    for _ in range(sizes.num_requests):
        fit = popularity + CONVERSATION * rng.standard_normal(shape)
        passage = rng.standard_normal(shape)
        for _ in range(num_tokens):
            logits = fit + PASSAGE * passage + rng.gumbel(size=shape)
            chosen.append(np.argpartition(-logits, sizes.top_k - 1, axis=1)[:, : sizes.top_k])
            fresh = rng.standard_normal(shape)
            passage = PERSISTENCE * passage + np.sqrt(1 - PERSISTENCE**2) * fresh
    tokens = np.array([sizes.prompt_tokens] + [1] * sizes.decode_tokens, np.int64)
    num_runs = sizes.num_requests * len(tokens)
    return Trace(
        sizes.num_experts,
        np.stack(chosen).astype(np.int64),
        step=np.arange(num_runs),
        request=np.repeat(np.arange(sizes.num_requests), len(tokens)),
        tokens=np.tile(tokens, sizes.num_requests),
    )


def typical_popularity(num_experts: int, top_k: int) -> Popularity:
    """Give the popularity to plan with where nothing was recorded."""
    sizes = Routing(num_experts, 4, top_k, num_requests=4, prompt_tokens=32, decode_tokens=128)
    inclusion = by_recency(synthetic_trace(sizes, seed=0)).inclusion
    return Popularity(inclusion, "recency in synthetic routing")
