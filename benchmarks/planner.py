"""The planner's splits beside replay of synthetic routing that it has not seen. Nothing is timed.

    python benchmarks/planner.py [--out FILE]

Qwen1.5-MoE's shape on a machine with two workers; rates are those named in TYPICAL.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from document import publish

from zipmoe._rank_model import fit_law
from zipmoe._synthetic_routing import Routing, synthetic_trace
from zipmoe.budget import MemoryReport
from zipmoe.plan import (
    HELD,
    LayerModel,
    ModelSizes,
    PartSize,
    candidate_splits,
    filled_split,
    plan_cache,
)
from zipmoe.rates import TYPICAL
from zipmoe.routing import by_recency, recency_ranks
from zipmoe.schedule import Tier

WEIGHTS, LAYERS, EXPERTS, TOP_K = 2048 * 1408, 24, 60, 4
EXPONENTS = {"rank223": 0.341, "zstd": 0.36, "lz4hc": 0.49}  # bytes a weight


def study(codec: str, share: float) -> dict[str, Any]:
    parts = tuple(PartSize(n, n, int(EXPONENTS[codec] * n)) for n in (2 * WEIGHTS, WEIGHTS))
    sizes = ModelSizes(LAYERS, EXPERTS, TOP_K, parts, codec, 0, "rank3")
    cache = int(share * LAYERS * EXPERTS * sizes.resident_bytes(Tier.FULL))
    routing = synthetic_trace(Routing(EXPERTS, 4, TOP_K, 16, 32, 64), seed=4)
    known, unknown = routing.split(0.5, seed=1)
    popularity, ranks = by_recency(known), recency_ranks(unknown)
    model = LayerModel(sizes, TYPICAL, fit_law(popularity.inclusion))
    room = cache // LAYERS
    splits = list(candidate_splits(model, room))
    forecast = np.array([model.makespan(split)[0] for split in splits])
    replayed = np.array([model.replay(split, ranks) for split in splits])
    memory = MemoryReport(promised=cache, base=0, dense=0, kv=0, scratch=0, cache=cache)
    chosen = plan_cache(sizes, TYPICAL, popularity, memory).split
    alone = {
        tier.value: filled_split(sizes, [room * (other is tier) for other in HELD], room)
        for tier in HELD
    }
    best = replayed.min()
    return {
        "codec": codec,
        "cache_share": share,
        "splits": len(splits),
        "forecast_off_at_most": round(float(np.abs(forecast / replayed - 1).max()), 4),
        "spearman": round(float(np.corrcoef(places(forecast), places(replayed))[0, 1]), 4),
        "chosen": str(chosen),
        "chosen_against_best": round(model.replay(chosen, ranks) / best, 4),
        "alone_against_best": {
            name: round(model.replay(split, ranks) / best, 3) for name, split in alone.items()
        },
    }


def places(values: Any) -> Any:
    return np.argsort(np.argsort(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [study(codec, share) for codec in EXPONENTS for share in (0.2, 0.3, 0.5)]
    publish({"benchmark": "planner", "machine": str(TYPICAL), "plans": rows}, options.out)


if __name__ == "__main__":
    main()
