"""Decoding and prefill of zipmoe against llama.cpp in BF16, all weights in RAM.

A model of the shape of Qwen1.5-MoE-A2.7B with 8 of its layers, random weights and the routing of
trained models (`imposed_routing`; `offload.py` uses it too) is loaded by both, each in a process of
its own. Both are fed the same tokens, whatever they would have answered, so
that both need the same experts. In every repetition (its tokens are new) the engines take turns,
the first of them alternates: a prompt of 512 tokens; a prompt of 64, 8 tokens that do not count,
and 32 that are timed one by one. Ratios are taken within a repetition. llama.cpp is the package
llama-cpp-python, built for this machine, with its own defaults, mapped files and 2 threads
(`tools/setup.sh bench`); without it that arm is left out. --stock adds stock transformers, which
does not fit in memory beside the others, in a phase of its own afterwards.

    python benchmarks/decode.py [--layers 8] [--repetitions 7] [--compute native] [--stock]
        [--cache FOLDER] [--repack] [--out benchmarks/results/decode.json]

The checkpoint, its store and its GGUF file are kept in the cache folder (28 GB for 8 layers).
The last line of stdout is the whole result as one JSON document, which --out keeps too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from machine import describe_machine
from synthetic_qwen import TOPICS, Files, Shape, cache_folder
from workers import Worker, disturbed, in_child, require_memory, rotated, spread

if TYPE_CHECKING:
    from engine import Timed

LONG, SHORT, SKIPPED, DECODED = 512, 64, 8, 32
CONTEXT = 1024
PAUSE = 0.3  # seconds: OpenMP's threads of the arm before spin a while before they sleep
MEASURES = ("decode", f"prefill{SHORT}", f"prefill{LONG}")
TARGETS = {"decode": 1.2, f"prefill{SHORT}": 1.0, f"prefill{LONG}": 1.0}
OTHER_MEMORY = 3_000_000_000  # Python, torch, activations, KV caches


class Tokens:
    """The forced tokens of a repetition."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        rng = random.Random(seed)
        self.long, self.prompt, self.answer = (
            [rng.randrange(vocabulary) for _ in range(count)]
            for count in (LONG, SHORT, SKIPPED + DECODED)
        )


def prepare(layers: int, cache: Path, *, repack: bool, with_gguf: bool) -> None:
    """Make the files; runs in a process of its own."""
    from synthetic_qwen import forget_pages, prepare  # noqa: PLC0415

    files = prepare(Shape(layers=layers, topics=TOPICS), cache, repack=repack)
    if with_gguf and not files.gguf.exists():
        from qwen_gguf import write_gguf  # noqa: PLC0415

        write_gguf(files.checkpoint, files.gguf)
        forget_pages(files.checkpoint)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def open_zipmoe(files: Files, options: argparse.Namespace, shape: Shape) -> Worker:
    worker = Worker(
        "zipmoe",
        "engine_torch:ZipmoeEngine",
        {"OMP_WAIT_POLICY": "passive"},  # as `import zipmoe` sets it
        store=str(files.store),
        compute=options.compute,
        memory=options.memory,
        context=CONTEXT,
        threads=options.threads,
    )
    worker.call("fill", shape.vocabulary, LONG)
    return worker


def open_llama(files: Files, options: argparse.Namespace) -> Worker:
    return Worker(
        "llama.cpp",
        "engine_llama:LlamaEngine",
        {},
        path=str(files.gguf),
        context=CONTEXT,
        threads=options.threads,
    )


def open_stock(files: Files, options: argparse.Namespace) -> Worker:
    checkpoint = str(files.checkpoint)
    return Worker(
        "stock", "engine_torch:open_stock", {}, checkpoint=checkpoint, threads=options.threads
    )


def repetition(workers: dict[str, Worker], number: int, vocabulary: int) -> dict[str, Any]:
    """Let every engine do the same, in turns; seconds of each, and how their logits compare."""
    tokens = Tokens(number, vocabulary)
    seconds: dict[str, dict[str, float]] = {name: {} for name in workers}
    usage: dict[str, Any] = {name: {} for name in workers}
    logits: dict[str, np.ndarray] = {}
    for name in rotated(list(workers), number):
        time.sleep(PAUSE)
        timed: Timed = workers[name].call("prefill", tokens.long)
        seconds[name][f"prefill{LONG}"] = timed.seconds["prefill"]
        usage[name][f"prefill{LONG}"] = asdict(timed.usage) | {"misses": timed.misses}
    for name in rotated(list(workers), number):
        time.sleep(PAUSE)
        timed = workers[name].call("decode", tokens.prompt, tokens.answer, SKIPPED)
        seconds[name][f"prefill{SHORT}"] = timed.seconds["prefill"]
        seconds[name]["decode"] = timed.seconds["decode"]
        usage[name]["decode"] = asdict(timed.usage) | {"misses": timed.misses}
        logits[name] = workers[name].call("logits")
    return {"seconds": seconds, "usage": usage, "logits": compare(logits)}


def compare(logits: dict[str, np.ndarray]) -> dict[str, Any]:
    """Tell whether the engines computed the same model: their logits after the last token."""
    found: dict[str, Any] = {name: {"argmax": int(v.argmax())} for name, v in logits.items()}
    if len(logits) == 2:
        one, other = logits.values()
        found["correlation"] = round(float(np.corrcoef(one, other)[0, 1]), 6)
        found["largest_difference"] = round(float(np.abs(one - other).max()), 4)
    return found


