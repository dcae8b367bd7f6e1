"""A store and a loss that is allowed → a lossy store: each expert in as few bits as it bears.

What `zipmoe quantize` does: measure and choose, then write. Both go on where they were stopped.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zipmoe import __version__
from zipmoe._errors import CalibrationError, MismatchError, QuantizationError
from zipmoe._losses import KnownFacts
from zipmoe._lossy import LOSSLESS_BITS, Loss
from zipmoe._manifest import MANIFEST
from zipmoe._measuring import Measuring, loaded_to_measure
from zipmoe.calibration import WINDOW, calibration, read_text
from zipmoe.lowered import LOSSLESS, WIDTHS
from zipmoe.requantize import requantize_store
from zipmoe.store import open_store
from zipmoe.widths import Assignment, bracket, fewest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zipmoe.lowered import Place
    from zipmoe.quality import Quality, QualityLoss

    Progress = Callable[[int, int], None]

__all__ = [
    "BITS",
    "Choice",
    "QuantizeOptions",
    "QuantizeReport",
    "bits_of",
    "choose_widths",
    "find_widths",
    "write_chosen",
]

TASK_TOKENS = 1024  # most of a prompt and its answer
BITS = {"int2": 2, "int4": 4, "int8": 8, LOSSLESS: LOSSLESS_BITS}


@dataclass(frozen=True)
class QuantizeOptions:
    """What the user may choose.

    max_loss: of perplexity in proportion (0.02: 2 % more), of accuracy in points (0.02: 2 of 100
    tasks), with a confidence of 95 %. text: None for the sample that comes with zipmoe. task: a
    file of tasks, which the metric "accuracy" needs. importance: "estimate" or "exhaustive".
    scale_group: weights that share a scale, 64, or 0 for a row. memory: as for `zipmoe.load`.
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
class Choice:
    """Widths, and the quality that was measured with them and without."""

    found: Assignment
    loss: QualityLoss
    bits: list[list[int]]  # by layer, by expert
    now: Quality
    before: Quality
    calibration_sha256: str
    known: KnownFacts


@dataclass(frozen=True)
class QuantizeReport:
    """What was chosen and written. Sizes are in bytes; `experts`: how many have each width."""

    metric: str
    target: float
    reached: float
    bound: float  # of what is lost on texts of this kind, with a confidence of 95 %
    importance: str
    pair: tuple[str, str]
    experts: dict[str, int]
    calibration_sha256: str
    perplexity: float
    lossless_perplexity: float
    accuracy: float | None
    lossless_accuracy: float | None
    expert_bytes: int  # as they were, in BF16
    stored_expert_bytes: int
    source_bytes: int
    store_bytes: int


def choose_widths(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: QuantizeOptions,
    *,
    progress: Progress | None = None,
) -> Choice:
    """Choose the width of every expert. Writes nothing but what was measured, beside `out`.

    Stopped at any moment and called again, it measures nothing twice. `progress` is called with
    passes over the calibration done and in all, at most.

    Raises
    ------
    CalibrationError
        Text or tasks cannot be used.
    MismatchError
        The store is lossy already, or `out` is a store.
    QuantizationError
        No expert can be lowered within this loss.
    BudgetError
        There is not enough memory.
    """
    folder = Path(out)
    if (folder / MANIFEST).exists():
        raise MismatchError(f"{folder} is a finished store: delete it, or write into another")
    text = read_text(options.text)
    task = None if options.task is None else read_text(options.task)
    if options.metric == "accuracy" and task is None:
        raise CalibrationError("the metric accuracy needs a file of tasks")
    with open_store(store) as opened:
        if opened.manifest.lossy is not None:
            raise MismatchError(f"{store} is lossy already: take the lossless store")
        identity = opened.manifest.identity
    longest = options.window if task is None else max(options.window, TASK_TOKENS)
    with loaded_to_measure(Path(store), options.memory, longest) as loaded:
        if loaded.tokenizer is None:
            raise CalibrationError(f"{store} has no tokenizer, so there is no text to measure on")
        measured_on = calibration(loaded.tokenizer, text, task, window=options.window)
        if any(len(item.prompt) + len(item.answer) > longest for item in measured_on.items):
            raise CalibrationError(f"a task is longer than {longest} tokens")
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
        found = find_widths(measure, options, progress)
        if set(found.widths.values()) == {LOSSLESS}:
            raise QuantizationError(
                f"not one expert can be lowered within a loss of {options.max_loss:g}: allow more"
            )
        layers = [layer.experts for layer in loaded.runtime.source.layers]
        return Choice(
            found,
            measure.loss(found.widths),
            bits_of(found.widths, layers),
            measure.quality(found.widths),
            measure.quality({}),
            measured_on.sha256,
            known,
        )


def write_chosen(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: QuantizeOptions,
    choice: Choice,
    *,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write the lossy store that was chosen. Raises as `requantize_store`."""
    loss = Loss(options.metric, options.max_loss, choice.loss.mean, choice.calibration_sha256)
    written = requantize_store(
        store, out, choice.bits, loss=loss, scale_group=options.scale_group, progress=progress
    )
    choice.known.forget()
    return QuantizeReport(
        metric=options.metric,
        target=options.max_loss,
        reached=choice.loss.mean,
        bound=choice.loss.bound,
        importance=options.importance,
        pair=choice.found.pair,
        experts=written.experts,
        calibration_sha256=choice.calibration_sha256,
        perplexity=choice.now.perplexity,
        lossless_perplexity=choice.before.perplexity,
        accuracy=choice.now.accuracy,
        lossless_accuracy=choice.before.accuracy,
        expert_bytes=written.expert_bytes,
        stored_expert_bytes=written.stored_expert_bytes,
        source_bytes=written.source_bytes,
        store_bytes=written.store_bytes,
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

    def bound(widths: Mapping[Place, str]) -> float:
        return measure.loss(widths).bound

    pair = bracket(measure.places, bound, options.max_loss)
    order = list(measure.places)
    if pair[0] != pair[1]:
        importance = measure.importance(pair, options.importance)
        order.sort(key=importance.__getitem__)
    return fewest(order, pair, bound, options.max_loss)


def bits_of(widths: dict[Place, str], experts: list[int]) -> list[list[int]]:
    """Give the bits of each layer's experts."""
    return [
        [BITS[widths[layer, expert]] for expert in range(count)]
        for layer, count in enumerate(experts)
    ]
