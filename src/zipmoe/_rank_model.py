"""Inclusion probabilities by rank → the law of which ranks a step activates, and of its hits.

The law is the one of maximum entropy: given how many experts are activated, a set has probability
proportional to the product of its ranks' weights (conditional Poisson sampling). It is kept in the
form of independent coins, one a rank, thrown until the right number shows heads. docs/planning.md
has the mathematics; names of symbols are in its table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = ["RankLaw", "batch_law", "expectation", "fit_law", "hit_law", "number_of_heads"]

_TOLERANCE = 1e-11  # of each inclusion probability
_MOST_ROUNDS = 2000
# Power of the correction of a round. 1 can swing for ever (two ranks, one activated); below 1 each
# error shrinks. docs/planning.md
_DAMPING = 0.75
_NEGLIGIBLE = 1e-13  # probability of a number of experts that is left out


@dataclass(frozen=True, eq=False)
class RankLaw:
    """A law on sets of ranks."""

    coins: NDArray[np.float64]  # [experts]: probability of heads
    size: NDArray[np.float64]  # [experts + 1]: probability of so many activated experts

    @cached_property
    def heads(self) -> NDArray[np.float64]:
        """Probability of each number of heads."""
        return number_of_heads(self.coins)

    @property
    def support(self) -> list[int]:
        """Numbers of activated experts that occur."""
        return [int(d) for d in np.flatnonzero(self.size > _NEGLIGIBLE)]

    @property
    def inclusion(self) -> NDArray[np.float64]:
        """Probability of each rank to be activated."""
        others = _heads_of_others(self.coins, self.heads)
        sizes = np.array(self.support)
        share = np.where(sizes > 0, self.size[sizes] / self.heads[sizes], 0.0)
        return self.coins * (others[:, sizes - 1] @ share)


def number_of_heads(coins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Law of the number of heads of independent coins (Poisson-binomial)."""
    law = np.zeros(len(coins) + 1)
    law[0] = 1.0
    for coin in coins:
        law[1:] = law[1:] * (1 - coin) + law[:-1] * coin
        law[0] *= 1 - coin
    return law


def _heads_of_others(coins: NDArray[np.float64], heads: NDArray[np.float64]) -> NDArray[np.float64]:
    """[experts, experts + 1]: law of the number of heads without each coin.

    Taking a coin out again divides by (1 - q + q z): from the low end where q is at most 1/2, from
    the high end otherwise, so that errors do not grow.
    """
    others = np.zeros((len(coins), len(heads)))
    low = coins <= 0.5
    q, p = coins[low], 1 - coins[low]
    others[low, 0] = heads[0] / p
    for j in range(1, len(heads)):
        others[low, j] = (heads[j] - q * others[low, j - 1]) / p
    q, p = coins[~low], 1 - coins[~low]
    for j in range(len(heads) - 1, 0, -1):
        others[~low, j - 1] = (heads[j] - p * others[~low, j]) / q
    return others


def fit_law(inclusion: ArrayLike, size: ArrayLike | None = None) -> RankLaw:
    """Find the law with these inclusion probabilities, by iterative fitting of the odds.

    Without `size`, every step activates the same number of experts, their sum.

    Raises
    ------
    ValueError
        No law has them: one is not within 0 and 1, or their sum is not the mean size.
    """
    wanted = np.asarray(inclusion, np.float64)
    total = float(wanted.sum())
    sizes = np.arange(len(wanted) + 1)
    law = (sizes == round(total)) * 1.0 if size is None else np.asarray(size, np.float64)
    if (wanted < 0).any() or (wanted > 1).any():
        raise ValueError("inclusion probabilities lie within 0 and 1")
    if abs(float(sizes @ law) - total) > 1e-9 or abs(float(law.sum()) - 1) > 1e-9:
        raise ValueError(f"inclusion probabilities sum to {total}, not to the mean size")
    open_ranks = (wanted > 0) & (wanted < 1)
    weights = np.where(open_ranks, wanted, 0.5)
    weights = weights / (1 - weights)
    for _ in range(_MOST_ROUNDS):
        found = RankLaw(_coins(weights, wanted), law)
        reached = found.inclusion
        if np.abs(reached - wanted)[open_ranks].max(initial=0.0) < _TOLERANCE:
            return found
        reached = np.clip(reached[open_ranks], 1e-15, 1 - 1e-15)
        aim = wanted[open_ranks]
        weights[open_ranks] *= (aim / (1 - aim) * (1 - reached) / reached) ** _DAMPING
    raise ValueError("these inclusion probabilities are too close to certainty to be fitted")


