"""What commands found -> the lines a person reads, and the documents of --json. Pure functions.

Support of `cli.py`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from .budget import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from .forecast import RunForecast
    from .generate import GenerateResult
    from .hardware import Profile, Rate
    from .inspect import StoreSummary
    from .pack import PackReport
    from .verify import VerifyReport

SHOWN = 8  # raw tensors named one by one


def packed(store: Path, report: PackReport) -> str:
    """Say what a pack made."""
    return (
        f"{store}: {format_bytes(report.store_bytes)}, {report.ratio:.3f} of the checkpoint's "
        f"{format_bytes(report.source_bytes)} ({report.bits_per_weight:.2f} bits per expert weight)"
    )


def verified(report: VerifyReport) -> dict[str, Any]:
    """Give the document of `verify`: each error with its place, as far as it is known."""
    keys = ("file", "tensor", "layer", "expert", "plane", "offset")
    errors = []
    for error in report.errors:
        place = {key: getattr(error, key, None) for key in keys}
        errors.append({"type": type(error).__name__, "message": str(error)} | place)
    counts = ("files", "records", "checked_bytes", "seconds")
    found = {key: getattr(report, key) for key in counts} | {"errors": errors}
    return found | {"lossy": report.lossy and report.lossy.brief()}


def summary(found: StoreSummary) -> str:
    """Say what is in a store, as a short table."""
    model, made = found.model, ", ".join(f"{codec} ({kind})" for kind, codec in found.codec.items())
    stored, original = format_bytes(found.store_bytes), format_bytes(found.source_bytes)
    head = ("matrices", 10), ("original", 12), ("stored", 12), ("ratio", 8), ("bits", 8)
    lines = [
        f"model    {model['architecture']}, {found.experts} experts in {found.layers} layers",
        f"made by  {found.tool}, format {found.format_version}, codec {made}",
        f"size     {stored}, {found.ratio:.3f} of the checkpoint's {original}",
        *([found.lossy["summary"]] if found.lossy else []),
        "",
        f"{'kind':<8}" + "".join(f"{word:>{width}}" for word, width in head) + "  codecs",
    ]
    for kind in found.kinds:
        codecs = ", ".join(f"{codec} {count}" for codec, count in sorted(kind.codecs.items()))
        lines.append(
            f"{kind.kind:<8}{kind.matrices:>10}{format_bytes(kind.source_bytes):>12}"
            f"{format_bytes(kind.stored_bytes):>12}{kind.ratio:>8.3f}{kind.bits_per_weight:>8.2f}"
            f"  {codecs}"
        )
    if found.lossy:
        lines += ["", "experts by width:"]
        for number, layer in enumerate(found.lossy["layers"]):
            shares = ", ".join(f"{count} {name}" for name, count in layer.items())
            lines.append(f"  layer {number}: {shares}")
    if found.raw:
        lines += ["", "raw:"]
        lines += [f"  {why}: {count} tensors" for why, count in _reasons(found.raw)]
        names = [f"    {name}" for name, why in found.raw if why != "a vector"]
        lines += names[:SHOWN] + [f"    and {len(names) - SHOWN} more"] * (len(names) > SHOWN)
    if found.depends_on:
        on = ", ".join(found.depends_on)
        lines += ["", f"native compute: a token's bits also depend on {on} (docs/kernels.md)"]
    if found.left_out:
        lines += ["", f"left out of the checkpoint: {', '.join(found.left_out)}"]
    return "\n".join(lines)


def _reasons(raw: list[tuple[str, str]]) -> list[tuple[str, int]]:
    return Counter(why for _, why in raw).most_common()


def profiled(found: Profile) -> str:
    """Say how fast a machine is."""
    core, drive = found.core, found.drive
    how = f"{drive.depth} requests of {drive.request_bytes >> 10} KiB at once"
    lines = [
        f"drive      {_rate(drive.read_bytes_s)}, by {drive.reader}, {how}",
        f"multiply   {core.workers} threads, {core.isa}, one token, weights as BF16",
    ]
    lines += [f"  {codec:<9}{_rate(rate)}" for codec, rate in core.multiply_bytes_s.items()]
    lines += [f"  many tokens {core.flops.median / 1e9:.0f} GFLOPS", "decode     one thread"]
    lines += [f"  {codec:<9}{_rate(rate)}" for codec, rate in core.decode_bytes_s.items()]
    return "\n".join(lines)


def _rate(rate: Rate) -> str:
    return f"{rate.median / 1e9:.2f} GB/s ({rate.least / 1e9:.2f} to {rate.most / 1e9:.2f})"


def measured(result: GenerateResult) -> str:
    """Say in two lines what an answer took."""
    cache = result.cache
    asked = cache["hits"] + cache["misses"]
    share = f"{cache['hits'] / asked:.0%} of {asked} experts" if asked else "no experts"
    pace = f", then {result.tpot_s * 1000:.0f} ms per token" if result.tpot_s else ""
    peak, promised = format_bytes(result.peak_rss_bytes), format_bytes(result.memory_bytes)
    engaged = dict(result.engaged)
    for how in ("in_parts", "watches", "on_drive", "lent"):  # for --json: how, not what
        engaged.pop(how, None)
    said = {"left to torch": engaged.pop("fell_back"), "gave back": engaged.pop("gave_back")}
    left = "".join(f"; {what}: {that}" for what, that in said.items() if that != "nothing")
    return (
        f"{len(result.token_ids)} tokens: the first after {result.ttft_s:.2f} s{pace}; "
        f"{share} were in memory, {format_bytes(cache['bytes_read'])} read\n"
        f"peak {peak} of {promised} promised; {', '.join(engaged.values())}{left}"
    )


NEVER_MEASURED = (
    "no forecast: this machine was never measured for this drive; `zipmoe profile {}` does it once"
)


def beside(forecast: RunForecast, result: GenerateResult) -> str:
    """Say in a line what an answer should have taken, and in brackets what it took."""
    said = f"forecast (actual): first token {forecast.ttft_s:.2f} s ({result.ttft_s:.2f})"
    if len(result.token_ids) < 2:
        return said
    tpot, rate = forecast.tpot_s * 1000, forecast.hit_rate
    forecast_bytes, read = (format_bytes(x.bytes_per_token) for x in (forecast, result))
    return (
        f"{said}, then {tpot:.0f} ms ({result.tpot_s * 1000:.0f}) per token, with {rate:.0%} "
        f"({result.hit_rate:.0%}) of its experts in memory and {forecast_bytes} ({read}) read"
    )
