"""The commands about routing: `zipmoe trace show`, `zipmoe bench policy`. Support of `cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import Codec, Json, memory_size
from ._terminal import Terminal, reporting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .bench import PolicyBench
    from .prediction import Verdict
    from .routing import Trace
    from .trace import TraceSummary

trace_app = typer.Typer(
    help="Look at recorded routing.", no_args_is_help=True, rich_markup_mode=None
)
bench_app = typer.Typer(help="Compare ways to run.", no_args_is_help=True, rich_markup_mode=None)

TraceFile = Annotated[
    Path, typer.Argument(metavar="TRACE", help="File that `generate --record` wrote.")
]


def _sizes(text: str) -> tuple[int, ...]:
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(number.isdigit() and int(number) for number in numbers):
        raise typer.BadParameter("give LAYERSxEXPERTSxCHOSEN, as 24x60x4")
    return tuple(int(number) for number in numbers)


@trace_app.command()
def show(
    trace: TraceFile,
    *,
    as_json: Json = False,
) -> None:
    """Say what is in a routing trace.

    That is: its sizes, how popular experts are, and after how long they are used again.

    \b
    Example:
      zipmoe trace show routing.npz
    """
    from .routing import load_trace
    from .trace import summarize

    terminal = Terminal(as_json=as_json)
    with reporting(terminal):
        found = summarize(load_trace(trace))
        terminal.document(found.as_dict())
        terminal.write(_summary(found) + "\n")


@bench_app.command()
def policy(
    *,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="TRACE", help="Recorded routing. Default: synthetic routing."),
    ] = None,
    synthetic: Annotated[
        str,
        typer.Option(
            metavar="LxExK",
            help="Layers, experts of each and choices of a token, where there is no trace.",
        ),
    ] = "24x60x4",
    memory: Annotated[
        int | None,
        typer.Option(parser=memory_size, metavar="SIZE", help="Memory of the expert cache alone."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="The same in compressed experts. Default: 30 % of all."
        ),
    ] = None,
    codec: Annotated[
        Codec, typer.Option(metavar="NAME", help="How the experts are stored.")
    ] = "rank223",
    weights: Annotated[
        int, typer.Option(min=3, metavar="N", help="Weights of an expert, all its matrices.")
    ] = 3 * 1408 * 2048,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="STORE",
            help="Take the rates of this machine and of the drive of this folder, as `zipmoe "
            "profile` measures them. Default: those of a server with two cores and 2.8 GB/s.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay routing through every replacement policy and several tier splits.

    For each it says how many experts were found in memory, what was read, how that compares with
    LRU and with the optimum, and how long a token's experts would take. The dense rest of a token
    is not in it. Below stands what a dictionary of paths through two layers would foretell.

    \b
    Examples:
      zipmoe bench policy --trace routing.npz --memory 4GB
      zipmoe bench policy --synthetic 48x128x8 --slots 2000 --json
    """
    from .bench import bench_policies, expert_sizes
    from .hardware import profile
    from .rates import TYPICAL, machine_profile

    terminal = Terminal(as_json=as_json)
    with reporting(terminal):
        routing = _routing(trace, synthetic)
        sizes = expert_sizes(routing, weights, codec)
        expert_bytes = sum(part.sign_mantissa_bytes + part.exponents_bytes for part in sizes.parts)
        if memory is None:
            count = slots or round(0.3 * sizes.layers * sizes.experts)
            memory = count * expert_bytes
        rates = TYPICAL if store is None else machine_profile(profile(store))
        try:
            found = bench_policies(routing, sizes, rates, memory)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        terminal.document(found.as_dict())
        terminal.write(_table(found) + "\n")


def _routing(trace: Path | None, synthetic: str) -> Trace:
    from ._synthetic_routing import Routing, synthetic_trace
    from .routing import load_trace

    if trace is not None:
        return load_trace(trace)
    layers, experts, top_k = _sizes(synthetic)
    sizes = Routing(experts, layers, top_k, num_requests=8, prompt_tokens=64, decode_tokens=128)
    return synthetic_trace(sizes, seed=1)


def _summary(found: TraceSummary) -> str:
    rows = [
        ("in the whole trace", found.over_all),
        ("on other requests", found.on_other_requests),
        ("in hindsight", found.in_hindsight),
        ("by last use (LRU)", found.by_recency),
    ]
    lines = [
        f"model     {found.layers} layers of {found.experts} experts, {found.top_k} chosen",
        f"tokens    {found.prompt_tokens} of prompts, {found.decode_tokens} decoded",
        f"requests  {found.requests}, in {found.steps} passes",
        f"distinct  {found.distinct:.1f} experts of a layer in a request's decoded tokens",
        "reuse     half of all uses after at most {1} other experts of the layer, "
        "a tenth {0}, nine tenths {2}".format(*found.reuse_distance),
        "",
        f"{'activations that go to the top':<32}{'10 %':>8}{'25 %':>8}{'50 %':>8}",
    ]
    for name, shares in rows:
        if shares is not None:
            lines.append(f"  {name:<30}" + "".join(f"{share:>8.1%}" for share in shares))
    return "\n".join(lines)


def _table(found: PolicyBench) -> str:
    from .budget import format_bytes
    from .replay import OFFLINE

    lines = [f"cache {format_bytes(found.memory_bytes)}, expert {format_bytes(found.expert_bytes)}"]
    for split in found.splits:
        head = f"{'hit rate':>9}{'read/token':>12}{'read':>11}{'of LRU':>8}{'of best':>8}"
        lines += ["", f"a layer holds {split}", f"{'':<10}{head}{'ms/token':>10}"]
        for cost in found.costs:
            if cost.split != split:
                continue
            lru, best = (found.against(cost, name) for name in ("lru", "belady"))
            note = f"  {OFFLINE[cost.policy]}" if cost.policy in OFFLINE else ""
            lines.append(
                f"{cost.policy:<10}{cost.hit_rate:>9.1%}"
                f"{format_bytes(cost.decode_read_bytes):>12}{format_bytes(cost.read_bytes):>11}"
                f"{_ratio(lru):>8}{_ratio(best):>8}{cost.decode_s * 1000:>10.1f}{note}"
            )
    if found.prediction is not None:
        lines += ["", *_foretold(found.prediction)]
    return "\n".join(lines)


def _foretold(verdict: Verdict) -> Iterator[str]:
    yield (
        f"a dictionary of {verdict.entries} paths through two layers, of half of the requests, "
        f"foretells {verdict.recall:.1%} of the others' experts"
    )
    for key, share in verdict.coverage.items():
        recall = verdict.recall_by_key.get(key)
        right = "" if recall is None else f", {recall:.1%} right"
        yield f"  from {key:<12}{share:>7.1%} of the predictions{right}"
    others = f"the most popular: {verdict.popular:.1%} right; the last token's"
    yield f"  {others}: {verdict.repeated:.1%}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