def _coins(weights: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make coins of weights, scaled so that as many heads are expected as experts are activated.

    The law does not depend on the scale; how exactly it can be computed does.
    """
    certain, never = wanted >= 1, wanted <= 0
    low, high = -80.0, 80.0
    for _ in range(60):
        middle = (low + high) / 2
        scaled = weights * np.exp(middle)
        coins = np.where(certain, 1.0, np.where(never, 0.0, scaled / (1 + scaled)))
        low, high = (middle, high) if coins.sum() < wanted.sum() else (low, middle)
    return coins


def hit_law(law: RankLaw, pools: Sequence[int], activated: int) -> NDArray[np.float64]:
    """Law of the hits in each pool, given how many experts are activated.

    Pools hold ranks one after the other: the first ones, those after them, and so on.

    Returns
    -------
    Array
        [hits in the first pool, hits in the second, ...].
    """
    *heads, rest = _heads_by_pool(law, pools)
    return _joint(heads, rest, activated) / law.heads[activated]


def _heads_by_pool(law: RankLaw, pools: Sequence[int]) -> list[NDArray[np.float64]]:
    """Laws of the number of heads in each pool, and among the ranks in none."""
    borders = np.cumsum(pools, dtype=int)
    return [number_of_heads(coins) for coins in np.split(law.coins, borders)]


def _joint(
    heads: list[NDArray[np.float64]], rest: NDArray[np.float64], activated: int
) -> NDArray[np.float64]:
    joint = np.ones(())
    for pool in heads:
        joint = np.multiply.outer(joint, pool[: activated + 1])
    missed = np.full(joint.shape, activated)
    for hits in np.ogrid[tuple(map(slice, joint.shape))]:
        missed -= hits
    possible = (missed >= 0) & (missed < len(rest))
    return joint * np.where(possible, rest[np.where(possible, missed, 0)], 0.0)


def expectation(
    law: RankLaw, pools: Sequence[int], cost: Callable[[int], NDArray[np.float64]]
) -> tuple[float, float]:
    """Mean and standard deviation of a cost.

    `cost` gives a table for a number of activated experts: [hits in the first pool, ...], each
    from 0 to that number. Entries with more hits than activated experts do not count.
    """
    *heads, rest = _heads_by_pool(law, pools)
    mean = square = 0.0
    for activated in law.support:
        joint = law.size[activated] / law.heads[activated] * _joint(heads, rest, activated)
        value = cost(activated)[tuple(map(slice, joint.shape))]
        mean += float((joint * value).sum())
        square += float((joint * value**2).sum())
    return mean, max(square - mean**2, 0.0) ** 0.5


def batch_law(token: RankLaw, tokens: int) -> RankLaw:
    """Give the law of the distinct experts of several tokens, each with the law `token`.

    Tokens choose independently, so the inclusion probabilities are exact. The number of distinct
    experts is followed token by token: how many of a token's experts the union of those before it
    has, where that union has the maximum-entropy law of its size. The mean is exact, and so is the
    law for two tokens, and for any number where all ranks are equal.
    """
    (k,) = token.support
    missing = 1 - token.inclusion
    union = token
    for count in range(2, tokens + 1):
        size = np.zeros_like(union.size)
        overlap = _overlap_law(union, token, k)
        for held in union.support:
            for shared in range(k + 1):
                if (joined := held + k - shared) < len(size):
                    size[joined] += union.size[held] * overlap[held, shared]
        union = fit_law(1 - missing**count, size)
    return union


def _overlap_law(union: RankLaw, token: RankLaw, k: int) -> NDArray[np.float64]:
    """[size of the union, shared]: law of how many experts a token shares with a union."""
    largest = max(union.support)
    law = np.zeros((largest + 1, k + 1, k + 1))  # [in the union, in the token, in both]
    law[0, 0, 0] = 1.0
    for a, b in zip(union.coins, token.coins, strict=True):
        grown = law * ((1 - a) * (1 - b))
        grown[1:] += a * (1 - b) * law[:-1]
        grown[:, 1:] += (1 - a) * b * law[:, :-1]
        grown[1:, 1:, 1:] += a * b * law[:-1, :-1, :-1]
        law = grown
    shared = law[:, k]
    total = shared.sum(axis=1, keepdims=True)
    return np.divide(shared, total, out=np.zeros_like(shared), where=total > 0)
