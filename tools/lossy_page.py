"""What lossy stores cost and what prediction foretells: results → the tables of docs/lossy.md."""

from collections.abc import Callable, Iterator
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]

HEAD = [
    "widths",
    "experts",
    "bytes of BF16",
    "perplexity",
    "loss, at most",
    "loss on the other text",
    "same likeliest token",
]


def lossy(result: dict[str, Any], table: Table) -> Iterator[str]:
    """Yield what lossy.json says."""
    machine = result["machine"]
    yield f"Measured {machine['utc'][:10]}, commit {machine['commit']}, {machine['processor']}."
    for name, found in result["models"].items():
        text, held, tokens = found["windows"]
        yield f"### The {name} model"
        yield f"{text} windows of {tokens} tokens of calibration, {held} of the other text."
        if found["distances"]:
            yield distances(found["distances"])
        speeds = found["speed"]
        heads = [f"tokens/s in {speed['share']:.0%}" for speed in speeds]
        yield table([*HEAD, *heads], [row_of(row, speeds) for row in found["rows"]])
        yield ranking(found["ranking"])
        random = found["at_random"]
        if random["random"]:
            least, most = min(random["random"]), max(random["random"])
            yield (
                f"The widths found for 2 %, given to experts at random: perplexity {least:.3f} to "
                f"{most:.3f} in {len(random['random'])} draws, {random['seeds_that_lose_more']} of "
                f"them worse than {random['perplexity']:.3f} ({random['windows']} windows)."
            )
        yield table(["", "asked", "measured", "held"], [asked_row(row) for row in found["asked"]])


def row_of(row: dict[str, Any], speeds: list[dict[str, Any]]) -> list[str]:
    """Return the row of some widths."""
    rates = [speed["tokens_s"].get(row["what"]) for speed in speeds]
    return [
        row["what"],
        ", ".join(f"{count} {width}" for width, count in sorted(row["experts"].items())),
        f"{row['over_bf16']:.3f}",
        f"{row['perplexity']:.5g}",
        f"{percent(row['loss'])}, {percent(row['loss_bound'])}",
        percent(row["held_out_loss"]),
        f"{row['same_token']:.1%}",
        *("" if rate is None else f"{rate:.1f}" for rate in rates),
    ]


def percent(loss: float) -> str:
    """Write a loss; beyond a factor of ten what matters is that all is lost."""
    return f"{loss:.2%}" if loss < 9 else "over 900%"


def asked_row(row: dict[str, Any]) -> list[str]:
    """Return the row of what was asked."""
    limit = f"at least {row['least']:g}" if "least" in row else f"at most {row['most']:g}"
    return [row["what"], limit, f"{row['measured']:g}", "yes" if row["held"] else "**no**"]


def distances(found: dict[str, Any]) -> str:
    """Say how far experts lie apart."""
    demo, own = (found[name]["distances"] for name in ("demo", "specialised"))
    return (
        f"Two experts of a layer lie {own['median']:.3f} of their size apart "
        f"({own['least']:.3f} to {own['most']:.3f}); those of the demo {demo['median']:.3f}."
    )


def ranking(found: dict[str, Any]) -> str:
    """Say how well the estimate ranks."""
    if not found["experts"]:
        return "The estimate was not compared with measuring one expert after the other."
    return (
        f"Rank correlation (Spearman) of the estimate with lowering one expert after the other to "
        f"INT2, the others in INT4: {found['spearman']:.2f}, over {found['experts']} experts and "
        f"{found['windows']} windows; {found['lowers_the_loss']} of them lower the loss of this "
        "text when they are lowered, which no estimate for other texts can know."
    )


def prediction(result: dict[str, Any], table: Table) -> Iterator[str]:
    """Yield what prediction.json says."""
    keys = ["two layers", "one layer", "popularity"]
    head = ["routing", "paths", "recall", *(f"from {key}" for key in keys)]
    rows = []
    for name, found in result["routing"].items():
        cells = []
        for key in keys:
            right = found["recall_by_key"].get(key)
            known = "" if right is None else f", {right:.0%} right"
            cells.append(f"{found['coverage'][key]:.1%}{known}")
        extra = [f"{found['popular']:.1%}", f"{found['repeated']:.1%}"]
        extra.append(f"{found['lookahead']:.1%}" if "lookahead" in found else "")
        rows.append([name, str(found["entries"]), f"{found['recall']:.1%}", *cells, *extra])
    yield table([*head, "the most popular", "the last token's", "our lookahead"], rows)
    if "tokens_s" in result:
        said = ", ".join(f"{name} {rate:.2f}" for name, rate in result["tokens_s"].items())
        yield f"Tokens a second of the demo in half of its bytes, with what is read ahead: {said}."
