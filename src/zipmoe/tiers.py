"""What is asked of the expert cache's tiers → how many experts each holds. Pure.

A tier's amount is a number of experts, of all layers together, or a share of the cache's memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zipmoe import _core
from zipmoe._errors import BudgetError, ZipmoeError
from zipmoe.budget import format_bytes
from zipmoe.schedule import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zipmoe.budget import MemoryReport

__all__ = ["Amounts", "cache_bytes", "counts", "described", "parse_tiers"]

Amounts = tuple[int | float, int | float, int | float, int | float]
"""Of full, compressed, sign-mantissa, exponents: experts, or (float) a share of the memory."""

_HELD = tuple(Tier)[:-1]
_LEAST = 2  # experts that are held whole: one to compute from, one to read into


def parse_tiers(text: str | Sequence[int | float]) -> Amounts:
    """Read "F,C,S,E": each a number of experts or, with %, a share of the memory.

    Numbers are taken as they are, floats as shares.

    Raises
    ------
    ValueError
        For anything else, and for shares of more than the whole.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    try:
        amounts = [_amount(part) for part in parts]
    except ValueError:
        amounts = []
    if len(amounts) != len(_HELD) or min(amounts) < 0 or not any(amounts):
        raise ValueError(
            f"{text!r} says nothing of tiers: give four amounts, full, "
            "compressed, sign-mantissa, exponents, each a "
            "number of experts or a share of the cache's memory, as 0,40%,60%,0"
        )
    if sum(amount for amount in amounts if isinstance(amount, float)) > 1:
        raise ValueError(f"the tiers {text!r} are more than the whole memory")
    full, compressed, sign_mantissa, exponents = amounts
    return full, compressed, sign_mantissa, exponents


def _amount(part: str | float) -> int | float:
    if not isinstance(part, str):
        return part
    part = part.strip()
    return float(part[:-1]) / 100 if part.endswith("%") else int(part)


def counts(amounts: Amounts, table: Any, memory: MemoryReport) -> tuple[int, int, int, int]:
    """Say how many experts of the table (`ExpertCache`) each tier holds.

    Raises
    ------
    BudgetError
        They need more than the cache's share of the memory; it names what would be enough.
    ZipmoeError
        The experts' codec does not have these tiers.
    """
    base, *sizes = _core.ExpertCache.tier_bytes(table)
    shared = max(0, memory.cache - base - _LEAST * sizes[1])
    full, compressed, sign_mantissa, exponents = (
        int(amount * shared / size) if isinstance(amount, float) else amount
        for amount, size in zip(amounts, sizes, strict=True)
    )
    found = full, compressed, sign_mantissa, exponents
    needed = _needed(table, found)
    if needed > memory.cache:
        floor = memory.promised - memory.cache + needed
        raise BudgetError(
            f"{described(found)} experts need {format_bytes(needed)}, and "
            f"{format_bytes(memory.promised)} of memory leave {format_bytes(memory.cache)} for "
            f"them; grant {-(-floor // 1_000_000) / 1000:.3f} GB or ask for fewer with --tiers",
            floor_bytes=floor,
        )
    return found


def cache_bytes(table: Any, amounts: Amounts | None) -> tuple[int, int]:
    """Give the least expert cache that works, and one with room for all that can be asked for."""
    floor = _core.ExpertCache.floor_bytes(table)
    everything = len({(layer, expert) for layer, expert in table[:, :2].tolist()})
    full = everything if amounts is not None and amounts[0] else 0
    return floor, max(floor, _needed(table, (full, everything, 0, 0)))


def _needed(table: Any, numbers: tuple[int, int, int, int]) -> int:
    try:
        return _core.ExpertCache.needed_bytes(table, numbers)
    except ValueError as error:
        raise ZipmoeError(f"{error}; ask for no other with --tiers") from error


def described(numbers: Sequence[int]) -> str:
    """Put numbers of experts into words, as `TierSplit` does."""
    pairs = zip(_HELD, numbers, strict=True)
    return ", ".join(f"{count} {tier.value}" for tier, count in pairs if count)