def run_phase(
    workers: dict[str, Worker], options: argparse.Namespace, shape: Shape
) -> list[dict[str, Any]]:
    repetition(workers, -1, shape.vocabulary)  # first touches are not measured
    results = []
    for number in range(options.repetitions):
        results.append(repetition(workers, number, shape.vocabulary))
        print(f"repetition {number + 1}: {line(results[-1]['seconds'])}", file=sys.stderr)
    return results


def rates(seconds: dict[str, float]) -> dict[str, float]:
    """Tokens per second."""
    counts = {f"prefill{LONG}": LONG, f"prefill{SHORT}": SHORT, "decode": 1}
    return {measure: counts[measure] / seconds[measure] for measure in MEASURES}


def line(seconds: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        f"{name} " + ", ".join(f"{measure} {rate:.1f}/s" for measure, rate in rates(of).items())
        for name, of in seconds.items()
    )


def summarise(repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per second of each engine, and zipmoe's ratios to llama.cpp, paired."""
    by_engine = {
        name: [rates(one["seconds"][name]) for one in repetitions]
        for name in repetitions[0]["seconds"]
    }
    found: dict[str, Any] = {
        name: {measure: spread([one[measure] for one in all_]) for measure in MEASURES}
        for name, all_ in by_engine.items()
    }
    if "llama.cpp" in by_engine:
        pairs = list(zip(by_engine["zipmoe"], by_engine["llama.cpp"], strict=True))
        found["zipmoe_to_llama.cpp"] = {
            measure: spread([ours[measure] / theirs[measure] for ours, theirs in pairs])
            | {"target": TARGETS[measure]}
            for measure in MEASURES
        }
    return found


def disturbances(repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name in repetitions[0]["usage"]:
        timed = [usage for one in repetitions for usage in one["usage"][name].values()]
        misses = sum(usage["misses"] for usage in timed)
        found[name] = disturbed(name, timed) | {"misses": misses}
    return found


def print_summary(result: dict[str, Any]) -> None:
    for name, of in result["tokens_per_second"].items():
        for measure, values in of.items():
            if measure in MEASURES:
                target = f", target {values['target']}" if "target" in values else ""
                print(
                    f"{name:20} {measure:11} {values['median']:8.2f} "
                    f"({values['min']:.2f} to {values['max']:.2f}{target})"
                )
    for name, of in result["disturbances"].items():
        print(f"{name}, disturbed by: {of}")
    for name, facts in result["engines"].items():
        print(f"{name}: {facts}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    shape = Shape(layers=options.layers, topics=TOPICS)
    files = Files.of(shape, options.cache)
    with_llama = importlib.util.find_spec("llama_cpp") is not None
    if not with_llama:
        print("llama-cpp-python is not installed: zipmoe runs alone", file=sys.stderr)
    making = {"layers": options.layers, "cache": options.cache, "repack": options.repack}
    in_child("decode:prepare", **making, with_gguf=with_llama)
    needed = size(files.store) + (size(files.gguf) if with_llama else 0) + OTHER_MEMORY
    require_memory(needed, "both engines" if with_llama else "zipmoe's weights")
    workers = {"zipmoe": open_zipmoe(files, options, shape)}
    if with_llama:
        workers["llama.cpp"] = open_llama(files, options)
    repetitions = run_phase(workers, options, shape)
    distinct = workers["zipmoe"].call("distinct_experts", Tokens(0, shape.vocabulary).prompt)
    engines = {name: worker.call("facts") for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    result = {
        "benchmark": "decode",
        "machine": describe_machine(),
        "model": asdict(shape),
        "bytes": {path.name: size(path) for path in (files.store, files.checkpoint)},
        "tokens": {"prefill": [SHORT, LONG], "skipped": SKIPPED, "decoded": DECODED},
        "engines": engines,
        "distinct_experts_of_64_tokens": round(distinct, 2),
        "tokens_per_second": summarise(repetitions),
        "disturbances": disturbances(repetitions),
        "repetitions": repetitions,
    }
    if options.stock:
        add_stock(result, files, options, shape)
    return result


def add_stock(
    result: dict[str, Any], files: Files, options: argparse.Namespace, shape: Shape
) -> None:
    """Run stock transformers afterwards: a phase of its own, so no ratios within repetitions."""
    require_memory(2 * size(files.checkpoint), "stock transformers")
    with open_stock(files, options) as worker:
        repetitions = run_phase({"stock": worker}, options, shape)
        result["engines"]["stock"] = worker.call("facts")
    result["tokens_per_second"]["stock"] = summarise(repetitions)["stock"]
    result["disturbances"] |= disturbances(repetitions)
    result["stock_repetitions"] = repetitions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--compute", default="native", help="zipmoe's: native or torch")
    parser.add_argument(
        "--memory", default="16GB", help="granted to zipmoe; it takes what it needs"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stock", action="store_true", help="stock transformers afterwards")
    parser.add_argument("--repack", action="store_true", help="make the store again")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = run(options)
    print_summary(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
