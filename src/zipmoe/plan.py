"""Sizes, machine, popularity and memory → how the expert cache is split, and a forecast. Pure.

Ranks go to tiers from the top: the first ones are held decoded, the next compressed, then
sign-mantissas only, then exponents only; the rest is absent. The split with the least expected
makespan of a layer wins (`_rank_model` has the hits, `schedule` the makespan), a simpler one where
it is as good. Nothing is measured here: rates come in a `MachineProfile`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from itertools import combinations, pairwise, permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from zipmoe._rank_model import RankLaw, batch_law, expectation, fit_law
from zipmoe.schedule import Flow, Part, Task, Tier, flow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from zipmoe.budget import MemoryReport
    from zipmoe.rates import MachineProfile
    from zipmoe.routing import Popularity

__all__ = [
    "CachePlan",
    "Forecast",
    "LayerModel",
    "ModelSizes",
    "PartSize",
    "TierSplit",
    "Workload",
    "best_split",
    "candidate_splits",
    "expert_task",
    "filled_split",
    "forecast_prompt",
    "plan_cache",
    "prompt_rest_s",
    "rest_s",
]

TIERS = tuple(Tier)  # from the top rank down
HELD = TIERS[:-1]
_STEPS = 10  # shares of the memory that are tried for each tier, before going on slot by slot
_AS_GOOD = 1.01  # a split with fewer tiers is taken if it costs at most this much more
_LARGEST_TABLE = 20_000
_DECILE = 1.2816  # standard deviations from the mean to the first and the last tenth


@dataclass(frozen=True)
class PartSize:
    """What of an expert is read and multiplied together: gate and up, or down."""

    weights: int
    sign_mantissa_bytes: int  # stored, padding included
    exponents_bytes: int


@dataclass(frozen=True)
class ModelSizes:
    """What the planner has to know of a packed model."""

    layers: int  # with routed experts
    experts: int  # in a layer
    top_k: int
    parts: tuple[PartSize, ...]  # of an expert, in the order of use
    codec: str  # of the experts
    dense_weights: int  # that every token is multiplied with
    dense_codec: str
    head_weights: int = 0  # of those: of a prompt only the last token is multiplied with them
    state_bytes: float = 0.0  # that a token reads of the KV cache for each token before it
    held: tuple[Tier, ...] = HELD  # what the cache can hold

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Those of `held` that differ for this codec."""
        differ = any(part.exponents_bytes for part in self.parts)
        return self.held if differ else (Tier.COMPRESSED,)

    def resident_bytes(self, tier: Tier) -> int:
        """Bytes that an expert of a tier takes in memory."""
        return sum(_resident(part, tier) for part in self.parts)

    def missing_bytes(self, tier: Tier) -> int:
        """Bytes that have to be read to use an expert of a tier."""
        return sum(_missing(part, tier) for part in self.parts)


def _resident(part: PartSize, tier: Tier) -> int:
    if tier is Tier.FULL:
        return 2 * part.weights
    return part.sign_mantissa_bytes + part.exponents_bytes - _missing(part, tier)


def _missing(part: PartSize, tier: Tier) -> int:
    signs = part.sign_mantissa_bytes * (tier in {Tier.EXPONENTS, Tier.ABSENT})
    return signs + part.exponents_bytes * (tier in {Tier.SIGN_MANTISSA, Tier.ABSENT})


@dataclass(frozen=True)
class Workload:
    """What a forecast is for."""

    prompt_tokens: int = 64
    batch: int = 1  # sequences that are decoded together


