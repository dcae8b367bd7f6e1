"""Which experts are asked for how often → how many reads some more memory would save."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from zipmoe._expert_source import ExpertSource

__all__ = ["Popularity"]

_MEMORY = 1_000_000  # choices after which older ones count half


class Popularity:
    """Counts what the routers of a model choose, from now on. Only where the engine runs them."""

    def __init__(self, source: ExpertSource) -> None:
        self._engine = source.engine
        self._counts = np.zeros((len(source.layers), max(la.experts for la in source.layers)))
        self._lock = threading.Lock()
        if self._engine is not None:
            self._engine.record_routing(True)

    def note(self) -> None:
        """Take over what was chosen since the last time."""
        if self._engine is None:
            return
        with self._lock:
            for layer, _, choices in self._engine.take_routing():
                self._counts[layer] += np.bincount(choices, minlength=self._counts.shape[1])
            if self._counts.sum() > _MEMORY:
                self._counts /= 2

    def saved(self, slots: int, more: int) -> float:
        """Estimate the part of the reads that `more` slots would save, 0 to 1.

        As if the most popular experts were the ones in memory: reads are then what falls on the
        others.
        """
        with self._lock:
            ranked = -np.sort(-self._counts, axis=None)
        absent, left = ranked[slots:].sum(), ranked[slots + more :].sum()
        return float(1 - left / absent) if absent else 0.0

    def close(self) -> None:
        """Count no more."""
        if self._engine is not None:
            self._engine.record_routing(False)
            self._engine.take_routing()
