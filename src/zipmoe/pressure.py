"""Memory that others need → less of it for the expert cache, and later more again.

A thread looks what Linux says: how far a cgroup's limit lets this process grow, and whether tasks
have had to wait for memory. docs/decisions/0009-memory-budget.md says what is given back, and when.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from zipmoe._cgroups import memory_groups, pressure_file
from zipmoe._process import unreclaimable_bytes
from zipmoe.budget import format_bytes

if TYPE_CHECKING:
    from zipmoe.budget import MemoryReport

__all__ = ["Giving", "Signs", "Watch", "read_signs"]

PERIOD_S = 0.5  # between two looks
# Memory is short where less than this is free, of a cgroup or the machine: half of what a default
# budget leaves to others (budget.RESERVE_FRACTION), so that running as promised is not shortage.
SHORT_FRACTION, SHORT_BYTES = 0.05, 128_000_000
# And it is given back where tasks had to wait for it for this part of the time since the last look:
# without the waiting, what is free is the system's to use; without the shortage, the waiting has
# other causes (making huge pages, another group at its own limit).
STALLED_FRACTION = 0.10
GIVEN_PARTS = 8  # steps from all of the cache's share to nothing
# Taken back after a calm, more slowly.
CALM_S, REGAIN_S, REGAINED_PARTS = 30.0, 5.0, 16
# A limit's part is counted in so many steps, or every byte that others take would move the cache.
LIMIT_PARTS = 64


@dataclass(frozen=True)
class Signs:
    """What Linux says at one moment, bytes and seconds.

    allowed: what this process may come to under its cgroups' limits, others in them being as they
    are; None: no limit. spare: what may be taken before memory is short; negative: it is.
    stalled_s: for how long, so far, some task had to wait for memory; None: not told.
    """

    allowed: int | None
    spare: int
    stalled_s: float | None


def read_signs(root: Path = Path("/")) -> Signs:
    """Read them. Pages of files may be reclaimed: of others' memory, only the rest counts."""
    own = unreclaimable_bytes()
    meminfo = dict(re.findall(r"(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text()))
    free = [(int(meminfo["MemAvailable"]) * 1024, int(meminfo["MemTotal"]) * 1024)]
    allowed = []
    for group in memory_groups(root):
        if group.limit is None:
            continue
        others = group.usage - group.inactive_file - group.active_file - own
        allowed.append(group.limit - max(others, 0))
        free.append((group.limit - group.usage + group.inactive_file, group.limit))
    spare = min(left - max(int(of * SHORT_FRACTION), SHORT_BYTES) for left, of in free)
    return Signs(min(allowed, default=None), spare, _stalled_s(root))


def _stalled_s(root: Path) -> float | None:
    try:
        text = pressure_file(root).read_text()
    except OSError:  # a kernel without it, or that was told not to
        return None
    found = re.search(r"^some .*total=(\d+)", text, re.MULTILINE)
    return int(found[1]) / 1e6 if found else None


class Giving:
    """How much of its share the expert cache has, as signs come in. Pure; time is passed in."""

    def __init__(self, report: MemoryReport, floor: int) -> None:
        self.granted, self.bytes = report.cache, report.cache
        self._total, self._floor = report.total, min(floor, report.cache)
        self._last: tuple[float, float | None] | None = None  # when, and stalled_s
        self._uneasy = self._changed = float("-inf")

    def see(self, signs: Signs, now: float) -> tuple[str, str] | None:
        """Take signs in at `now` (seconds). Kind and reason, where `bytes` changed."""
        stalled = self._stalled(signs, now)
        ceiling = self._ceiling(signs.allowed)
        if signs.spare < 0 or ceiling < self.bytes:
            self._uneasy = now
        if ceiling < self.bytes:
            return self._change(
                ceiling,
                now,
                "limit",
                f"a cgroup's limit leaves {format_bytes(max(signs.allowed or 0, 0))} of "
                f"{format_bytes(self._total)} to this process",
            )
        if signs.spare < 0 and stalled:
            less = max(self.bytes - self.granted // GIVEN_PARTS, self._floor)
            return self._change(less, now, "pressure", "memory is short and tasks wait for it")
        step = min(self.granted // REGAINED_PARTS, ceiling - self.bytes)
        calm = now - self._uneasy >= CALM_S and now - self._changed >= REGAIN_S
        if step > 0 and calm and signs.spare >= step:
            why = f"memory has not been short for {CALM_S:.0f} s"
            return self._change(self.bytes + step, now, "regained", why)
        return None

    def _change(self, count: int, now: float, kind: str, why: str) -> tuple[str, str] | None:
        if count == self.bytes:
            return None
        self.bytes, self._changed = count, now
        return kind, why

    def _stalled(self, signs: Signs, now: float) -> bool:
        last, self._last = self._last, (now, signs.stalled_s)
        if last is None or last[1] is None or signs.stalled_s is None:
            return False
        return signs.stalled_s - last[1] >= STALLED_FRACTION * (now - last[0])

    def _ceiling(self, allowed: int | None) -> int:
        """Most of the share that lets the whole process stay inside what is allowed."""
        missing = 0 if allowed is None else max(self._total - allowed, 0)
        unit = max(self.granted // LIMIT_PARTS, 1)
        return max(self.granted - -(-missing // unit) * unit, self._floor)


class Limited(Protocol):
    """What is needed of `zipmoe._core.ExpertCache`."""

    def limit(self, most: int) -> int: ...


class Watch:
    """Lets a cache have less or more, in a thread of its own from `start` to `close`.

    counts: how often, by kind: "limit", "pressure", "regained".
    """

    def __init__(
        self, cache: Limited, report: MemoryReport, floor: int, root: Path = Path("/")
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._cache, self._root = cache, root
        self._giving = Giving(report, floor)
        self._reason = ""
        self._failure: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zipmoe-memory", daemon=True)
        self.watches = ", ".join(_told(root)) or "nothing"

    def start(self) -> Self:
        """Begin to look, if there is anything to see."""
        if self.watches != "nothing":
            self._thread.start()
        return self

    def look(self, now: float) -> None:
        """Look once. The cache follows what changed."""
        acted = self._giving.see(read_signs(self._root), now)
        if acted:
            kind, self._reason = acted
            self.counts[kind] += 1
            self._cache.limit(self._giving.bytes)

    def gave_back(self) -> str:
        """Say what of the cache's share is given back and why; "nothing" where it has all."""
        if self._failure is not None:
            return f"unknown: watching memory ended with {self._failure!r}"
        missing = self._giving.granted - self._giving.bytes
        if missing == 0 and not self.counts:
            return "nothing"
        times = ", ".join(f"{kind} {count}" for kind, count in sorted(self.counts.items()))
        whole = format_bytes(self._giving.granted)
        return f"{format_bytes(missing)} of the cache's {whole}: {self._reason} ({times})"

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._ended.set()
        # A model that nobody refers to any more may be collected in any thread, this one too.
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended.wait(PERIOD_S):
                self.look(time.monotonic())
        except Exception as error:  # noqa: BLE001  shown by gave_back: nobody waits for this thread
            self._failure = error


def _told(root: Path) -> list[str]:
    """Name what this system tells."""
    told: dict[str, Any] = {
        "cgroup limits": memory_groups(root),
        "memory pressure": _stalled_s(root) is not None,
    }
    return [name for name, is_there in told.items() if is_there]
