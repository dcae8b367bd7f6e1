"""Orders of a layer's experts: makespans beside the least possible, for real shapes and rates.

    python benchmarks/schedule.py [--layers N] [--out FILE]

Nothing is timed. Layers are drawn from ranges of rates, codecs, splits and batches; each order is
simulated by list scheduling, with the engine's pieces, and compared with a lower bound.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from document import publish

from zipmoe.plan import ModelSizes, PartSize, expert_task
from zipmoe.rates import MachineProfile
from zipmoe.schedule import (
    Task,
    Tier,
    by_blocks,
    by_johnson,
    least_makespan,
    longest_first,
    simulate,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PIECE_WEIGHTS = 1 << 18  # csrc/engine.cpp
EXPONENTS = {"rank223": 0.341, "zstd": 0.36, "lz4hc": 0.49}  # bytes a weight
ORDERS: dict[str, Callable[[list[Task], int], list[int]]] = {
    "johnson": by_johnson,
    "blocks": by_blocks,
    "longest first": lambda tasks, _: longest_first(tasks),
    "fifo": lambda tasks, _: list(range(len(tasks))),
}


def layer(rng: random.Random) -> tuple[list[Task], int]:
    """Draw a decode step or a prompt's layer on some machine."""
    codec, wide = rng.choice(list(EXPONENTS)), rng.choice([1408, 768, 1536])
    weights = 2048 * wide
    parts = tuple(PartSize(n, n, int(EXPONENTS[codec] * n)) for n in (2 * weights, weights))
    sizes = ModelSizes(1, 64, 8, parts, codec, 0, "raw")
    profile = MachineProfile(
        workers=rng.choice([2, 4, 8]),
        read_bytes_s=10 ** rng.uniform(8.5, 10),
        multiply_bytes_s={"raw": 30e9, "rank223": 36e9},
        decode_bytes_s={"zstd": 1.8e9, "lz4hc": 3e9},
        flops=200e9,
    )
    prompt = rng.random() < 0.3
    tiers = rng.choices(
        list(Tier), [rng.random() for _ in Tier], k=rng.randint(4, 40 if prompt else 16)
    )
    tokens = [rng.choice([1, 1, 2, 4, 16, 64]) if prompt else 1 for _ in tiers]
    tasks = [
        expert_task(sizes, profile, tier, count) for tier, count in zip(tiers, tokens, strict=True)
    ]
    return [in_pieces(task, sizes) for task in tasks], profile.workers


def in_pieces(task: Task, sizes: ModelSizes) -> Task:
    pieces = [-(-part.weights // PIECE_WEIGHTS) for part in sizes.parts]
    parts = zip(task.parts, pieces, strict=True)
    return replace(task, parts=tuple(replace(part, pieces=count) for part, count in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = random.Random(20261127)
    ratios: dict[str, list[float]] = {name: [] for name in ORDERS}
    for _ in range(options.layers):
        tasks, workers = layer(rng)
        least = least_makespan(tasks, workers)
        for name, order in ORDERS.items():
            made = simulate(tasks, order(tasks, workers), workers).makespan_s
            ratios[name].append(made / least)
    results: dict[str, Any] = {"benchmark": "schedule", "layers": options.layers, "orders": {}}
    for name, found in ratios.items():
        results["orders"][name] = {
            "median": round(statistics.median(found), 4),
            "p95": round(statistics.quantiles(found, n=20)[-1], 4),
            "worst": round(max(found), 4),
        }
    publish(results, options.out)


if __name__ == "__main__":
    main()