@dataclass(frozen=True)
class TierSplit:
    """Experts of a layer in each tier."""

    full: int = 0
    compressed: int = 0
    sign_mantissa: int = 0
    exponents: int = 0

    @property
    def pools(self) -> tuple[int, int, int, int]:
        """Their numbers in the order of `HELD`."""
        return astuple(self)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Those that are not empty."""
        return tuple(tier for tier, count in zip(HELD, self.pools, strict=True) if count)

    def resident_bytes(self, sizes: ModelSizes) -> int:
        """Bytes that they take in memory."""
        pairs = zip(HELD, self.pools, strict=True)
        return sum(count * sizes.resident_bytes(tier) for tier, count in pairs)

    def __str__(self) -> str:
        words = [
            f"{count} {tier.value}" for tier, count in zip(HELD, self.pools, strict=True) if count
        ]
        return ", ".join(words) or "none"


@dataclass(frozen=True)
class Forecast:
    """Seconds, and a band that eight of ten runs should be in."""

    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class CachePlan:
    """How the expert cache is split, and what comes of it."""

    memory: MemoryReport  # what fills the budget
    split: TierSplit  # of every layer
    layers: tuple[TierSplit, ...]  # the same, and what the rest of the memory has room for
    hit_rate: float  # part of the activated experts that nothing is read of
    read_bytes: float  # by one decode step
    tpot: Forecast
    ttft: Forecast  # with a cold cache
    reason: str


def expert_task(
    sizes: ModelSizes, profile: MachineProfile, tier: Tier, tokens: float = 1.0
) -> Task:
    """Say what an activated expert of a tier has the drive and the workers do."""
    codec = "raw" if tier is Tier.FULL else sizes.codec
    parts = [
        Part(
            read_s=_missing(part, tier) / profile.read_bytes_s,
            work_s=profile.work_s(part.weights, codec, tokens),
        )
        for part in sizes.parts
    ]
    return Task(tier, tuple(parts))


class LayerModel:
    """Expected makespan of a layer's decode step by the split of its tiers."""

    def __init__(
        self, sizes: ModelSizes, profile: MachineProfile, token: RankLaw, batch: int = 1
    ) -> None:
        self.sizes, self.law = sizes, batch_law(token, batch)
        each = batch * sizes.top_k / float(self.law.inclusion.sum())  # tokens of an expert
        self.flows = {
            tier: flow(expert_task(sizes, profile, tier, each), profile.workers) for tier in Tier
        }
        self._table = lru_cache(maxsize=256)(self._makespans)

    @property
    def most_tiers(self) -> int:
        """Number of tiers that a split may use for its makespans to fit a small table."""
        tiers, largest = len(self.sizes.tiers), max(self.law.support) + 1
        return tiers if largest**tiers <= _LARGEST_TABLE else 2

    def makespan(self, split: TierSplit) -> tuple[float, float]:
        """Mean and standard deviation, in seconds."""
        pools = [count for count in split.pools if count]
        return expectation(self.law, pools, lambda number: self._table(split.tiers, number))

    def replay(self, split: TierSplit, activated: NDArray[np.bool_]) -> float:
        """Mean makespan over recorded steps, in seconds.

        `activated` is what `routing.recency_ranks` gives. Tiers hold the ranks that they would hold
        if whatever is used moved to the top at once and pushed the others down.
        """
        borders = np.cumsum([0, *split.pools])
        kinds = zip(borders, borders[1:], split.pools, strict=False)
        hits = [activated[..., a:b].sum(axis=-1) for a, b, count in kinds if count]
        return float(self.times(split, hits, activated.sum(axis=-1)).mean())

    def times(
        self,
        split: TierSplit,
        hits: Sequence[NDArray[np.integer[Any]]],
        activated: NDArray[np.integer[Any]],
    ) -> NDArray[np.float64]:
        """Seconds of layers, from the hits in each tier of the split and all activated experts."""
        times = np.zeros(activated.shape)
        for size in np.unique(activated):
            same = activated == size
            times[same] = self._table(split.tiers, int(size))[tuple(h[same] for h in hits)]
        return times

    def read_bytes(self, split: TierSplit) -> float:
        """Bytes that are read, on average."""
        return float(self._activated(split) @ [self.sizes.missing_bytes(tier) for tier in TIERS])

    def waits_for_drive(self, split: TierSplit) -> bool:
        """Tell whether the drive is busy for longer than the workers, on average."""
        balance = [self.flows[tier].read_s - self.flows[tier].work_s for tier in TIERS]
        return float(self._activated(split) @ balance) > 0

    def hit_rate(self, split: TierSplit) -> float:
        """Part of the activated experts that nothing is read of."""
        activated = self._activated(split)
        return float(activated[:2].sum() / activated.sum())

    def _activated(self, split: TierSplit) -> NDArray[np.float64]:
        """[tiers]: activated experts, on average."""
        borders = np.cumsum(split.pools)
        return np.array([part.sum() for part in np.split(self._inclusion, borders)])

    @cached_property
    def _inclusion(self) -> NDArray[np.float64]:
        return self.law.inclusion

    def _makespans(self, tiers: tuple[Tier, ...], activated: int) -> NDArray[np.float64]:
        """[hits in each tier]: the flow of these and of the absent ones, in Johnson's order."""
        counts = dict(zip(tiers, np.indices([activated + 1] * len(tiers)), strict=True))
        absent = activated - sum(counts.values(), np.zeros((), int))
        counts[Tier.ABSENT] = np.maximum(absent, 0)
        ordered = sorted(counts, key=lambda tier: self.flows[tier].johnson_key)
        read = work = span = np.zeros(())
        for tier in ordered:
            one, count = self.flows[tier], counts[tier]
            whole = one.span_s + max(one.read_s, one.work_s) * (count - 1)
            work = work + one.work_s * count
            span = np.where(count, np.maximum(span + one.work_s * count, read + whole), span)
            read = read + one.read_s * count
        return span


