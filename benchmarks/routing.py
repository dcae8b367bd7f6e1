"""Routing statistics: our synthetic routing beside real traces, and the reference's split on them.

    python benchmarks/routing.py --traces DIR [--out FILE]

DIR holds count traces, one `counts` [prompts, layers, experts] in each .npz; without it there is
nothing to compare with and the script leaves at once. k is what a prompt's counts are multiples of.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from document import publish

from zipmoe._rank_model import expectation, fit_law
from zipmoe._synthetic_routing import Routing, synthetic_trace
from zipmoe.routing import Trace, by_held_out_prompts, by_recency, in_hindsight

TOKENS = 19  # decoded of each prompt of the traces
# The reference's constants for a 64 GB Orin in microseconds, and a tenth of that machine's memory:
# its setting for 10 GB (tests/test_rank_model.py has the same).
TENSORS, WORKERS, DECODE, READ, RATIO, MEMORY_BYTES = 3, 6, 2500, 900, 0.40, 6.59e9
PLANE_BYTES = TENSORS * 1408 * 2048


def statistics(counts: Any, k: int) -> dict[str, float]:
    quarter = counts.shape[2] // 4
    popular = -np.sort(-counts.sum(axis=0), axis=1)
    return {
        "top_quarter_over_all": float((popular[:, :quarter].sum(1) / popular.sum(1)).mean()),
        "top_quarter_held_out": by_held_out_prompts(counts[::2], counts[1::2], k).top_share(0.25),
        "top_quarter_in_hindsight": in_hindsight(counts, k).top_share(0.25),
        "distinct_experts": float((counts > 0).sum(axis=2).mean()),
    }


def chosen_again(trace: Trace) -> float:
    """How much more often than by chance a token's expert is also the next token's."""
    used = np.zeros((len(trace.experts), trace.num_layers, trace.num_experts), bool)
    np.put_along_axis(used, trace.experts, True, axis=2)
    whose = np.repeat(trace.request, trace.tokens)
    same = whose[1:] == whose[:-1]
    again = (used[1:] & used[:-1])[same].sum(axis=2).mean() / trace.top_k
    return float(again * trace.num_experts / trace.top_k)


def reference_splits(counts: Any, k: int) -> dict[str, float]:
    """Split of the reference's memory, planned with its constants and costs but with the true k."""
    law, layers = fit_law(in_hindsight(counts, k).inclusion), counts.shape[1]

    def cost(activated: int) -> Any:
        full, partial = np.indices([activated + 1] * 2)
        compute = TENSORS * (activated - full) / WORKERS * (DECODE + READ * RATIO)
        read = TENSORS * READ * (activated - full - partial * (1 - RATIO))
        return np.maximum(compute, read)

    share = MEMORY_BYTES / layers / PLANE_BYTES
    costs = {}
    for percent in range(1, 100):
        pools = [int(percent * share / 200), int((100 - percent) * share / 100)]
        if sum(pools) <= counts.shape[2] and min(pools) * layers >= counts.shape[2]:
            costs[percent / 100] = expectation(law, pools, cost)[0]
    best = min(costs, key=lambda split: costs[split])
    return {"split": best, "cost_us": costs[best], "largest_full_us": costs[max(costs)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.traces is None:
        raise SystemExit("no --traces: nothing to compare with")
    results: dict[str, Any] = {"benchmark": "routing", "models": {}}
    for path in sorted(options.traces.glob("*.npz")):
        counts = np.load(path)["counts"].astype(np.int64)
        k = int(np.median(counts.sum(axis=2)) // TOKENS)
        experts = counts.shape[2]
        made = synthetic_trace(Routing(experts, 6, k, 200, 1, TOKENS), seed=1)
        long = synthetic_trace(Routing(experts, 4, k, 4, 32, 300), seed=2)
        results["models"][path.stem] = {
            "experts": experts,
            "top_k": k,
            "recorded": statistics(counts, k),
            "synthetic": statistics(made.counts(), k),
            "synthetic_chosen_again": chosen_again(long),
            "synthetic_top_quarter_by_recency": by_recency(long).top_share(0.25),
            "reference_10GB_true_k": reference_splits(counts, k),
        }
    publish(results, options.out)


if __name__ == "__main__":
    main()
