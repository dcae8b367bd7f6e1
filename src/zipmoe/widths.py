"""A loss that is allowed → the width of every expert: EdgeMoE's search (arXiv 2308.14352).

Between two uniform widths, one of which loses too much, the least important experts take the lower
one: as many of them as the measured loss allows. Knows neither models nor texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zipmoe.lowered import LOSSLESS, WIDTHS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from zipmoe.lowered import Place

    Loss = Callable[[Mapping[Place, str]], float]  # widths → what is lost, measured

__all__ = ["Assignment", "assign", "bracket", "fewest", "uniform"]


@dataclass(frozen=True)
class Assignment:
    """The width of every expert, and what it costs."""

    widths: dict[Place, str]
    loss: float
    pair: tuple[str, str]  # the lower and the higher width
    lowered: int  # experts in the lower one


def uniform(places: Sequence[Place], width: str) -> dict[Place, str]:
    """Give all experts one width."""
    return dict.fromkeys(places, width)


def bracket(places: Sequence[Place], loss: Loss, most: float) -> tuple[str, str]:
    """Find the neighbouring widths of which only the higher one, for all experts, loses little.

    The fewest bits there are, twice, where even those do.
    """
    high = LOSSLESS
    for low in reversed(WIDTHS[:-1]):
        if loss(uniform(places, low)) > most:
            return low, high
        high = low
    return high, high


def assign(order: Sequence[Place], pair: tuple[str, str], count: int) -> dict[Place, str]:
    """Give the first `count` experts of an order the lower width, and the others the higher."""
    low, high = pair
    return uniform(order[:count], low) | uniform(order[count:], high)


def fewest(order: Sequence[Place], pair: tuple[str, str], loss: Loss, most: float) -> Assignment:
    """Lower as many experts, the least important first, as lose at most `most`, by bisection.

    The loss need not grow with every expert; what is returned was measured, and loses no more
    than allowed, while with one expert more too much was measured.
    """
    if pair[0] == pair[1]:
        widths = uniform(order, pair[0])
        return Assignment(widths, loss(widths), pair, len(order))
    good, bad = 0, len(order)
    reached = loss(assign(order, pair, 0))
    while bad - good > 1:
        middle = (good + bad) // 2
        found = loss(assign(order, pair, middle))
        if found <= most:
            good, reached = middle, found
        else:
            bad = middle
    return Assignment(assign(order, pair, good), reached, pair, good)
