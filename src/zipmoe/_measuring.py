"""A loaded store whose experts can be lowered, and its quality in whatever widths they have.

What was measured is kept (`_losses.KnownFacts`), so that nothing is measured twice.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from zipmoe import importance
from zipmoe.lowered import LOSSLESS, LoweredExperts
from zipmoe.model import load
from zipmoe.quality import PASS_TOKENS, Quality, QualityLoss, loss_of, measure, passes
from zipmoe.rounding import Rounding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from zipmoe._losses import KnownFacts
    from zipmoe.calibration import Calibration
    from zipmoe.lowered import Place
    from zipmoe.model import Loaded

    Passed = Callable[[], object]

__all__ = ["Measuring", "loaded_to_measure"]


@contextmanager
def loaded_to_measure(store: Path, memory: int | None, longest: int) -> Iterator[Loaded]:
    """Load a store for passes of sequences of so many tokens: with torch, which has gradients."""
    batch = max(1, PASS_TOKENS // longest)
    with load(store, memory=memory, compute="torch", context=longest, batch=batch) as loaded:
        yield loaded


class Measuring:
    """Measures a model on a calibration. Its experts are lowered from now on."""

    def __init__(
        self,
        loaded: Loaded,
        calibration: Calibration,
        *,
        known: KnownFacts,
        metric: str = "perplexity",
        scale_group: int = 64,
        threads: int = 1,
    ) -> None:
        self._model, self._calibration, self._metric = loaded.model, calibration, metric
        self._known = known
        source, report = loaded.runtime.source, loaded.memory
        # What is left where all experts fit; half of it, for gradients take some too.
        spare = max(0, report.promised - report.total) // 2
        rounding = Rounding(scale_group, threads)
        self.lowered = LoweredExperts(source.cache, rounding, keep_bytes=spare)
        source.cache = self.lowered
        self.places: list[Place] = [
            (layer.ordinal, expert) for layer in source.layers for expert in range(layer.experts)
        ]
        self.passes_done = 0
        self.after_pass: Passed | None = None

    @property
    def passes(self) -> int:
        """Passes of one measurement."""
        return len(passes(self._calibration.windows)) + len(self._calibration.items)

    @property
    def estimate_passes(self) -> int:
        """Passes of an estimate."""
        return len(passes(self._calibration.windows, importance.PASS_TOKENS))

    def quality(self, widths: Mapping[Place, str]) -> Quality:
        """Measure it with these widths."""
        named = [widths.get(place, LOSSLESS) for place in self.places]
        end = self.passes_done + self.passes
        found = self._known.get(["quality", named], lambda: self._measure(widths))
        self._pass_over(end)
        return Quality(tuple(found["windows"]), tuple(found["answered"]))

    def loss(self, widths: Mapping[Place, str]) -> QualityLoss:
        """Say what these widths lose of the lossless model's quality."""
        return loss_of(self.quality(widths), self.quality({}), self._metric)

    def errors(self, widths: Sequence[str]) -> dict[str, dict[Place, float]]:
        """Estimate what lowering each expert to each width costs (`importance.errors`)."""
        end = self.passes_done + self.estimate_passes
        found = self._known.get(["errors", list(widths)], lambda: self._errors(widths))
        self._pass_over(end)
        return {width: dict(zip(self.places, costs, strict=True)) for width, costs in found.items()}

    def importance(self, pair: tuple[str, str], method: str) -> dict[Place, float]:
        """Find how much each expert matters between the two widths of a pair."""
        if method == "exhaustive":
            return importance.exhaustive(self.places, lambda widths: self.quality(widths).nll)
        return importance.estimate(self.errors(pair), pair)

    def _passed(self) -> None:
        self.passes_done += 1
        if self.after_pass:
            self.after_pass()

    def _pass_over(self, end: int) -> None:
        """Count the passes of what was known already."""
        self.passes_done = end
        if self.after_pass:
            self.after_pass()

    def _measure(self, widths: Mapping[Place, str]) -> dict[str, Any]:
        self.lowered.set_widths(widths)
        return asdict(measure(self._model, self._calibration, after_pass=self._passed))

    def _errors(self, widths: Sequence[str]) -> dict[str, list[float]]:
        found = importance.errors(
            self._model,
            self._calibration.windows,
            self.lowered,
            widths,
            after_pass=self._passed,
        )
        return {width: [costs[place] for place in self.places] for width, costs in found.items()}
