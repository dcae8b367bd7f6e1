"""Memory that is promised but not in use at the moment → more of it for the expert cache.

The budget sets memory aside for the longest sequence there may be, and for all that the process
may grow by. Most passes need little of it. Before each pass this looks what the process really
has, adds what the pass may come to need, and lets the cache have the rest of the promise; the next
long prompt takes it back. docs/decisions/0009-memory-budget.md has the numbers.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from zipmoe import kv
from zipmoe._process import rss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from zipmoe.budget import Demand, MemoryReport

__all__ = ["MARGIN_BYTES", "Lending"]

# What the process may grow by unseen between two looks.
MARGIN_BYTES = 64_000_000
# More than before by less than this part of its share is not worth moving the limit for.
_WORTH_PARTS = 64


class LimitedCache(Protocol):
    """What is needed of `zipmoe._core.ExpertCache`."""

    @property
    def filled_bytes(self) -> int: ...
    def limit(self, most: int) -> int: ...


@dataclass
class Lending:
    """How much the expert cache may take, from pass to pass. Safe to use from several threads.

    Never less than the cache's own share of the report, unless memory is withheld from it.
    """

    cache: LimitedCache
    capacity: int  # most that the cache can take
    report: MemoryReport
    demand: Demand
    resident: Callable[[], int] = rss_bytes
    lent: int = 0  # bytes beyond its share that the cache may have now
    _withheld: int = 0  # of its share: memory that others need
    _coming: dict[int, int] = field(default_factory=dict)  # bytes, by pass under way
    _is_warm: bool = False  # a pass has ended: the process has grown as far as it does
    _given: int = 0  # what the cache was told last
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._given = self.report.cache

    def begin(self, tokens: int, known: int = 0, sequences: int = 1) -> None:
        """Make room for a pass of this thread: so many new tokens of each sequence."""
        room = self.demand.kv_bytes(known + tokens + kv.STEP, sequences)
        room -= self.demand.kv_bytes(known, sequences)
        with self._lock:
            self._coming[threading.get_ident()] = room + self.demand.scratch_bytes(
                tokens, sequences
            )
            if self._is_warm:
                others = self.resident() - self.cache.filled_bytes
                rest = self.report.promised - others - sum(self._coming.values()) - MARGIN_BYTES
                self.lent = min(max(rest, self.report.cache), self.capacity) - self.report.cache
                self._tell()

    def end(self) -> None:
        """Note that the pass of this thread has ended, well or not."""
        with self._lock:
            self._coming.pop(threading.get_ident(), None)
            self._is_warm = True

    def limit(self, most: int) -> int:
        """Withhold from the cache what of its own share is beyond this. Bytes it will come to."""
        with self._lock:
            self._withheld = max(self.report.cache - most, 0)
            return self._tell()

    def _tell(self) -> int:
        wanted = self.report.cache - self._withheld + self.lent
        if not self._given <= wanted < self._given + self.report.cache // _WORTH_PARTS:
            self.cache.limit(wanted)
            self._given = wanted
        return self._given
