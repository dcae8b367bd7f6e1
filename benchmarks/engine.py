"""What the benchmarks ask of an engine: feed tokens, and time it.

Everything timed says how much processor time others took meanwhile, and what was read from drives:
a busy machine, or a model that is not in memory, shows in the result.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np


@dataclass
class Usage:
    """What happened between the two ends of a `with measured()` block."""

    seconds: float = 0.0
    foreign_share: float = 0.0  # processor time of other processes, of one core's time
    major_faults: int = 0
    read_bytes: int = 0  # from drives


@dataclass
class Timed:
    """Seconds of what was timed, and what else happened meanwhile."""

    seconds: dict[str, float]
    usage: Usage
    misses: int = 0  # experts that were not in memory


def _busy_seconds() -> float:
    user, nice, system, _, _, _, _, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    # Interrupts count for no process; where much is read they are mostly the reader's own.
    ticks = user + nice + system + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@contextlib.contextmanager
def measured() -> Iterator[Usage]:
    usage = Usage()
    busy, own, read = _busy_seconds(), _own_seconds(), _read_bytes()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    started = time.perf_counter()
    yield usage
    usage.seconds = time.perf_counter() - started
    others = (_busy_seconds() - busy) - (_own_seconds() - own)
    usage.foreign_share = max(0.0, others) / usage.seconds
    usage.major_faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
    usage.read_bytes = _read_bytes() - read


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Engine(ABC):
    """A model that is fed tokens, and keeps what it has been fed in its KV cache."""

    @abstractmethod
    def feed(self, ids: list[int]) -> None:
        """Run one pass over these tokens; logits are computed for the last of them."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """Give the logits of the last pass."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Say what this is and what engaged."""

    def misses(self) -> int:
        """Count experts that were not in memory so far."""
        return 0

    def counters(self) -> dict[str, int]:
        """Give what the engine itself has counted so far."""
        return {}

    def prefill(self, ids: list[int]) -> Timed:
        """Time one pass over a prompt."""
        self.reset()
        misses = self.misses()
        with measured() as usage:
            self.feed(ids)
        return Timed({"prefill": usage.seconds}, usage, self.misses() - misses)

    def decode(self, prompt: list[int], ids: list[int], skipped: int) -> Timed:
        """Time a pass over the prompt, and the mean of those after `skipped` further tokens."""
        before = self.prefill(prompt)
        for token in ids[:skipped]:
            self.feed([token])
        misses = self.misses()
        with measured() as usage:
            for token in ids[skipped:]:
                self.feed([token])
        seconds = before.seconds | {"decode": usage.seconds / len(ids[skipped:])}
        return Timed(seconds, usage, before.misses + self.misses() - misses)
