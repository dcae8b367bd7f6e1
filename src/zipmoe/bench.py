"""Policies and tier splits side by side on one routing trace, with a machine's costs.

What `zipmoe bench policy` prints. Predicted seconds are of the routed experts alone: a trace knows
nothing of the rest of the model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zipmoe._rank_model import fit_law
from zipmoe.plan import (
    HELD,
    LayerModel,
    ModelSizes,
    PartSize,
    TierSplit,
    best_split,
    filled_split,
)
from zipmoe.prediction import Verdict, judge
from zipmoe.replay import OFFLINE, Cost, Replayer, policies
from zipmoe.routing import by_recency
from zipmoe.schedule import Tier

if TYPE_CHECKING:
    from zipmoe.rates import MachineProfile
    from zipmoe.routing import Trace

__all__ = ["BITS", "PolicyBench", "bench_policies", "expert_sizes"]

# Bits of a stored weight, N(0, 0.02) in BF16: benchmarks/results/codec.json.
BITS = {
    "raw": 16.0,
    "rank223": 10.73,
    "rank3": 11.19,
    "rank4": 12.02,
    "zstd": 10.67,
    "lz4hc": 11.95,
}


def expert_sizes(trace: Trace, weights: int, codec: str) -> ModelSizes:
    """Give the sizes of a model with this routing, and gate, up and down of `weights` in all."""
    exponents = 0.0 if codec == "raw" else (BITS[codec] - 8) / 8
    parts = tuple(
        PartSize(n, n if exponents else 2 * n, int(exponents * n))
        for n in (weights - weights // 3, weights // 3)
    )
    return ModelSizes(trace.num_layers, trace.num_experts, trace.top_k, parts, codec, 0, codec)


@dataclass(frozen=True)
class PolicyBench:
    """Costs of each policy with each split that fits the memory."""

    memory_bytes: int  # of the expert cache
    expert_bytes: int  # compressed
    costs: tuple[Cost, ...]
    # Of a dictionary of half the requests, on the others; None: fewer than two, or than 3 layers.
    prediction: Verdict | None = None

    def of(self, policy: str, split: TierSplit) -> Cost:
        """Find one."""
        return next(c for c in self.costs if (c.policy, c.split) == (policy, split))

    @property
    def splits(self) -> list[TierSplit]:
        """Those that were tried."""
        return list(dict.fromkeys(cost.split for cost in self.costs))

    def as_dict(self) -> dict[str, Any]:
        """Give all for --json; bytes also in proportion to those of LRU and of the optimum."""
        rows = []
        for cost in self.costs:
            row = asdict(cost) | {"split": str(cost.split), "offline": cost.policy in OFFLINE}
            for name in ("lru", "belady"):
                row[f"over_{name}"] = self.against(cost, name)
            rows.append(row)
        sizes = {"memory_bytes": self.memory_bytes, "expert_bytes": self.expert_bytes}
        foretold = None if self.prediction is None else asdict(self.prediction)
        return sizes | {"policies": rows, "prediction": foretold}

    def against(self, cost: Cost, policy: str) -> float | None:
        """Divide the bytes that it reads by those of another policy; None where that reads none."""
        other = self.of(policy, cost.split).read_bytes
        return cost.read_bytes / other if other else None


def bench_policies(
    trace: Trace, sizes: ModelSizes, profile: MachineProfile, memory_bytes: int
) -> PolicyBench:
    """Replay a trace through all policies, with splits that fit the memory.

    These are: each tier alone, and the one that the planner chooses.

    Raises
    ------
    TraceError
        The trace has no decode step.
    ValueError
        The memory has no room for an expert of each layer.
    """
    replayer = Replayer(trace)
    model = LayerModel(sizes, profile, fit_law(by_recency(trace).inclusion))
    share = memory_bytes // sizes.layers
    alone = [
        filled_split(sizes, [share * (t is tier) for t in HELD], share) for tier in sizes.tiers
    ]
    splits = [split for split in (*alone, best_split(model, share)) if split.tiers]
    if not splits:
        raise ValueError(f"{memory_bytes} bytes have no room for an expert of each layer")
    return PolicyBench(
        memory_bytes=memory_bytes,
        expert_bytes=sizes.missing_bytes(Tier.ABSENT),
        costs=tuple(
            replayer.cost(policy, split, model)
            for split in dict.fromkeys(splits)
            for policy in policies()
        ),
        prediction=_prediction(trace),
    )


def _prediction(trace: Trace) -> Verdict | None:
    if trace.num_layers < 3 or len(trace.requests) < 2:
        return None
    known, unknown = trace.split(0.5, seed=0)
    return judge(known, unknown) if unknown.is_decode.any() else None