def plan_cache(
    sizes: ModelSizes,
    profile: MachineProfile,
    popularity: Popularity,
    memory: MemoryReport,
    workload: Workload | None = None,
) -> CachePlan:
    """Find the best split of the cache's share of the memory, and forecast its speed.

    Raises
    ------
    ValueError
        The popularity is not that of a model with as many experts and choices.
    """
    workload = workload or Workload()
    known = len(popularity.inclusion), popularity.activated
    if known[0] != sizes.experts or abs(known[1] - sizes.top_k) > 1e-6:
        raise ValueError(
            f"popularity of {known[0]} experts, of which a token activates {known[1]:.3g}, "
            f"cannot be that of {sizes.experts} and {sizes.top_k}"
        )
    token = fit_law(popularity.inclusion)
    model = LayerModel(sizes, profile, token, workload.batch)
    share = memory.cache // sizes.layers
    split = best_split(model, share)
    return CachePlan(
        memory=memory,
        split=split,
        layers=_spread(sizes, split, memory.cache),
        hit_rate=model.hit_rate(split),
        read_bytes=sizes.layers * model.read_bytes(split),
        tpot=_tpot(sizes, profile, model.makespan(split), workload),
        ttft=forecast_prompt(sizes, profile, token, workload.prompt_tokens),
        reason=_reason(model, split, share),
    )


def best_split(model: LayerModel, share: int) -> TierSplit:
    """Find the split of a layer's share of the memory with the least expected makespan."""
    costs = {split: model.makespan(split)[0] for split in candidate_splits(model, share)}
    best = min(costs, key=lambda split: costs[split])
    while True:
        for split in _neighbours(model.sizes, best, share):
            if split not in costs and len(split.tiers) <= model.most_tiers:
                costs[split] = model.makespan(split)[0]
        better = min(costs, key=lambda split: costs[split])
        if better == best:
            break
        best = better
    as_good = [split for split in costs if costs[split] <= _AS_GOOD * costs[best]]
    return min(as_good, key=lambda split: (len(split.tiers), costs[split]))


