"""A store and a loss that is allowed → a lossy store: each expert in as few bits as it bears.

What `zipmoe quantize` does: measure, choose widths, write. Each step goes on where it was stopped.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zipmoe import __version__
from zipmoe._errors import CalibrationError, MismatchError
from zipmoe._losses import KnownFacts
from zipmoe._lossy import Loss
from zipmoe._measuring import Measuring, loaded_to_measure
from zipmoe.calibration import WINDOW, calibration, read_text
from zipmoe.lowered import LOSSLESS, WIDTHS
from zipmoe.requantize import requantize_store
from zipmoe.store import open_store
from zipmoe.widths import Assignment, bracket, fewest

if TYPE_CHECKING:
    from collections.abc import Callable

    from zipmoe.lowered import Place

    Progress = Callable[[int, int], None]

__all__ = ["BITS", "QuantizeOptions", "QuantizeReport", "bits_of", "find_widths", "quantize_store"]

BITS = {"int2": 2, "int4": 4, "int8": 8, LOSSLESS: 16}


@dataclass(frozen=True)
class QuantizeOptions:
    """What the user may choose.

    max_loss: of perplexity in proportion (0.02: 2 % more), of accuracy in points (0.02: 2 of 100
    tasks). text: None for the sample that comes with zipmoe. task: a file of tasks, which the
    metric "accuracy" needs. importance: "estimate" or "exhaustive". scale_group: weights that share
    a scale, 64, or 0 for a row. memory: as for `zipmoe.load`.
    """

    max_loss: float
    metric: str = "perplexity"
    importance: str = "estimate"
    text: Path | None = None
    task: Path | None = None
    scale_group: int = 64
    window: int = WINDOW
    memory: int | None = None


@dataclass(frozen=True)
class QuantizeReport:
    """What was chosen and written. `experts`: how many have each width."""

    metric: str
    target: float
    reached: float
    importance: str
    pair: tuple[str, str]
    experts: dict[str, int]
    calibration_sha256: str
    perplexity: float
    lossless_perplexity: float
    accuracy: float | None
    lossless_accuracy: float | None
    bits_per_weight: float
    source_bytes: int
    store_bytes: int


def quantize_store(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: QuantizeOptions,
    *,
    measuring: Progress | None = None,
    writing: Progress | None = None,
) -> QuantizeReport:
    """Write a lossy store that loses at most what is allowed, with the fewest bits found.

    Stopped at any moment and started again, it goes on: what was measured lies beside `out` until
    the store is whole. `measuring` is called with passes done and in all, `writing` with bytes.

    Raises
    ------
    CalibrationError
        Text or tasks cannot be used.
    MismatchError
        The store is lossy already, or `out` holds something else.
    SpaceError, BudgetError
        There is not enough disk or memory.
    """
    folder = Path(out)
    text, task = read_text(options.text), options.task and read_text(options.task)
    if options.metric == "accuracy" and task is None:
        raise CalibrationError("the metric accuracy needs a file of tasks: give one with --task")
    with open_store(store) as opened:
        if opened.manifest.lossy is not None:
            raise MismatchError(f"{store} is lossy already: quantize the lossless store")
        identity = opened.manifest.identity
    with loaded_to_measure(Path(store), options.memory, options.window) as loaded:
        if loaded.tokenizer is None:
            raise CalibrationError(f"{store} has no tokenizer, so no text can be measured on")
        measured_on = calibration(loaded.tokenizer, text, task, window=options.window)
        about = [__version__, identity, measured_on.sha256, options.window, options.scale_group]
        known = KnownFacts(folder.absolute().with_name(f".{folder.name}.measured"), repr(about))
        measure = Measuring(
            loaded,
            measured_on,
            known=known,
            metric=options.metric,
            scale_group=options.scale_group,
            threads=len(os.sched_getaffinity(0)),
        )
        found = find_widths(measure, options, measuring)
        now, before = measure.quality(found.widths), measure.quality({})
        bits = bits_of(found.widths, [layer.experts for layer in loaded.runtime.source.layers])
    loss = Loss(options.metric, options.max_loss, found.loss, measured_on.sha256)
    requantize_store(
        store, folder, bits, loss=loss, scale_group=options.scale_group, progress=writing
    )
    known.forget()
    from zipmoe.inspect import inspect_store

    summary = inspect_store(folder)
    return QuantizeReport(
        metric=options.metric,
        target=options.max_loss,
        reached=found.loss,
        importance=options.importance,
        pair=found.pair,
        experts=dict(Counter(found.widths.values())),
        calibration_sha256=measured_on.sha256,
        perplexity=now.perplexity,
        lossless_perplexity=before.perplexity,
        accuracy=now.accuracy,
        lossless_accuracy=before.accuracy,
        bits_per_weight=summary.bits_per_weight,
        source_bytes=summary.source_bytes,
        store_bytes=summary.store_bytes,
    )


def find_widths(
    measure: Measuring, options: QuantizeOptions, progress: Progress | None = None
) -> Assignment:
    """Choose the width of every expert of a model that is measured."""
    experts = len(measure.places)
    per_measurement = measure.passes
    ahead = len(WIDTHS) + math.ceil(math.log2(experts)) + 1
    total = ahead * per_measurement + (
        measure.estimate_passes
        if options.importance == "estimate"
        else (experts + 1) * per_measurement
    )

    def passed() -> None:
        if progress is not None:
            progress(min(measure.passes_done, total), total)

    measure.after_pass = passed
    pair = bracket(measure.places, measure.loss, options.max_loss)
    order = list(measure.places)
    if pair[0] != pair[1]:
        importance = measure.importance(pair, options.importance)
        order.sort(key=importance.__getitem__)
    return fewest(order, pair, measure.loss, options.max_loss)


def bits_of(widths: dict[Place, str], experts: list[int]) -> list[list[int]]:
    """Give the bits of each layer's experts."""
    return [
        [BITS[widths[layer, expert]] for expert in range(count)]
        for layer, count in enumerate(experts)
    ]
