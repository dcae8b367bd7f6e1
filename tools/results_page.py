"""The published numbers: results of benchmarks → the tables of docs/results.md and its like.

None is typed by hand: what stands between two marks on these pages is written here.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lossy_page

ROOT = Path(__file__).resolve().parent.parent
COUNTING = ("zipmoe", "zipmoe raw", "plain LRU")
OFFLINE = ("static", "belady")
ARM_HEAD = [
    "engine",
    "memory",
    "decode, tokens/s",
    "MB read a token",
    "experts found in memory",
    "waiting for the drive",
    "first token of 64, s",
    "of 512, s",
    "peak of the process, GB",
]
MARKED = re.compile(r"(<!-- from (\w+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def with_results(page: Path) -> str:
    """Return a page as it should be."""
    text = page.read_text(encoding="utf-8")
    return MARKED.sub(lambda mark: f"{mark[1]}{tables(mark[2])}{mark[3]}", text)


def tables(name: str) -> str:
    """Return what a benchmark's document says, or that there is none."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.exists():
        return f"Not measured yet: run `make bench-{name.replace('_', '-')}`.\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    return "\n\n".join(part.strip() for part in SECTIONS[name](result)) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def offload(result: dict[str, Any]) -> Iterator[str]:
    """Yield what offload.json says."""
    yield where(result)
    yield routed(result["routing"])
    yield "Medians over rounds (least to most)."
    arms = result["summary"]["arms"]
    yield table(ARM_HEAD, [arm_row(arm, counts=arm["arm"] in COUNTING) for arm in arms])
    yield "What was asked of it, and whether it held:"
    rows = [asked_row(row) for row in result["summary"]["asked"]]
    yield table(["", "asked", "measured", "held"], rows)
    replayed = [row for one in result["summary"]["routing"][:1] for row in one["limits"]]
    if replayed:
        names = list(replayed[0]["misses_replayed"])
        yield (
            "Records read for the timed tokens of the first round, and what each policy would have "
            f"read with as many slots, replayed on its routing; {' and '.join(OFFLINE)} are told "
            "the future. What was looked ahead for in vain is counted with zipmoe's reads."
        )
        head = ["memory", "slots", "read by zipmoe", *names]
        yield table(head, [replay_row(row, names) for row in replayed])


def where(result: dict[str, Any]) -> str:
    """Say on what it was measured."""
    machine = result["machine"]
    read = [run["drive_bytes_s"] for run in result["runs"] if "drive_bytes_s" in run]
    rates = sorted(rate / 1e9 for rate in read) or [0.0]
    facts = [
        machine["processor"],
        f"{machine['cores']} cores",
        f"{machine['memory_bytes'] / 1e9:.0f} GB",
        f"Linux {machine['kernel']}",
        f"drive {rates[0]:.1f} to {rates[-1]:.1f} GB/s",
        f"{1 + max((run['round'] for run in result['runs']), default=-1)} rounds",
        machine["utc"][:10],
        f"commit {machine['commit']}",
    ]
    return f"**Where.** {', '.join(facts)}."


def routed(routing: dict[str, Any]) -> str:
    """Say how well the routing was imposed."""
    ranges = []
    for name in ("distinct", "distinct_before"):
        values = [layer[name] for layer in routing["layers"]]
        ranges.append(f"{min(values):.1f} to {max(values):.1f}")
    return (
        f"**Routing.** {routing['tokens_of_a_prompt']} tokens of a prompt go to {ranges[0]} "
        f"distinct experts of a layer (wanted: {routing['distinct_wanted']:.1f}, from "
        f"{routing['source']}); with random routers to {ranges[1]}."
    )


def replay_row(row: dict[str, Any], names: list[str]) -> list[str]:
    """Return the row of a limit."""
    own = [f"{row['share']:.0%}", str(row["slots"]), f"{row['records_read']:.0f}"]
    return own + [str(row["misses_replayed"][name]) for name in names]


def spread(values: dict[str, float] | None, digits: int = 2) -> str:
    """Write a median with its least and most."""
    if values is None:
        return ""
    least, most = (f"{values[name]:.{digits}f}" for name in ("min", "max"))
    return f"{values['median']:.{digits}f} ({least} to {most})"


