"""One decoder layer of Qwen1.5-MoE-A2.7B's shape at batch 1: zipmoe against stock transformers.

A model of a few such layers with random weights and a small vocabulary decodes forced tokens at a
context of 64 (KV cache of 57 to 72 tokens). The clock runs from the call of the first decoder layer
to the return of the last and is divided by layers and tokens: attention, router, experts, shared
expert, norms, all Python between them; without embedding, masks and head. All experts are in RAM.
The arms (stock transformers in BF16 with its default experts, zipmoe through torch, zipmoe native)
run in processes of their own and take turns in every repetition; ratios are taken within it.

Python's overhead of a layer is measured in two ways. `counted`: the time of that layer less the
time inside calls of zipmoe's core, which counts it; torch's small operators are overhead then.
`tiny`: the time of a layer of the same graph whose matrices are so small (hidden size 256) that
they cost next to nothing; it contains what each call of the core costs whatever its size, so it is
an upper bound and needs no trust in counters.

    python benchmarks/layer.py [--layers 4] [--repetitions 7] [--arms stock,torch,native]
        [--cache FOLDER] [--repack] [--out benchmarks/results/layer.json]

The last line of stdout is the whole result as one JSON document, which --out keeps too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import describe_machine
from synthetic_qwen import Files, Shape, cache_folder
from workers import Worker, disturbed, in_child, rotated, spread

if TYPE_CHECKING:
    from engine import Timed

VOCABULARY = 1024
CONTEXT, STEPS = 64, 16
PROMPT = CONTEXT - STEPS // 2
ARMS = ("stock", "torch", "native")
PAUSE = 0.2  # seconds: OpenMP's threads of the arm before spin a while before they sleep
TARGET_RATIO, TARGET_OVERHEAD_MS = 2.5, 0.25


def shapes(layers: int) -> dict[str, Shape]:
    tiny = Shape(16, VOCABULARY, hidden=256, heads=2, expert_width=64, shared_width=256)
    return {"real": Shape(layers, VOCABULARY), "tiny": tiny}


def prepare(layers: int, cache: Path, *, repack: bool) -> None:
    """Make checkpoints and stores; runs in a process of its own."""
    from synthetic_qwen import prepare  # noqa: PLC0415

    for shape in shapes(layers).values():
        prepare(shape, cache, repack=repack)


def open_arm(arm: str, files: Files, options: argparse.Namespace) -> Worker:
    if arm == "stock":
        checkpoint = str(files.checkpoint)
        return Worker(
            arm, "engine_torch:open_stock", {}, checkpoint=checkpoint, threads=options.threads
        )
    worker = Worker(
        arm,
        "engine_torch:ZipmoeEngine",
        {"OMP_WAIT_POLICY": "passive"},  # as `import zipmoe` sets it
        store=str(files.store),
        compute=arm,
        memory=options.memory,
        context=CONTEXT + STEPS,
        threads=options.threads,
    )
    worker.call("fill", VOCABULARY, CONTEXT)
    return worker


def repetition(workers: dict[str, Worker], number: int) -> dict[str, Any]:
    rng = random.Random(number)
    prompt, ids = ([rng.randrange(VOCABULARY) for _ in range(n)] for n in (PROMPT, STEPS))
    found = {}
    for arm in rotated(list(workers), number):
        time.sleep(PAUSE)
        timed: Timed = workers[arm].call("layers", prompt, ids)
        found[arm] = timed.seconds | {"usage": asdict(timed.usage)}
    return found


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Alternate all arms on one shape."""
    files = Files(options.cache / shape.name)
    workers = {arm: open_arm(arm, files, options) for arm in options.arms}
    repetition(workers, -1)  # first touches are not measured
    repetitions = []
    for number in range(options.repetitions):
        repetitions.append(repetition(workers, number))
        times = ", ".join(f"{arm} {1e3 * repetitions[-1][arm]['layer']:.3f}" for arm in workers)
        print(f"hidden {shape.hidden}, ms a layer: {times}", file=sys.stderr)
    engines = {arm: worker.call("facts") for arm, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return {
        "model": asdict(shape),
        "engines": engines,
        "ms": {arm: milliseconds(repetitions, arm, "layer") for arm in workers},
        "ratio_to_stock": {
            arm: spread([one["stock"]["layer"] / one[arm]["layer"] for one in repetitions])
            for arm in workers
            if "stock" in workers and arm != "stock"
        },
        "disturbances": {
            arm: disturbed(arm, [one[arm]["usage"] for one in repetitions]) for arm in workers
        },
        "repetitions": repetitions,
    }


def milliseconds(repetitions: list[dict[str, Any]], arm: str, what: str) -> dict[str, float]:
    return spread([1e3 * one[arm][what] for one in repetitions], 4)


def overhead(real: dict[str, Any], tiny: dict[str, Any]) -> dict[str, Any]:
    """Python's share of a native layer, by both ways."""
    if "native" not in tiny["ms"]:
        return {}
    found: dict[str, Any] = {"target_ms": TARGET_OVERHEAD_MS, "tiny_ms": tiny["ms"]["native"]}
    for name, measured in (("counted_ms", real), ("tiny_counted_ms", tiny)):
        if "outside" in measured["repetitions"][0]["native"]:
            found[name] = milliseconds(measured["repetitions"], "native", "outside")
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    in_child("layer:prepare", layers=options.layers, cache=options.cache, repack=options.repack)
    results = {name: measure(shape, options) for name, shape in shapes(options.layers).items()}
    return {
        "benchmark": "layer",
        "machine": describe_machine(),
        "context": CONTEXT,
        "steps": STEPS,
        "target_ratio": TARGET_RATIO,
        "python_overhead": overhead(results["real"], results["tiny"]),
        **results,
    }


def print_summary(result: dict[str, Any]) -> None:
    for name in ("real", "tiny"):
        for arm, ms in result[name]["ms"].items():
            ratio = result[name]["ratio_to_stock"].get(arm) if name == "real" else None
            faster = "" if ratio is None else f", {ratio['median']:.2f}x stock"
            faster += "" if ratio is None else f" ({ratio['min']:.2f} to {ratio['max']:.2f})"
            spread_ = f"({ms['min']:.3f} to {ms['max']:.3f})"
            print(f"{name} {arm:7} {ms['median']:8.3f} ms a layer {spread_}{faster}")
    for name, value in result["python_overhead"].items():
        print(f"python overhead, {name}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--arms", default=",".join(ARMS), help="some of stock, torch, native")
    parser.add_argument("--memory", default="8GB", help="granted to zipmoe; it takes what it needs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repack", action="store_true", help="make the stores again")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.arms = options.arms.split(",")
    result = run(options)
    print_summary(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
