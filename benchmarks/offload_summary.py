"""The runs of `offload.py` → medians, ratios, bounds, and what was asked of each. Pure."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
from workers import spread

from zipmoe.replay import OFFLINE, Replayer, policies
from zipmoe.routing import load_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from zipmoe.routing import Trace

OURS = "zipmoe"
# Least ratios of decode rates, by the other arm and the limit.
DECODE_ASKED = {
    "llama.cpp": {0.3: 3.0, 0.5: 4.0, 0.75: 2.5},
    "accelerate": {0.3: 10.0, 0.5: 10.0, 0.75: 10.0},
    "zipmoe raw": {0.3: 1.4, 0.5: 1.8, 0.75: 1.5},
    "plain LRU": {0.3: 1.5, 0.5: 2.2, 0.75: 2.0},
}
UNLIMITED_ASKED = {0.75: 1.05}  # of llama.cpp's decode rate without a limit
PREFILL_ASKED = 1.4  # of llama.cpp's rate, under each limit
TPOT_MOST, PREFILL_MOST = 1.4, 1.2  # of what drive, memory or products take
FETCH_LEAST, FETCH_CPU_MOST = 0.95, 0.25
MISSES_MOST = {0.3: 0.9, 0.5: 0.9}  # of LRU's

Run = dict[str, Any]


def summarise(rounds: list[dict[str, Any]], runs: list[Run], traces: Path) -> dict[str, Any]:
    """`traces`: the folder of the rounds' routing traces."""
    good = [run for run in runs if "failed" not in run]
    replayed = [
        routing(number, load_trace(traces / one["trace"]), one["first_tokens"], good)
        for number, one in enumerate(rounds)
    ]
    return {
        "arms": arms(good),
        "failed": [[*run["key"], run["failed"]] for run in runs if "failed" in run],
        "routing": replayed,
        "asked": [
            *ratios(good),
            *bounds(good),
            *fetches(rounds),
            *misses(replayed),
            *promises(runs),
        ],
    }


def tpot(run: Run) -> float:
    """Mean seconds of a decoded token."""
    return statistics.fmean(run["decode"]["seconds"])


def ttft(run: Run) -> float:
    return sum(run["prefill"]["seconds"])


def arms(runs: list[Run]) -> list[dict[str, Any]]:
    """Sum up each engine at each limit."""
    found = []
    for name, share in dict.fromkeys((run["arm"], run["share"]) for run in runs):
        mine = [run for run in runs if (run["arm"], run["share"]) == (name, share)]
        row: dict[str, Any] = {"arm": name, "share": share}
        for prompt in sorted({run["prompt"] for run in mine}):
            row[f"ttft{prompt}_s"] = spread([ttft(r) for r in mine if r["prompt"] == prompt])
        if decoded := [run for run in mine if "decode" in run]:
            row["tokens_s"] = spread([1 / tpot(run) for run in decoded])
            for measure, of in PER_TOKEN.items():
                row[measure] = spread([of(run) for run in decoded])
        row["peak_bytes"] = max(run["group"]["peak_bytes"] for run in mine)
        row["peak_rss_bytes"] = max(run["facts"]["peak_rss_bytes"] for run in mine)
        row["foreign_share"] = spread([run["foreign_share"] for run in mine])
        found.append(row)
    return found


def counted(run: Run, name: str) -> float:
    """A counter's part that falls to a decoded token."""
    return run["decode"]["counters"].get(name, 0) / len(run["decode"]["seconds"])


def hit_rate(run: Run) -> float:
    visits = counted(run, "hits") + counted(run, "misses")
    return counted(run, "hits") / visits if visits else 0.0


PER_TOKEN: dict[str, Callable[[Run], float]] = {
    "read_mb": lambda run: (
        run["decode"]["usage"]["read_bytes"] / len(run["decode"]["seconds"]) / 1e6
    ),
    "hit_rate": hit_rate,
    "ahead_reads": lambda run: counted(run, "ahead_reads"),
    "ahead_used": lambda run: counted(run, "ahead_used"),
    "wait_share": lambda run: counted(run, "wait_ns") / 1e9 / tpot(run),
}


def pairs(
    runs: list[Run], prompt: int, ours: float | None, other: str, theirs: float | None
) -> Iterator[tuple[Run, Run]]:
    """Give our run and another's of each round that has both."""
    found = {(r["round"], r["arm"], r["share"]): r for r in runs if r["prompt"] == prompt}
    for number in sorted({run["round"] for run in runs}):
        one, two = found.get((number, OURS, ours)), found.get((number, other, theirs))
        if one and two:
            yield one, two


def asked(what: str, least: float, values: list[float]) -> Iterator[dict[str, Any]]:
    if values:
        measured = spread(values)
        held = measured["median"] >= least
        yield {"what": what, "least": least, "measured": measured, "held": held}


def at_most(what: str, most: float, values: list[float]) -> Iterator[dict[str, Any]]:
    if values:
        measured = spread(values)
        held = measured["median"] <= most
        yield {"what": what, "most": most, "measured": measured, "held": held}


def ratios(runs: list[Run]) -> Iterator[dict[str, Any]]:
    short = min((run["prompt"] for run in runs), default=0)
    for other, by_share in DECODE_ASKED.items():
        for share, least in by_share.items():
            values = [tpot(two) / tpot(one) for one, two in pairs(runs, short, share, other, share)]
            yield from asked(f"decode at {share:.0%} over {other}", least, values)
    for share, least in UNLIMITED_ASKED.items():
        values = [
            tpot(two) / tpot(one) for one, two in pairs(runs, short, share, "llama.cpp", None)
        ]
        yield from asked(f"decode at {share:.0%} over llama.cpp without a limit", least, values)
    limits = sorted({run["share"] for run in runs if run["share"]})
    for prompt in sorted({run["prompt"] for run in runs}):
        for share in limits:
            values = [
                ttft(two) / ttft(one) for one, two in pairs(runs, prompt, share, "llama.cpp", share)
            ]
            what = f"cold prefill of {prompt} at {share:.0%} over llama.cpp"
            yield from asked(what, PREFILL_ASKED, values)


