"""A store, a checkpoint or a hub id → how its memory would be shared out, and how fast it would be.

Support of `cli.py`. The counting is that of a load (`_skeleton.py`), the forecast the planner's.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._errors import TraceError
from ._quantizer import LoadOptions
from ._rank_model import fit_law
from ._skeleton import cache_slots
from ._sketch import sketch_store
from ._synthetic_routing import typical_popularity
from .budget import available_memory
from .budget import plan as share_out
from .checkpoint import open_checkpoint
from .forecast import Forecaster, engine_sizes, scaled_rates
from .hardware import known_work
from .hub import checkpoint_headers, is_hub_id, resolve_checkpoint
from .model import skeleton_of
from .plan import Forecast, Workload, forecast_prompt, plan_cache
from .replay import Replayer, policies
from .routing import by_recency, load_trace
from .schedule import Tier
from .store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._skeleton import Skeleton
    from .budget import MemoryReport
    from .hardware import Profile
    from .plan import CachePlan, ModelSizes
    from .rates import MachineProfile
    from .routing import Popularity, Trace

__all__ = ["PROMPTS", "Plan", "Target", "make_plan", "open_target"]

PROMPTS = (64, 512)  # tokens of the prompts whose first tokens are forecast
WORTH_SAYING = 0.01  # of a token's time: what another split must gain


@dataclass(frozen=True)
class Target:
    """What is to be planned for, counted and closed again."""

    name: str
    kind: str  # "store", "checkpoint" or "hub"
    folder: Path  # whose drive it would be read from
    identity: str  # of a store, "" where there is none yet
    store_bytes: int  # estimated where there is none yet
    skeleton: Skeleton


@dataclass(frozen=True)
class Replayed:
    """What the engine's policy does with the half of a trace that was not planned with."""

    policy: str
    requests: int
    hit_rate: float
    read_bytes: float
    tpot_s: float


@dataclass(frozen=True)
class Better:
    """A split that the engine cannot hold, and what it would gain."""

    split: str
    tpot_s: float
    gain: float  # part of a token's time


@dataclass(frozen=True)
class Plan:
    """How memory is shared out, and a forecast."""

    target: Target
    memory: MemoryReport
    slots: int  # experts in the cache
    cache: CachePlan  # one tier: what the engine holds
    ttft: dict[int, Forecast]  # by tokens of the prompt; nothing in memory before
    popularity: str  # where it comes from
    replayed: Replayed | None
    better: Better | None
    rates: MachineProfile
    work: str  # "estimated", or "observed" in runs of this store

    def as_dict(self) -> dict[str, Any]:
        """Give all for --json."""
        target, sizes = self.target, self.target.skeleton.sizes
        model = asdict(sizes)
        del model["held"]
        return {
            "target": {
                "name": target.name,
                "kind": target.kind,
                "store_bytes": target.store_bytes,
                "sizes": "measured" if target.kind == "store" else "estimated",
            },
            "model": model,
            "context": target.skeleton.context,
            "memory": self.memory.as_dict(),
            "floor_bytes": target.skeleton.needs.floor,
            "slots": self.slots,
            "experts": sizes.layers * sizes.experts,
            "split": asdict(self.cache.split),
            "hit_rate": self.cache.hit_rate,
            "read_bytes": self.cache.read_bytes,
            "tpot": asdict(self.cache.tpot),
            "ttft": [{"prompt_tokens": n} | asdict(one) for n, one in self.ttft.items()],
            "reason": self.cache.reason,
            "popularity": self.popularity,
            "replayed": None if self.replayed is None else asdict(self.replayed),
            "better": None if self.better is None else asdict(self.better),
            "rates": asdict(self.rates),
            "work": self.work,
        }


