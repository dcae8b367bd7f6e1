"""The live picture of the machine: what the page shows, and one sentence of diagnosis."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zipmoe import budget

if TYPE_CHECKING:
    from zipmoe.serve.service import Service

__all__ = ["Machine", "Spent", "diagnose"]

_WINDOW_S = 60.0
_LEAST_TOKENS = 8  # fewer say nothing about where the time goes
_MORE_BYTES = 2_000_000_000  # of memory, what it would save
_BOUND = 0.4  # of the time, from which on a part is what to look at


@dataclass(frozen=True)
class Spent:
    """Where the time of some tokens went. Seconds, tokens, bytes, experts; `wall` is the whole."""

    tokens: int
    wall: float
    wait: float  # for reads
    decode: float  # weights decoded apart from multiplying
    busy: float  # in the engine, waiting included
    bytes_read: int
    hits: int
    misses: int

    def since(self, before: Spent) -> Spent:
        """Give the difference."""
        pairs = zip(vars(self).values(), vars(before).values(), strict=True)
        return Spent(*(now - then for now, then in pairs))

    @property
    def multiply(self) -> float:
        """Seconds in the engine that were not spent waiting or decoding."""
        return max(0.0, self.busy - self.wait - self.decode)


class Machine:
    """What a service is doing, now and in the last minute."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._past: deque[tuple[float, Spent]] = deque()

    def picture(self) -> dict[str, Any]:
        """Give all of it as a document."""
        service, runtime = self._service, self._service.loaded.runtime
        status, reason = service.scheduler.status()
        spent = self._spent()
        experts = sum(layer.experts for layer in runtime.source.layers)
        return {
            "model": service.name,
            "status": status,
            "reason": reason,
            "load": service.scheduler.load(),
            "streams": service.limits.streams,
            "memory": {
                **service.loaded.memory.as_dict(),
                "resident": budget.rss_bytes(),
                "peak": budget.peak_rss_bytes(),
            },
            "experts": {
                "slots": min(runtime.cache.slots, experts),
                "all": experts,
                "held": {tier.value: count for tier, count in service.metrics.held().items()},
            },
            "spent": vars(spent) | {"multiply": spent.multiply},
            "engaged": runtime.engaged(),
            "diagnosis": diagnose(self._lately(spent), self._saved()),
        }

    def _saved(self) -> float:
        """Estimate the part of the reads that `_MORE_BYTES` of memory would save."""
        cache = self._service.loaded.runtime.cache
        more = round(_MORE_BYTES / (cache.allocated_bytes / cache.slots))
        return self._service.popularity.saved(cache.slots, more)

    def _spent(self) -> Spent:
        counters, metrics = self._service.metrics.counters(), self._service.metrics
        return Spent(
            tokens=metrics.tokens,
            wall=metrics.busy_seconds,
            wait=counters["wait_ns"] / 1e9,
            decode=counters["decode_ns"] / 1e9,
            busy=counters.get("busy_ns", 0) / 1e9,
            bytes_read=counters["bytes_read"],
            hits=counters["hits"],
            misses=counters["misses"],
        )

    def _lately(self, spent: Spent) -> Spent:
        """Give what was spent in the last minute, as far as somebody asked then."""
        now = time.monotonic()
        self._past.append((now, spent))
        while len(self._past) > 1 and self._past[0][0] < now - _WINDOW_S:
            self._past.popleft()
        return spent.since(self._past[0][1])


def diagnose(lately: Spent, saved: float) -> str:
    """Say in one sentence what takes the time, and what would help.

    saved: what part of the reads some more memory (`_MORE_BYTES`) would save.
    """
    if lately.tokens < _LEAST_TOKENS or lately.wall <= 0:
        return "idle: no tokens to judge by"
    waiting = min(lately.wait / lately.wall, 1.0)
    multiplying = min(lately.multiply / lately.wall, 1.0)
    if waiting >= _BOUND:
        more, gain = budget.format_bytes(_MORE_BYTES), waiting * saved
        read = budget.format_bytes(lately.bytes_read / lately.tokens)
        return (
            f"disk-bound: {waiting:.0%} of the time waits on reads, {read} a token; {more} more "
            f"memory would save about {gain:.0%}"
        )
    if multiplying >= _BOUND:
        return (
            f"compute-bound: {multiplying:.0%} of the time is multiplying, {waiting:.0%} waits on "
            "reads; more memory would not help much"
        )
    return (
        f"mixed: {waiting:.0%} of the time waits on reads, {multiplying:.0%} multiplies, and the "
        "rest is between the two"
    )