def candidate_splits(model: LayerModel, share: int) -> Iterator[TierSplit]:
    """Yield splits of the memory in tenths, with as many tiers as can be computed."""
    seen = set()
    for tiers in combinations(model.sizes.tiers, model.most_tiers):
        for cuts in combinations(range(_STEPS + len(tiers) - 1), len(tiers) - 1):
            ends = (-1, *cuts, _STEPS + len(tiers) - 1)
            parts = [0] * len(HELD)
            for tier, (before, after) in zip(tiers, pairwise(ends), strict=True):
                parts[HELD.index(tier)] = after - before - 1
            split = filled_split(model.sizes, [part * share // _STEPS for part in parts], share)
            if split not in seen:
                seen.add(split)
                yield split


def filled_split(sizes: ModelSizes, parts: Sequence[int], share: int) -> TierSplit:
    """Give each tier what its bytes have room for, and the rest of the share from the top."""
    counts, left, ranks = [0] * len(HELD), share, sizes.experts
    for number, tier in enumerate(HELD):
        size = sizes.resident_bytes(tier)
        counts[number] = min(parts[number] // size, ranks) if parts[number] else 0
        left -= counts[number] * size
        ranks -= counts[number]
    for number, tier in enumerate(HELD):
        if counts[number]:
            more = min(left // sizes.resident_bytes(tier), ranks)
            counts[number] += more
            left -= more * sizes.resident_bytes(tier)
            ranks -= more
    return TierSplit(*counts)


def _neighbours(sizes: ModelSizes, split: TierSplit, share: int) -> Iterator[TierSplit]:
    """Yield splits with up to three experts less in a tier, and what has room in another."""
    for giver, taker in permutations(sizes.tiers, 2):
        for number in range(4):
            counts = list(split.pools)
            counts[HELD.index(giver)] -= number
            if counts[HELD.index(giver)] >= 0:
                left = share - TierSplit(*counts).resident_bytes(sizes)
                room = min(left // sizes.resident_bytes(taker), sizes.experts - sum(counts))
                counts[HELD.index(taker)] += room
                yield TierSplit(*counts)


def _spread(sizes: ModelSizes, split: TierSplit, cache: int) -> tuple[TierSplit, ...]:
    """Give the first layers one expert more, of the largest tier, while there is memory left."""
    counts = list(split.pools)
    largest = max(range(len(HELD)), key=lambda i: counts[i] * sizes.resident_bytes(HELD[i]))
    if not split.tiers:
        largest = HELD.index(Tier.COMPRESSED)
    left = cache - sizes.layers * split.resident_bytes(sizes)
    more = left // sizes.resident_bytes(HELD[largest]) if sum(counts) < sizes.experts else 0
    counts[largest] += 1
    return tuple(TierSplit(*counts) if i < more else split for i in range(sizes.layers))


def rest_s(sizes: ModelSizes, profile: MachineProfile, context: int, batch: int = 1) -> float:
    """Seconds that a decode step spends outside routed experts."""
    dense_s = profile.work_s(sizes.dense_weights, sizes.dense_codec, batch) / profile.workers
    states_s = batch * context * sizes.state_bytes / profile.multiply_bytes_s["raw"]
    return dense_s + states_s + sizes.layers * profile.layer_s + profile.token_s


def prompt_rest_s(sizes: ModelSizes, profile: MachineProfile, tokens: int) -> float:
    """Seconds that a prompt spends outside routed experts."""
    body = sizes.dense_weights - sizes.head_weights
    work_s = profile.work_s(body, sizes.dense_codec, tokens)
    work_s += profile.work_s(sizes.head_weights, sizes.dense_codec)
    return work_s / profile.workers + sizes.layers * profile.layer_s + profile.token_s


def _tpot(
    sizes: ModelSizes, profile: MachineProfile, layer: tuple[float, float], workload: Workload
) -> Forecast:
    mean, deviation = layer
    seconds = sizes.layers * mean
    seconds += rest_s(sizes, profile, workload.prompt_tokens, workload.batch)
    swing = _DECILE * deviation * sizes.layers**0.5
    low = max(0.0, seconds - swing) * (1 - profile.spread)
    return Forecast(seconds, low, (seconds + swing) * (1 + profile.spread))


def forecast_prompt(
    sizes: ModelSizes, profile: MachineProfile, token: RankLaw, tokens: int
) -> Forecast:
    """Forecast a prompt on a cold cache: each needed expert is read once, and layers overlap."""
    needed = float((1 - (1 - token.inclusion) ** tokens).sum())
    task = expert_task(sizes, profile, Tier.ABSENT, tokens * sizes.top_k / needed)
    one = flow(task, profile.workers)
    each_s = prompt_rest_s(sizes, profile, tokens) / sizes.layers
    seconds = Flow(0.0, each_s, each_s).then(one.times(needed)).times(sizes.layers).span_s
    return Forecast(seconds, seconds * (1 - profile.spread), seconds * (1 + profile.spread))


def _reason(model: LayerModel, split: TierSplit, share: int) -> str:
    """Say in a sentence what the split gains over the memory spent on one tier alone."""
    sizes = model.sizes
    chosen = model.makespan(split)[0]
    if split.compressed + split.full == sizes.experts:
        return f"all {sizes.experts} experts of a layer fit ({split}), so each is read only once"
    others = []
    for tier in sizes.tiers:
        alone = filled_split(sizes, [share * (other is tier) for other in HELD], share)
        if alone != split and alone.tiers:
            slower = model.makespan(alone)[0] / chosen - 1
            others.append(f"{sum(alone.pools)} {tier.value} alone {slower:+.1%}")
    limit = "drive" if model.waits_for_drive(split) else "workers"
    said = f"{split} of {sizes.experts} experts of a layer, where a step waits for the {limit}"
    return said + (f"; in the same memory {', '.join(others)}" if others else "")