def open_target(name: str, *, context: int | None, codec: str, batch: int = 1) -> Target:
    """Count what a model needs, wherever it is and without reading a weight.

    `codec`: with which a checkpoint would be packed; a store has its own.

    Raises
    ------
    CheckpointError, UnsupportedModelError, StoreError
        It cannot be packed, or loaded.
    """
    options = LoadOptions(context=context, batch=batch)
    with ExitStack() as stack:
        if (folder := Path(name)).joinpath("zipmoe.json").exists():
            store = stack.enter_context(open_store(folder))
            found = skeleton_of(folder, store, options)
            manifest = store.manifest
            return Target(name, "store", folder, manifest.identity, manifest.store_bytes, found)
        kind = "checkpoint"
        if not is_hub_id(name):
            weights = resolve_checkpoint(name)
        else:
            kind, folder = "hub", Path()
            weights = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zipmoe-")))
            checkpoint_headers(name, weights)
        sketch = sketch_store(open_checkpoint(weights), codec)
        found = skeleton_of(weights, sketch, options)
        return Target(name, kind, folder, "", sketch.store_bytes, found)


def make_plan(
    target: Target,
    profile: Callable[[Path], Profile],
    *,
    memory: int | None = None,
    trace: Path | None = None,
    batch: int = 1,
) -> Plan:
    """Share out the memory as a load does, and forecast.

    `profile` gives what was measured of this machine and a folder's drive.

    Raises
    ------
    BudgetError
        The memory is below the floor.
    TraceError
        The trace is none, or of another model.
    """
    skeleton = target.skeleton
    report = share_out(skeleton.needs, memory or available_memory().budget)
    sizes = skeleton.sizes
    known, unknown, popularity = _routing(trace, sizes)
    rates = scaled_rates(profile(target.folder), sizes, target.identity)
    slots = cache_slots(skeleton.table, report.cache)
    # Room for so many records, without the cache's own tables.
    held = replace(report, cache=slots * sizes.resident_bytes(Tier.COMPRESSED))
    workload = Workload(PROMPTS[0], batch)
    cache = plan_cache(engine_sizes(sizes), rates, popularity, held, workload)
    law = fit_law(popularity.inclusion)
    return Plan(
        target=target,
        memory=report,
        slots=slots,
        cache=cache,
        ttft={tokens: forecast_prompt(sizes, rates, law, tokens) for tokens in PROMPTS},
        popularity=popularity.source if known is None else f"{popularity.source} ({trace})",
        replayed=None if unknown is None else _replayed(unknown, sizes, rates, slots),
        better=_better(plan_cache(sizes, rates, popularity, held, workload), cache),
        rates=rates,
        work="estimated" if known_work(target.identity) is None else "observed",
    )


def _routing(path: Path | None, sizes: ModelSizes) -> tuple[Trace | None, Trace | None, Popularity]:
    """Half of a trace's requests to plan with, the others to replay, and the popularity."""
    if path is None:
        return None, None, typical_popularity(sizes.experts, sizes.top_k)
    trace = load_trace(path)
    found = trace.num_layers, trace.num_experts, trace.top_k
    if found != (sizes.layers, sizes.experts, sizes.top_k):
        raise TraceError(
            "{}: {} layers of {} experts, of which a token chooses {}, are another model's; this "
            "one has {}, {} and {}".format(path, *found, sizes.layers, sizes.experts, sizes.top_k)
        )
    if len(trace.requests) < 2:
        return trace, trace, by_recency(trace)
    known, unknown = trace.split(0.5, seed=0)
    return known, unknown, by_recency(known)


def _replayed(trace: Trace, sizes: ModelSizes, rates: MachineProfile, slots: int) -> Replayed:
    replayer, policy = Replayer(trace), policies()[0]
    forecaster = Forecaster(sizes, rates, slots=slots, policy=policy)
    found = replayer.run(policy, slots)
    seconds, hit_rate, read = forecaster.decoding(found, replayer.is_decode, PROMPTS[0])
    return Replayed(policy, len(trace.requests), hit_rate, read, seconds)


def _better(other: CachePlan, cache: CachePlan) -> Better | None:
    gain = 1 - other.tpot.seconds / cache.tpot.seconds
    if gain < WORTH_SAYING:
        return None
    return Better(str(other.split), other.tpot.seconds, gain)
