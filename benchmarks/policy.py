"""Replacement policies on routing with the statistics of real models, and on our synthetic routing.

    python benchmarks/policy.py [--traces DIR] [--out FILE]

DIR holds count traces, one `counts` [prompts, layers, experts] of 19 decoded tokens in each .npz.
Counts say nothing of the order of tokens, so it is drawn: every token gets k different experts, and
an expert as many tokens as it has counts, in each layer by itself. No token tells of the next one
beyond what all of a prompt have in common: the case that is worst for recency. The first 8 tokens
of a prompt stand for what was read before the answer; a second trace has none. Nothing is timed but
the bookkeeping.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from document import publish

from zipmoe import _core
from zipmoe._synthetic_routing import Routing, synthetic_trace
from zipmoe.replay import Replayer, policies
from zipmoe.routing import Trace

TOKENS, PROMPT, PROMPTS = 19, 8, 150
SHARES = (0.3, 0.5)
SYNTHETIC = {
    "60 experts, 4 chosen": (60, 24, 4, 12, 64, 128),
    "64 experts, 6 chosen": (64, 26, 6, 12, 64, 128),
    "60 experts, 4 chosen, prompts of 256": (60, 24, 4, 6, 256, 128),
    "128 experts, 8 chosen": (128, 12, 8, 6, 64, 128),
}


def drawn(counts: Any, k: int, prompt: int, seed: int) -> Trace:
    """A trace with these counts, one request after the other."""
    rng = np.random.default_rng(seed)
    tokens = [prompt] * (prompt > 0) + [1] * (TOKENS - prompt)
    experts = np.empty((len(counts), TOKENS, counts.shape[1], k), np.int64)
    for request, layers in enumerate(counts):
        for layer, total in enumerate(layers):
            order = rng.permutation(len(total))
            copies = np.repeat(order, total[order])  # an expert's are in different rows:
            experts[request, :, layer] = rng.permutation(copies.reshape(k, TOKENS).T)
    runs = len(tokens)
    return Trace(
        counts.shape[2],
        experts.reshape(-1, counts.shape[1], k),
        step=np.arange(runs * len(counts)),
        request=np.repeat(np.arange(len(counts)), runs),
        tokens=np.tile(tokens, len(counts)).astype(np.int64),
    )


class RemainingCounts:
    """What a cache could do that knew beforehand how often a request will choose each expert.

    A limit for whoever learns popularity: it needs no order of tokens, only perfect counts.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def misses(self, slots: int) -> int:
        trace = self.trace
        left = np.zeros((trace.num_layers, trace.num_experts))
        held = np.zeros(left.shape, bool)
        layers = np.arange(trace.num_layers)
        ahead = (layers[None] - layers[:, None] - 1) % trace.num_layers  # [now, of]
        discount = np.exp(-(ahead + 1.0) / trace.num_layers)
        misses, request = 0, None
        for step in trace.steps():
            if step.requests[0] != request:
                request = step.requests[0]
                left[:] = 0
                whole = trace.of([request])
                for layer in layers:
                    np.add.at(left[layer], whole.experts[:, layer].reshape(-1), 1)
            for layer in layers:
                wanted, tokens = step.activated(layer)
                left[layer, wanted] -= tokens
                absent = wanted[~held[layer, wanted]]
                misses += len(absent)
                held[layer, wanted] = True
                over = int(held.sum()) - slots
                if over > 0:
                    worth = np.where(held, left * discount[layer][:, None], np.inf)
                    if over <= held.sum() - len(wanted):
                        worth[layer, wanted] = np.inf
                    gone = np.argpartition(worth.reshape(-1), over - 1)[:over]
                    held.reshape(-1)[gone] = False
        return misses


def compare(trace: Trace, share: float) -> dict[str, Any]:
    """Misses of each policy over those of LRU: of everything, and of decode alone."""
    replayer = Replayer(trace)
    slots = round(share * replayer.most_slots)
    decode = replayer.is_decode
    found: dict[str, Any] = {"share": share, "slots": slots}
    totals = {name: replayer.run(name, slots).misses for name in policies()}
    lru = totals["lru"]
    for name, misses in totals.items():
        hits = replayer.run(name, slots).hits[decode].sum()
        found[name] = {
            "decode_hit_rate": round(float(hits / (hits + misses[decode].sum())), 4),
            "over_lru": round(float(misses.sum() / lru.sum()), 4),
            "decode_over_lru": round(float(misses[decode].sum() / lru[decode].sum()), 4),
            "over_belady": round(float(misses.sum() / totals["belady"].sum()), 4),
        }
    return found


def bookkeeping() -> list[dict[str, Any]]:
    """Nanoseconds of each policy for a visit: a small model's experts, and a hundred thousand."""
    rows = []
    for layers, experts in ((24, 60), (200, 500)):
        trace = synthetic_trace(Routing(experts, layers, 8, 2, 1, 40), seed=1)
        for name in policies():
            replayer = Replayer(trace)
            popularity = np.zeros(0) if name != "static" else replayer.uses.reshape(-1)
            begin = time.perf_counter()
            found = _core.replay(
                replayer._experts,
                replayer._tokens,
                replayer._begins,
                num_experts=experts,
                policy=name,
                slots=replayer.most_slots // 20,
                popularity=popularity,
            )
            seconds = time.perf_counter() - begin
            visits = int(found["hits"].sum() + found["misses"].sum())
            rows.append(
                {"policy": name, "experts": layers * experts, "ns": round(seconds / visits * 1e9)}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"benchmark": "policy", "traces": {}, "bookkeeping": bookkeeping()}
    traces = {name: synthetic_trace(Routing(*sizes), seed=5) for name, sizes in SYNTHETIC.items()}
    limits = set()
    for path in sorted(options.traces.glob("*.npz")) if options.traces else []:
        counts = np.load(path)["counts"].astype(np.int64)
        k = int(np.median(counts.sum(axis=2)) // TOKENS)
        whole = (counts.sum(axis=2) == TOKENS * k).all(axis=1) & (counts <= TOKENS).all((1, 2))
        for prompt in (PROMPT, 0):
            name = f"{path.stem}, {f'{prompt} tokens of prompt' if prompt else 'no prompt'}"
            traces[name] = drawn(counts[whole][:PROMPTS], k, prompt, seed=0)
            limits.add(name)
    for name, trace in traces.items():
        rows = [compare(trace, share) for share in SHARES]
        for row in rows if name in limits else []:
            lru = Replayer(trace).run("lru", row["slots"]).misses.sum()
            best = RemainingCounts(trace).misses(row["slots"])
            row["counts of the request known"] = {"over_lru": round(float(best / lru), 4)}
        results["traces"][name] = rows
    publish(results, options.out)


if __name__ == "__main__":
    main()
