"""The command `zipmoe quantize`. Support of `cli.py`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ._options import Json, Memory, Store  # noqa: TC001 - typer reads annotations
from ._terminal import USER_ERROR, Terminal, reporting

if TYPE_CHECKING:
    from .quantize import QuantizeReport


Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")]
MaxLoss = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="X",
        help="Most that may be lost on texts like the calibration, with a confidence of 95 %: of "
        "perplexity in proportion (0.02: it grows by 2 %), of accuracy in points (0.02: 2 of 100 "
        "tasks).",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text to measure on, like what the model is for; some ten thousand words are good. "
        "Default: a short sample that comes with zipmoe.",
    ),
]
Metric = Annotated[
    Literal["perplexity", "accuracy"],
    typer.Option(metavar="NAME", help="What is measured: perplexity, or accuracy on tasks."),
]
Task = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Tasks, one a line, as {"prompt": "1 + 1 =", "answer": " 2"}. An answer is right '
        "where greedy decoding gives it. accuracy needs it.",
    ),
]
Importance = Annotated[
    Literal["estimate", "exhaustive"],
    typer.Option(
        metavar="NAME",
        help="How experts are ranked: estimate, from one pass with gradients, or exhaustive, by "
        "lowering one after the other: hours.",
    ),
]
Scales = Annotated[
    Literal["group", "row"],
    typer.Option(metavar="NAME", help="What shares a scale: group, 64 weights, or a row."),
]


def quantize(
    store: Store,
    out: Out,
    *,
    max_loss: MaxLoss,
    calibration: Calibration = None,
    metric: Metric = "perplexity",
    task: Task = None,
    importance: Importance = "estimate",
    scales: Scales = "group",
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Make a smaller store that is lossy, within a loss of quality that you name.

    Each expert gets 8, 4 or 2 bits a weight, or stays lossless: the fewest that the loss allows,
    the least important experts first. All other weights stay lossless. The store says of itself
    what was lost, and so does every run of it; the weights that were published cannot be restored
    from it, so keep the lossless store. If it is stopped, run the same command again: it goes on
    where it was.

    \b
    Examples:
      zipmoe quantize my-store my-lossy-store --max-loss 0.02 --calibration notes.txt
      zipmoe quantize my-store small --max-loss 0.01 --metric accuracy --task questions.jsonl
    """
    from .quantize import QuantizeOptions, choose_widths, write_chosen

    terminal = Terminal(as_json=as_json)
    options = QuantizeOptions(
        max_loss=max_loss,
        metric=metric,
        importance=importance,
        text=calibration,
        task=task,
        scale_group=64 if scales == "group" else 0,
        memory=memory,
    )
    with reporting(terminal, mismatch=USER_ERROR):
        with terminal.progress("Measuring", counts=True) as measuring:
            chosen = choose_widths(store, out, options, progress=measuring)
        with terminal.progress("Writing") as writing:
            report = write_chosen(store, out, options, chosen, progress=writing)
        terminal.document(asdict(report))
        terminal.write(_said(out, report) + "\n")


def _said(out: Path, report: QuantizeReport) -> str:
    from .budget import format_bytes

    widths = ", ".join(f"{count} {name}" for name, count in report.experts.items())
    share = report.stored_expert_bytes / report.expert_bytes
    made = f"{out}: lossy, {format_bytes(report.store_bytes)}; experts {share:.3f} of their BF16"
    cost = (
        f"{report.metric} loss {report.reached:.2%} on the calibration, at most {report.bound:.2%} "
        f"by its spread, of {report.target:.2%}"
    )
    measured = f"perplexity {report.lossless_perplexity:.3f} -> {report.perplexity:.3f}"
    if report.accuracy is not None and report.lossless_accuracy is not None:
        measured += f"; accuracy {report.lossless_accuracy:.1%} -> {report.accuracy:.1%}"
    return f"{made}: {widths}\n{cost}; {measured}"
