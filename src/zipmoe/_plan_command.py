"""The command `zipmoe plan`. Support of `cli.py`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import Codec, Json, memory_size
from ._terminal import Terminal, reporting

if TYPE_CHECKING:
    from ._planning import Plan
    from .hardware import Profile
    from .plan import Forecast


def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A store, a checkpoint that is not packed, or an id on the hub."
        ),
    ],
    *,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=memory_size,
            metavar="SIZE",
            help="Memory that the whole process may take, as for generate.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Most tokens of prompt and answer together."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="Sequences that are decoded together.")
    ] = 1,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Routing that `generate --record` wrote: half of its requests is planned with, "
            "the other half replayed. Default: synthetic routing.",
        ),
    ] = None,
    codec: Annotated[
        Codec,
        typer.Option(metavar="NAME", help="How a checkpoint would be packed; a store says it."),
    ] = "rank223",
    as_json: Json = False,
) -> None:
    """Say what fills the memory and how fast a model will be, before loading or packing it.

    Of a checkpoint or an id on the hub nothing but config and headers is read. Rates are those that
    `zipmoe profile` measured; where it has not run, it runs first.

    \b
    Examples:
      zipmoe plan my-store --memory 8GB
      zipmoe plan Qwen/Qwen1.5-MoE-A2.7B --memory 8GB --context 2048 --json
    """
    from ._planning import make_plan, open_target
    from .hardware import profile

    terminal = Terminal(as_json=as_json)

    def measured(folder: Path) -> Profile:
        with terminal.progress("measuring") as progress:
            return profile(folder, progress=progress)

    with reporting(terminal):
        found = open_target(target, context=context, codec=codec, batch=batch)
        planned = make_plan(found, measured, memory=memory, trace=trace, batch=batch)
        terminal.document(planned.as_dict())
        terminal.write(text(planned) + "\n")


def text(planned: Plan) -> str:
    """Say it in a few lines."""
    from .budget import format_bytes

    target, sizes, cache = planned.target, planned.target.skeleton.sizes, planned.cache
    about = "" if target.kind == "store" else "about "
    whole = sizes.layers * sizes.experts
    read = format_bytes(cache.read_bytes)
    rows = [
        ("model", f"{sizes.layers} layers of {sizes.experts} experts, {sizes.top_k} chosen"),
        ("store", f"{about}{format_bytes(target.store_bytes)}, experts {sizes.codec}"),
        ("memory", str(planned.memory).removeprefix("memory ")),
        ("floor", f"{format_bytes(target.skeleton.needs.floor)} at this context"),
        ("cache", f"{planned.slots} of {whole} experts; of each layer {cache.split}"),
        ("hits", f"{cache.hit_rate:.0%} of the experts asked for, {read} read per token"),
    ]
    rows += [(f"TTFT {n}", f"{_band(one)}, nothing in memory") for n, one in planned.ttft.items()]
    rows += [("TPOT", f"{_band(cache.tpot)} per token"), ("because", cache.reason)]
    if (replayed := planned.replayed) is not None:
        said = f"{replayed.hit_rate:.0%} hits, {format_bytes(replayed.read_bytes)} read"
        said += f" and {replayed.tpot_s * 1000:.0f} ms per token"
        rows.append(("replayed", f"{replayed.requests} requests, policy {replayed.policy}: {said}"))
    if (better := planned.better) is not None:
        said = f"{better.split} of each layer would take {better.gain:.1%} less per token"
        rows.append(("better", f"{said}; the cache holds compressed experts only"))
    return "\n".join(f"{name:<10}{said}" for name, said in [*rows, *_basis(planned)])


def _basis(planned: Plan) -> list[tuple[str, str]]:
    """Say what of it was measured, and what was estimated."""
    rates, sizes = planned.rates, planned.target.skeleton.sizes
    products = {sizes.codec, sizes.dense_codec} & {*rates.multiply_bytes_s} or {"raw"}
    speeds = ", ".join(
        f"{codec} {rates.multiply_bytes_s[codec] / 1e9:.1f} GB/s" for codec in sorted(products)
    )
    measured = [f"drive {rates.read_bytes_s / 1e9:.2f} GB/s, products {speeds}"]
    estimated = [f"{rates.layer_s * 1e6:.0f} us a layer and {rates.token_s * 1e3:.1f} ms a token"]
    estimated[0] += " besides products"
    if planned.work == "observed":
        measured.append("a token's work, in earlier runs")
        estimated.clear()
    (measured if planned.target.kind == "store" else estimated).append("sizes in memory")
    return [
        ("routing", planned.popularity),
        ("measured", "; ".join(measured)),
        ("estimated", "; ".join(estimated) or "nothing"),
    ]


def _band(one: Forecast) -> str:
    if one.high < 1:
        low, middle, high = (f"{x * 1000:.0f}" for x in (one.low, one.seconds, one.high))
        return f"{middle} ms ({low} to {high})"
    return f"{one.seconds:.2f} s ({one.low:.2f} to {one.high:.2f})"