def bounds(runs: list[Run]) -> Iterator[dict[str, Any]]:
    """Compare with what drive, memory and products alone would take."""
    ours = [run for run in runs if run["arm"] == OURS]
    warm = {
        (run["round"], run["prompt"]): ttft({"prefill": run["warm"]})
        for run in ours
        if "warm" in run
    }
    for share in sorted({run["share"] for run in ours if run["share"]}):
        here = [run for run in ours if run["share"] == share]
        values = [tpot(run) / least_tpot(run) for run in here if "decode" in run]
        yield from at_most(f"TPOT at {share:.0%} over drive or memory", TPOT_MOST, values)
        for prompt in sorted({run["prompt"] for run in here}):
            values = [
                ttft(run) / max(drive_s(run, "prefill"), warm[run["round"], prompt])
                for run in here
                if run["prompt"] == prompt and (run["round"], prompt) in warm
            ]
            what = f"cold prefill of {prompt} at {share:.0%} over drive or products"
            yield from at_most(what, PREFILL_MOST, values)


def drive_s(run: Run, part: str) -> float:
    return run[part]["counters"]["bytes_read"] / run["drive_bytes_s"]


def least_tpot(run: Run) -> float:
    """Seconds of a token if only the drive, or only reading weights from memory, took time."""
    experts = counted(run, "hits") + counted(run, "misses")
    facts = run["facts"]
    touched = facts["dense_bytes_of_a_token"] + experts * facts["record_bytes"]
    return max(
        drive_s(run, "decode") / len(run["decode"]["seconds"]), touched / run["dram_bytes_s"]
    )


def fetches(rounds: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    rates = [
        one["fetch"]["bytes"] / one["fetch"]["seconds"] / one["fetch"]["drive_bytes_s"]
        for one in rounds
    ]
    yield from asked("rate of cold fetches over the drive's", FETCH_LEAST, rates)
    decoding = [one["fetch"]["decode_s"] / one["fetch"]["seconds"] for one in rounds]
    yield from at_most("part of a core that decodes in cold fetches", FETCH_CPU_MOST, decoding)


def misses(replayed: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for share, most in MISSES_MOST.items():
        rows = [row for one in replayed for row in one["limits"] if row["share"] == share]
        values = [row["read_over_lru"] for row in rows if "read_over_lru" in row]
        yield from at_most(
            f"bytes read at {share:.0%} over LRU's on the same routing", most, values
        )


def promises(runs: list[Run]) -> Iterator[dict[str, Any]]:
    ours = [run for run in runs if run["arm"].startswith(OURS)]
    limited = [run for run in ours if run["share"] and "failed" not in run]
    peaks = [run["facts"]["peak_rss_bytes"] / run["group"]["limit_bytes"] for run in limited]
    yield from at_most("peak memory of zipmoe over its limit", 1.0, [max(peaks)] if peaks else [])
    killed = [run["group"]["oom_kills"] + run["group"]["swapped_pages"] for run in ours]
    yield from at_most("zipmoe killed for memory, or pages swapped", 0, [sum(killed)])
    different = []
    for number, prompt in sorted({(run["round"], run["prompt"]) for run in ours}):
        same = [
            r for r in ours if (r["round"], r["prompt"]) == (number, prompt) and "failed" not in r
        ]
        bits = {
            tuple(r[part]["logits_sha256"] for part in ("prefill", "decode") if part in r)
            for r in same
        }
        different.append(len(bits) - 1)
    yield from at_most("results that differ between limits", 0, different)


def routing(number: int, trace: Trace, first: int, runs: list[Run]) -> dict[str, Any]:
    """Replay this round's routing with the slots that each limit gave."""
    replayer = Replayer(trace)
    prompt = trace.experts[: int(trace.tokens[0])]
    found: dict[str, Any] = {
        "distinct_of_first_tokens": distinct(prompt[:first]),
        "distinct_of_prompt": distinct(prompt),
        "limits": [],
    }
    for run in runs:
        if run["round"] != number or run["arm"] != OURS or not run["share"] or "decode" not in run:
            continue
        begin = 1 + len(run["warm_up"]["seconds"])  # after the prompt, which is one pass
        timed = slice(begin, begin + len(run["decode"]["seconds"]))
        replayed = {
            name: int(replayer.run(name, run["facts"]["slots"]).misses[timed].sum())
            for name in policies()
        }
        read = run["decode"]["counters"]["bytes_read"] / run["facts"]["record_bytes"]
        row = {
            "share": run["share"],
            "slots": run["facts"]["slots"],
            "records_read": round(read, 1),
        }
        row |= {"misses_replayed": replayed, "offline": list(OFFLINE)}
        row |= {
            f"read_over_{name}": round(read / replayed[name], 3)
            for name in ("lru", *OFFLINE)
            if replayed[name]
        }
        found["limits"].append(row)
    return found


def distinct(experts: Any) -> float:
    """Mean over layers of the experts that tokens [tokens, layers, k] go to."""
    return round(
        float(np.mean([np.unique(experts[:, i]).size for i in range(experts.shape[1])])), 2
    )