def arm_row(arm: dict[str, Any], *, counts: bool) -> list[str]:
    """Return the row of an engine at a limit; `counts`: it knows its experts."""
    percent = [
        f"{arm[name]['median']:.0%}" if counts and name in arm else ""
        for name in ("hit_rate", "wait_share")
    ]
    return [
        arm["arm"],
        "no limit" if arm["share"] is None else f"{arm['share']:.0%}",
        spread(arm.get("tokens_s")),
        f"{arm['read_mb']['median']:.0f}" if "read_mb" in arm else "",
        *percent,
        spread(arm.get("ttft64_s")),
        spread(arm.get("ttft512_s")),
        f"{arm['peak_rss_bytes'] / 1e9:.2f}",
    ]


def asked_row(row: dict[str, Any]) -> list[str]:
    """Return the row of what was asked."""
    limit = f"at least {row['least']:g}" if "least" in row else f"at most {row['most']:g}"
    return [row["what"], limit, spread(row["measured"]), "yes" if row["held"] else "**no**"]


def figures(result: dict[str, Any]) -> Iterator[str]:
    """Yield what offload_figures.json says."""
    yield where(result)
    yield table(ARM_HEAD, [arm_row(arm, counts=True) for arm in result["arms"]])
    yield "An answer of 512 tokens at 50 %, tokens a second over its first ones (medians):"
    lengths = result["lengths"]
    yield table(
        [str(row["tokens"]) for row in lengths], [[f"{row['tokens_s']:.2f}" for row in lengths]]
    )
    yield "Bytes of the store, of those of the checkpoint:"
    sizes = result["store_over_checkpoint"]
    yield table(list(sizes), [[f"{share:.3f}" for share in sizes.values()]])


def lossy(result: dict[str, Any]) -> Iterator[str]:
    """Yield what lossy.json says."""
    return lossy_page.lossy(result, table)


def prediction(result: dict[str, Any]) -> Iterator[str]:
    """Yield what prediction.json says."""
    return lossy_page.prediction(result, table)


def serve(result: dict[str, Any]) -> Iterator[str]:
    """Yield what serve.json says."""
    yield where(result)
    yield "Tokens a second of all answers together, medians over rounds (least to most)."
    rows = sorted(result["summary"]["batches"], key=serve_order)
    head = [
        "engine",
        "memory",
        "topics",
        "answers",
        "tokens/s",
        "times one answer",
        "MB read a token",
    ]
    yield table(head, [serve_row(row) for row in rows])
    yield "What was asked of it, and whether it held:"
    asked = [asked_row(row) for row in result["summary"]["asked"]]
    yield table(["", "asked", "measured", "held"], asked)


def serve_order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Order batches: all in memory first, then by topics, engine and size."""
    return row["share"] is not None, row["kind"], row["arm"] != "zipmoe", row["batch"]


def serve_row(row: dict[str, Any]) -> list[str]:
    """Return the row of a batch."""
    return [
        row["arm"],
        "all" if row["share"] is None else f"{row['share']:.0%}",
        "one each" if row["kind"] == "different" else "the same",
        str(row["batch"]),
        spread(row["tokens_s"]),
        spread(row["times_single"]),
        f"{row['read_mb']['median']:.0f}" if "read_mb" in row else "",
    ]


def entropy(result: dict[str, Any]) -> Iterator[str]:
    """Yield what entropy.json says."""
    yield f"Of {result['model']}, commit {result['machine']['commit']}."
    codecs = list(result["sorts"][0]["bits_a_weight"])
    yield table(
        ["matrices", "how many", "bits an exponent carries", *(f"{name}, bits" for name in codecs)],
        [
            [
                row["sort"],
                str(row["matrices"]),
                spread(row["entropy_bits"]),
                *(f"{row['bits_a_weight'][name]:.2f}" for name in codecs),
            ]
            for row in result["sorts"]
        ],
    )


SECTIONS = {
    "entropy": entropy,
    "offload": offload,
    "offload_figures": figures,
    "serve": serve,
    "lossy": lossy,
    "prediction": prediction,
}
