"""The runs of `serve.py` → rates, what policies would have read, and what was asked. Pure."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
from offload_summary import asked, at_most
from workers import spread

from zipmoe.replay import OFFLINE, Replayer, policies
from zipmoe.routing import Trace, load_trace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIMES_SINGLE = {4: 1.6, 8: 2.2, 16: 3.0}  # least, with all experts in memory, by batch
OF_THE_DRIVE = 0.75  # least part of what the drive gives the best online policy
OF_LRU = {16: 0.6}  # most bytes read of what LRU reads, by batch
GAP_MOST = {"demo": 3.0, "8 layers": 4.0}
PROMPT_MOST = 2.0  # times as long beside running answers
API_TIMES, API_S = 1.1, 0.005  # of the library's time to first token, and more
KINDS = ("different", "same")

Run = dict[str, Any]


def summarise(runs: list[Run], recorded: Path) -> dict[str, Any]:
    """`recorded`: the routing trace of all requests."""
    good = [run for run in runs if "failed" not in run]
    replayed = [replay(run, recorded) for run in good if run["part"] == "half"]
    return {
        "batches": list(batches(good, replayed)),
        "failed": [[run["key"], run["failed"]] for run in runs if "failed" in run],
        "replayed": replayed,
        "asked": [
            *times_single(good),
            *drive_parts(replayed),
            *lru_parts(replayed),
            *gaps(good),
            *first_tokens(good),
            *promises(good),
        ],
    }


def rate(run: Run) -> float:
    """Tokens a second of all answers."""
    return run["batch"] * len(run["seconds"]) / sum(run["seconds"])


def of(runs: list[Run], **wanted: Any) -> list[Run]:
    return [run for run in runs if all(run.get(name) == value for name, value in wanted.items())]


def batches(runs: list[Run], replayed: list[Run]) -> Iterator[dict[str, Any]]:
    """Sum up each batch of each arm, kind and limit."""
    decoded = [run for run in runs if "batch" in run]
    names = ("arm", "share", "kind", "batch")
    for row in dict.fromkeys(tuple(run[name] for name in names) for run in decoded):
        key = dict(zip(names, row, strict=True))
        mine = of(decoded, **key)
        found = key | {"tokens_s": spread([rate(run) for run in mine])}
        singles = [
            (run, one)
            for run in mine
            for one in of(decoded, **key | {"batch": 1, "round": run["round"]})
        ]
        found["times_single"] = spread([rate(run) / rate(one) for run, one in singles])
        again = of(replayed, kind=key["kind"], batch=key["batch"])
        if key["arm"] == "zipmoe" and key["share"]:
            found["read_mb"] = spread([one["read_bytes"] / 1e6 for one in again])
        found["foreign_share"] = spread([run["foreign_share"] for run in mine])
        yield found


def times_single(runs: list[Run]) -> Iterator[dict[str, Any]]:
    mine = of(runs, part="memory", kind="different")
    for size, least in TIMES_SINGLE.items():
        values = [
            rate(run) / rate(one)
            for run in of(mine, batch=size)
            for one in of(mine, batch=1, round=run["round"])
        ]
        what = f"all in memory, {size} topics: rate over that of one answer"
        yield from asked(what, least, values)


def window(run: Run, recorded: Trace, sequences: int) -> tuple[Trace, int]:
    """Put together the passes of a run: prompts, steps that were skipped, steps that were timed.

    Returns them and how many steps were timed. Each request's routing is what it is alone.
    """
    tokens = int(recorded.tokens[0])  # of each sequence; the kinds lie one after the other
    offset = KINDS.index(run["kind"]) * sequences
    starts = [(offset + number) * tokens for number in range(run["batch"])]
    prompt, timed = run["prompt_tokens"], len(run["seconds"])
    experts, step, request, counts = [], [], [], []

    def add(number: int, rows: slice, at: int) -> None:
        experts.append(recorded.experts[rows])
        step.append(at)
        request.append(number)
        counts.append(rows.stop - rows.start)

    for number, start in enumerate(starts):
        add(number, slice(start, start + prompt), number)
    before = min(run["positions"]) - 1
    for at in range(-before, timed):
        for number, (start, position) in enumerate(zip(starts, run["positions"], strict=True)):
            row = start + prompt + position - 1 + at
            add(number, slice(row, row + 1), len(starts) + before + at)
    arrays = (np.array(values, np.int64) for values in (step, request, counts))
    return Trace(recorded.num_experts, np.concatenate(experts), *arrays), timed


def replay(run: Run, recorded: Path) -> dict[str, Any]:
    """Say what each policy would have read for the timed steps with as many slots, for a token."""
    trace = load_trace(recorded)
    sequences = (len(trace.tokens) - 2) // len(KINDS)  # two more passes end it
    composed, timed = window(run, trace, sequences)
    replayer = Replayer(composed)
    each = run["facts"]["record_bytes"] / (timed * run["batch"])
    slots = run["facts"]["slots"]
    bytes_of = {
        name: each * float(replayer.run(name, slots).misses[-timed:].sum()) for name in policies()
    }
    online = {name: count for name, count in bytes_of.items() if name not in OFFLINE}
    best = min(online, key=lambda name: online[name])
    return {
        "round": run["round"],
        "kind": run["kind"],
        "batch": run["batch"],
        "slots": slots,
        "tokens_s": rate(run),
        "read_bytes": run["counters"]["bytes_read"] / (timed * run["batch"]),
        "replayed_bytes": bytes_of,
        "best": best,
        "drive_tokens_s": run["drive_bytes_s"] / online[best] if online[best] else None,
    }


def drive_parts(replayed: list[Run]) -> Iterator[dict[str, Any]]:
    for size in TIMES_SINGLE:
        values = [
            one["tokens_s"] / one["drive_tokens_s"]
            for one in of(replayed, kind="different", batch=size)
            if one["drive_tokens_s"]
        ]
        what = f"at 50 %, {size} topics: rate over what the drive gives the best online policy"
        yield from asked(what, OF_THE_DRIVE, values)


def lru_parts(replayed: list[Run]) -> Iterator[dict[str, Any]]:
    for size, most in OF_LRU.items():
        values = [
            one["read_bytes"] / one["replayed_bytes"]["lru"]
            for one in of(replayed, kind="different", batch=size)
            if one["replayed_bytes"]["lru"]
        ]
        yield from at_most(f"at 50 %, {size} topics: bytes read over LRU's", most, values)


def gaps(runs: list[Run]) -> Iterator[dict[str, Any]]:
    for name, most in GAP_MOST.items():
        mine = of(runs, part="gaps", arm=name)
        values = [run["gap_s"] / run["gap_alone_s"] for run in mine]
        what = "median gap between tokens while a prompt of 2,000 is read"
        yield from at_most(f"{name}: {what}, over that without", most, values)
        values = [run["prompt_s"] / run["prompt_alone_s"] for run in mine]
        what = "the prompt's time beside running answers over its time alone"
        yield from at_most(f"{name}: {what}", PROMPT_MOST, values)


def first_tokens(runs: list[Run]) -> Iterator[dict[str, Any]]:
    values = [
        (statistics.median(run["api"]) - API_S) / statistics.median(run["library"])
        for run in of(runs, part="first")
    ]
    what = "time to first token over HTTP, less 5 ms, over the library's"
    yield from at_most(what, API_TIMES, values)


def promises(runs: list[Run]) -> Iterator[dict[str, Any]]:
    values = [
        run["facts"]["peak_rss_bytes"] / run["facts"]["memory"]["promised"]
        for run in runs
        if "memory" in run.get("facts", {})
    ]
    yield from at_most("peak memory over what was promised", 1.0, [max(values)] if values else [])
