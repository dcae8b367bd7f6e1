"""Memory that is promised but not in use at the moment → more of it for the expert cache.

The budget sets memory aside for the longest sequence there may be, and for all that the process
may grow by. Most passes need little of it. Before each pass this looks what the process really
has, adds what the pass may come to need, and lets the cache have the rest of the promise; the next
long prompt takes it back. docs/decisions/0009-memory-budget.md has the numbers.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from zipmoe.recording import pass_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from zipmoe.budget import Demand, MemoryReport

__all__ = ["MARGIN_BYTES", "Lending", "resident_bytes", "see_passes"]

# What the process may grow by unseen between two looks.
MARGIN_BYTES = 64_000_000
# More than before by less than this part of its share is not worth moving the limit for.
_WORTH_PARTS = 64
# A KV cache grows by so many tokens at a time (zipmoe.kv), and copies a layer as it does.
_KV_STEP = 256


class LimitedCache(Protocol):
    """What is needed of `zipmoe._core.ExpertCache`."""

    @property
    def filled_bytes(self) -> int: ...
    def limit(self, most: int) -> int: ...


def resident_bytes() -> int:
    """Memory of this process now, as `budget.rss_bytes`, but quickly."""
    with open("/proc/self/statm", "rb", buffering=0) as file:  # noqa: PTH123  a third of the time
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Lending:
    """How much the expert cache may take, from pass to pass. Safe to use from several threads.

    Never less than the cache's own share of the report, unless memory is withheld from it.
    """

    cache: LimitedCache
    capacity: int  # most that the cache can take
    report: MemoryReport
    demand: Demand
    resident: Callable[[], int] = resident_bytes
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
        kv = self.demand.kv_bytes(known + tokens + _KV_STEP, sequences)
        kv -= self.demand.kv_bytes(known, sequences)
        with self._lock:
            self._coming[threading.get_ident()] = kv + self.demand.scratch_bytes(tokens, sequences)
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


def see_passes(model: Any) -> None:
    """Let the model's `zipmoe.lending` know of every forward pass."""
    # Functions, not methods: a copy of the model, which is refused, would begin with its hooks.
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, with_kwargs=True, always_call=True)


def _begin(model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    sequences, tokens = pass_shape(args, inputs)
    past = inputs.get("past_key_values")
    known = 0 if past is None else past.get_seq_length()
    model.zipmoe.lending.begin(tokens, known, sequences)


def _end(model: Any, *_: Any, **__: Any) -> None:
    model.zipmoe.lending.end()
