"""Logits of one token → a draw from them, for one request by itself.

A function of that row and of a number from 0 to 1, and of nothing else: whoever draws keeps a
generator for each request. The order of the steps is that of transformers' `generate`: temperature,
top_k, top_p, min_p, each on what those before have left. Sorting a vocabulary takes longer than
multiplying a layer with a token, so only what can be in the nucleus is sorted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["draw"]


def draw(
    logits: NDArray[np.float32],
    uniform: float,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """Draw a token by logits [vocabulary]; -inf for what may not be drawn.

    Parameters
    ----------
    uniform : in [0, 1). Tokens have their parts of it in ascending order of their ids.
    temperature : above 0. For 0 take the largest logit, of equals the first.
    top_k : keep so many of the likeliest, and all that are as likely as the last; 0: no such limit.
    top_p : keep the fewest of the likeliest that have this probability together, of equals the
        first.
    min_p : keep what has at least this part of the largest probability.
    """
    values = logits.astype(np.float64) / temperature
    weights = np.exp(values - values.max())
    if 0 < top_k < len(weights):
        weights[weights < np.partition(weights, -top_k)[-top_k]] = 0
    if top_p < 1:
        _cut_to_nucleus(weights, top_p)
    weights[weights < min_p] = 0  # the largest is 1
    reached = np.cumsum(weights)
    token = int(np.searchsorted(reached, uniform * reached[-1], side="right"))
    return token if token < len(weights) else int(np.flatnonzero(weights)[-1])


def _cut_to_nucleus(weights: NDArray[np.float64], top_p: float) -> None:
    total = weights.sum()
    # All that is lighter weighs less than 1 - top_p together.
    able = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    order = able[np.argsort(-weights[able], kind="stable")]
    before = np.cumsum(weights[order]) - weights[order]
    kept = order[: max(1, np.count_nonzero(before < top_p * total))]
    nucleus = weights[kept]
    weights[:] = 0
    weights[kept] = nucleus
