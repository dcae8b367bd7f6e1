"""Lossy stores: what bits cost in quality, and what choosing them expert by expert gains.

    python benchmarks/lossy.py [--models demo,specialised] [--cache FOLDER] [--memory 9GB]
        [--windows N] [--targets 0.02,...] [--ranked-layers 10] [--seeds 20] [--rounds 3]
        [--skip-speed] [--out FILE]

Two models: the demo, and the demo with experts that differ (`specialised.py`, made when it is not
there). Of each: uniform widths; the widths that `zipmoe quantize` finds for a loss of 0.5, 1, 2 and
5 %; what any widths make of the bytes of uniform INT8 and INT4. Of all these bytes of the experts,
loss on the calibration (the sample that comes with zipmoe) and on another text (`held_out.txt`),
and how often the likeliest next token of that text is still the lossless model's. How well the
estimate ranks experts: rank correlation with measuring them one by one, for the experts of
`--ranked-layers` layers. Whether the ranking matters: the widths found for 2 %, given to experts at
random, `--seeds` times. Then stores of the uniform widths and of the losses are written, and they
and the lossless one answer in turns with memory for 30 and 50 % of the checkpoint's bytes.

What was measured is kept in `--cache` and not measured again. `--windows` takes fewer windows of
both texts, to try it. Without speed about half an hour a model on two idle cores; 14 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from document import publish
from machine import describe_machine

from zipmoe import pack_checkpoint
from zipmoe._losses import KnownFacts
from zipmoe._measuring import Measuring, loaded_to_measure
from zipmoe.budget import parse_memory
from zipmoe.calibration import WINDOW, calibration, read_text
from zipmoe.demo import build_checkpoint, cache_folder
from zipmoe.importance import spearman
from zipmoe.lowered import LOSSLESS, WIDTHS
from zipmoe.quality import passes
from zipmoe.quantize import QuantizeOptions, bits_of, find_widths
from zipmoe.requantize import requantize_store
from zipmoe.rounding import Rounding
from zipmoe.store import open_store
from zipmoe.widths import uniform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zipmoe.lowered import Place

HELD_OUT = Path(__file__).with_name("held_out.txt")
TARGETS = "0.005,0.01,0.02,0.05"
MIXED = "any widths, no more bytes than {}"
BUDGETS = ("int8", "int4")
AT_MOST = "at most {:.1%}"
MOST = 0.02
CHOSEN = AT_MOST.format(MOST)  # whose widths are given to experts at random
RANKED_WINDOWS = 8  # of the calibration, where many widths are measured
SHARES = (0.3, 0.5)
PAGE = 4096
PROMPT = "Write a story about a lighthouse keeper and a storm."
TOKENS, LEAST_TOKENS = 64, 16
CONTEXT = 256  # Python and torch take half a gigabyte: 30 % of the demo leaves no room for more


def checkpoints(models: list[str], cache: Path) -> dict[str, Path]:
    found = {"demo": build_checkpoint(cache_folder()).folder}
    if "specialised" in models:
        found["specialised"] = cache / "specialised"
        if not (found["specialised"] / "specialised.json").exists():
            script = Path(__file__).with_name("specialised.py")
            subprocess.run([sys.executable, str(script), str(found["specialised"])], check=True)
    return {name: found[name] for name in models}


class Bench:
    """One model, measured on two texts."""

    def __init__(self, name: str, store: Path, loaded: Any, options: Any) -> None:
        self.store, self._loaded = store, loaded
        text = calibration(loaded.tokenizer, read_text(None))
        held = calibration(loaded.tokenizer, read_text(HELD_OUT))
        text = replace(text, windows=spread(text.windows, options.windows))
        self._held = spread(held.windows, options.windows)
        self._text = text
        with open_store(store) as opened:
            identity = opened.manifest.identity
            self._bytes = record_bytes(opened)
        about = [identity, text.sha256, held.sha256, options.windows]
        self._known = KnownFacts(options.cache / f"{name}.measured", repr(about))
        self.measure = self._measuring(text)
        short = replace(text, windows=text.windows[:RANKED_WINDOWS])
        self._short = self._measuring(short, [*about, "short"])

    def _measuring(self, text: Any, about: Any = "") -> Measuring:
        source = self._loaded.runtime.source
        if hasattr(self, "measure"):  # both measure with one set of lowered experts
            source.cache = self.measure.lowered._cache
        made = Measuring(self._loaded, text, known=Prefixed(self._known, about), threads=2)
        if hasattr(self, "measure"):
            made.lowered = source.cache = self.measure.lowered
        return made

    def row(self, widths: Mapping[Place, str]) -> dict[str, Any]:
        """What these widths take and cost."""
        places = self.measure.places
        named = [widths.get(place, LOSSLESS) for place in places]
        held, likeliest = self._on_held_out(named, widths)
        before, expected = self._on_held_out([LOSSLESS] * len(places), {})
        same = [one == other for one, other in zip(likeliest, expected, strict=True)]
        stored = sum(self._bytes[place][width] for place, width in zip(places, named, strict=True))
        plain = sum(self._bytes[place]["bf16"] for place in places)
        quality = self.measure.quality(widths)
        return {
            "experts": dict(Counter(named)),
            "expert_bytes": stored,
            "over_bf16": round(stored / plain, 4),
            "perplexity": round(quality.perplexity, 4),
            "loss": round(self.measure.loss(widths).mean, 5),
            "loss_bound": round(self.measure.loss(widths).bound, 5),
            "held_out_perplexity": round(float(torch.tensor(held).exp()), 4),
            "held_out_loss": round(float(torch.tensor(held - before).expm1()), 5),
            "same_token": round(statistics.mean(same), 4),
        }

    def _on_held_out(self, named: list[str], widths: Mapping[Place, str]) -> tuple[float, list]:
        def find() -> list[Any]:
            self.measure.lowered.set_widths(widths)
            losses, likeliest = [], []
            with torch.no_grad():
                for some in passes(self._held):
                    logits = self._loaded.model(some).logits[:, :-1].float()
                    chosen = logits.log_softmax(-1).gather(2, some[:, 1:, None])
                    losses += (-chosen).flatten().tolist()
                    likeliest += logits.argmax(-1).flatten().tolist()
            return [statistics.fmean(losses), likeliest]

        nll, likeliest = self._known.get(["held out", named], find)
        return nll, likeliest

    def run(self, options: Any) -> dict[str, Any]:
        measure = self.measure
        rows = [{"what": LOSSLESS} | self.row({})]
        self.choices = {
            f"uniform {width}": uniform(measure.places, width) for width in reversed(WIDTHS[:-1])
        }
        rows += [{"what": what} | self.row(widths) for what, widths in self.choices.items()]
        for target in map(float, options.targets.split(",")):
            found = find_widths(measure, QuantizeOptions(target))
            what = AT_MOST.format(target)
            self.choices[what] = found.widths
            rows.append({"what": what} | self.row(found.widths))
            print(rows[-1], flush=True)
        rows += [{"what": MIXED.format(width)} | self.row(self.mixed(width)) for width in BUDGETS]
        return {
            "windows": [len(self._text.windows), len(self._held), WINDOW],
            "rows": rows,
            "ranking": self.ranking(options.ranked_layers),
            "at_random": self.at_random(self.choices[CHOSEN], options.seeds),
        }

    def mixed(self, budget: str) -> dict[Place, str]:
        """Of all widths what should cost least within the bytes of a uniform one."""
        places, costs = self.measure.places, self.measure.errors(WIDTHS[:-1])
        costs[LOSSLESS] = dict.fromkeys(places, 0.0)
        steps = []
        for place in places:
            dearest, size = 0.0, self._bytes[place]
            for low, high in reversed([*pairwise(WIDTHS)]):
                saved = size[high] - size[low]
                # No step comes before the one that it goes on from.
                dearest = max(dearest, (costs[low][place] - costs[high][place]) / saved)
                steps.append((dearest, place, low, saved))
        widths = uniform(places, LOSSLESS)
        spare = sum(self._bytes[place][LOSSLESS] - self._bytes[place][budget] for place in places)
        for _, place, low, saved in sorted(steps, key=itemgetter(0)):
            if spare <= 0:
                break
            widths[place], spare = low, spare - saved
        return widths

    def ranking(self, layers: int) -> dict[str, Any]:
        """Rank correlation of the estimate with what is measured of one expert after the other."""
        if not layers:
            return {"experts": 0}
        short = self._short
        count = len({layer for layer, _ in short.places})
        kept = set(range(0, count, max(1, count // max(1, layers))))
        ranked = [place for place in short.places if place[0] in kept]
        high = uniform(short.places, "int4")
        before = short.quality(high).nll
        measured = [short.quality(high | {place: "int2"}).nll - before for place in ranked]
        errors = short.errors(["int2", "int4"])
        estimated = [errors["int2"][place] - errors["int4"][place] for place in ranked]
        result = {"experts": len(ranked), "windows": len(short._calibration.windows)}
        result["spearman"] = round(spearman(estimated, measured), 3)
        result["lowers_the_loss"] = sum(loss < 0 for loss in measured)
        print(result, flush=True)
        return result

    def at_random(self, widths: dict[Place, str], seeds: int) -> dict[str, Any]:
        """The same widths, given to experts at random."""
        found = []
        for seed in range(seeds):
            shuffled = list(widths.values())
            random.Random(seed).shuffle(shuffled)
            dealt = dict(zip(widths, shuffled, strict=True))
            found.append(self._short.quality(dealt).perplexity)
        ours = self._short.quality(widths).perplexity
        return {
            "windows": len(self._short._calibration.windows),
            "perplexity": ours,
            "random": found,
            "seeds_that_lose_more": sum(other > ours for other in found),
        }


def speed(
    store: Path, choices: Mapping[str, Mapping[Place, str]], rounds: int
) -> list[dict[str, Any]]:
    """Tokens a second of a lossless store and of lossy ones of these widths, in turns."""
    with open_store(store) as opened:
        whole = opened.manifest.source_bytes
        experts = [layer.experts for layer in opened.layers]
    folders = {LOSSLESS: store}
    for number, (what, widths) in enumerate(choices.items()):
        folders[what] = store.with_name(f"{store.name}-lossy-{number}")
        shutil.rmtree(folders[what], ignore_errors=True)  # perhaps of other widths
        requantize_store(store, folders[what], bits_of(dict(widths), experts))
    rows = []
    for share in SHARES:
        rates: dict[str, list[float]] = {what: [] for what in folders}
        for _ in range(rounds):
            for what, folder in folders.items():
                rates[what].append(tokens_a_second(folder, int(share * whole)))
        medians = {what: round(statistics.median(found), 3) for what, found in rates.items()}
        rows.append({"share": share, "memory_bytes": int(share * whole), "tokens_s": medians})
    for what in choices:
        shutil.rmtree(folders[what])
    return rows


def spread(windows: torch.Tensor, count: int | None) -> torch.Tensor:
    """Take so many windows from all over a text."""
    return windows if count is None else windows[:: max(1, len(windows) // count)][:count]


class Prefixed:
    """Facts of which more must be said than their names."""

    def __init__(self, known: KnownFacts, about: Any) -> None:
        self._known, self._about = known, about

    def get(self, name: Any, find: Any) -> Any:
        return self._known.get([self._about, name], find)


def record_bytes(store: Any) -> dict[Place, dict[str, int]]:
    """Bytes of every expert in every width, padding included."""
    found = {}
    by_shape: dict[tuple[int, int], dict[str, int]] = {}
    for layer, expert, shard, rows in store.expert_records():
        sizes = dict.fromkeys((*WIDTHS, "bf16"), 0)
        for row in rows:
            entry = shard.entries[row]
            shape = int(entry["rows"]), int(entry["columns"])
            if shape not in by_shape:
                by_shape[shape] = {}
                for width in WIDTHS[:-1]:
                    weights = torch.randn(shape).to(torch.bfloat16)
                    extents = Rounding().encode(weights, width).coded.extents
                    by_shape[shape][width] = sum(padded(part.nbytes) for part in extents)
            for width, size in by_shape[shape].items():
                sizes[width] += size
            sizes[LOSSLESS] += sum(padded(int(size)) for size in entry["extents"][:2, 1])
            sizes["bf16"] += 2 * shape[0] * shape[1]
        found[layer, expert] = sizes
    return found


def padded(size: int) -> int:
    return -(-size // PAGE) * PAGE


def tokens_a_second(store: Path, memory: int) -> float:
    words = ["--prompt", PROMPT, "--max-tokens", str(TOKENS), "--context", str(CONTEXT)]
    words += ["--memory", str(memory), "--json"]
    command = [sys.executable, "-m", "zipmoe", "generate", str(store), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    if len(found["token_ids"]) < LEAST_TOKENS:
        raise SystemExit(f"{store} answers with {found['text']!r}: nothing to time")
    return 1 / found["tpot_s"]


def asked(model: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked of it, and whether it holds."""
    rows = {row["what"]: row for row in found["rows"]}
    chosen, asked = rows[CHOSEN], []

    def ask(what: str, measured: float, **limit: float) -> None:
        held = measured <= limit["most"] if "most" in limit else measured >= limit["least"]
        asked.append({"what": what, "measured": measured, **limit, "held": bool(held)})

    ask("loss on the calibration", chosen["loss"], most=MOST)
    ask("its bound", chosen["loss_bound"], most=MOST)
    if model == "demo":
        ask("expert bytes over BF16", chosen["over_bf16"], most=0.45)
        ask("loss on the other text", chosen["held_out_loss"], most=0.025)
    seeds = found["at_random"]
    least = round(0.9 * len(seeds["random"]))
    ask("random assignments that lose more", seeds["seeds_that_lose_more"], least=least)
    # A uniform width of fewer bits takes fewer bytes, and must lose more.
    for width in WIDTHS[:-1]:
        other = rows[f"uniform {width}"]
        if other["expert_bytes"] <= chosen["expert_bytes"]:
            ask(
                f"perplexity under that of uniform {width}",
                chosen["perplexity"],
                most=other["perplexity"],
            )
    for width in BUDGETS:
        mixed = rows[MIXED.format(width)]
        most = rows[f"uniform {width}"]["perplexity"]
        ask(f"perplexity of {mixed['what']}", mixed["perplexity"], most=most)
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="demo,specialised")
    parser.add_argument("--cache", type=Path, default=cache_folder().with_name("lossy"))
    parser.add_argument("--memory", type=parse_memory, default=parse_memory("9GB"))
    parser.add_argument("--windows", type=int)
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--ranked-layers", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"benchmark": "lossy", "machine": describe_machine(), "models": {}}
    for name, checkpoint in checkpoints(options.models.split(","), options.cache).items():
        store = options.cache / f"{name}-store"
        if not (store / "zipmoe.json").exists():
            pack_checkpoint(checkpoint, store)
        with loaded_to_measure(store, options.memory, WINDOW) as loaded:
            bench = Bench(name, store, loaded, options)
            found = bench.run(options)
        found["speed"] = [] if options.skip_speed else speed(store, bench.choices, options.rounds)
        notes = checkpoint / "specialised.json"
        found["distances"] = json.loads(notes.read_text()) if notes.exists() else None
        found["asked"] = asked(name, found)
        result["models"][name] = found
    publish(result, options.out)


if __name__ == "__main__":
    main()
