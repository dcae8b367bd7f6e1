"""A routing trace → hits and misses of each policy, and what they cost on a machine.

The core replays (`_core.replay`): the bookkeeping is that of the expert cache itself, one pool of
slots for all layers, with reads that are over at once. Several tiers are seen as nested pools: the
experts of the first ones are those that fewer slots would hold. That is exact for policies that
rank experts without regard to what is held, as all do here but FIFO and marking.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from zipmoe import _core
from zipmoe._errors import TraceError
from zipmoe.schedule import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from zipmoe.plan import LayerModel, TierSplit
    from zipmoe.routing import Trace

__all__ = ["OFFLINE", "Replay", "Replayer", "policies"]

OFFLINE = {"static": "best static set, in hindsight", "belady": "optimum, told the future"}
"""Policies that no running cache can have, and what they are here."""


def policies() -> list[str]:
    """Name all policies: first the default, last those that are told the future."""
    return _core.policies()


@dataclass(frozen=True, eq=False)
class Replay:
    """What a policy did with some slots."""

    policy: str
    slots: int
    hits: NDArray[np.uint32]  # [steps, layers]
    misses: NDArray[np.uint32]
    evictions: int


class Replayer:
    """A trace, ready to be replayed; remembers what it has replayed."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        starts = np.flatnonzero(np.diff(trace.step, prepend=-1))
        runs = np.diff(starts, append=len(trace.step))
        fresh = np.zeros(len(trace.step))
        fresh[np.unique(trace.request, return_index=True)[1]] = 1
        self._experts = np.ascontiguousarray(trace.experts, np.uint32)
        self._tokens = np.add.reduceat(trace.tokens, starts).astype(np.uint32)
        self._begins = np.add.reduceat(fresh, starts) / runs
        self.is_decode = np.logical_and.reduceat(trace.is_decode, starts)
        self._known: dict[tuple[str, int], Replay] = {}
        if not self.is_decode.any():
            raise TraceError("the trace has no decode step")

    @property
    def most_slots(self) -> int:
        """Slots that hold all experts."""
        return self.trace.num_layers * self.trace.num_experts

    @cached_property
    def uses(self) -> NDArray[np.float64]:
        """[layers, experts]: passes that use an expert."""
        counts = np.zeros((self.trace.num_layers, self.trace.num_experts))
        for step in self.trace.steps():
            for layer in range(self.trace.num_layers):
                counts[layer, step.activated(layer)[0]] += 1
        return counts

    def run(self, policy: str, slots: int) -> Replay:
        """Replay it.

        Raises
        ------
        ValueError
            There is no such policy, or no slot.
        """
        slots = min(slots, self.most_slots)
        if (policy, slots) not in self._known:
            popularity = self.uses.reshape(-1) if policy == "static" else np.zeros(0)
            found = _core.replay(
                self._experts,
                self._tokens,
                self._begins,
                num_experts=self.trace.num_experts,
                policy=policy,
                slots=slots,
                popularity=popularity,
            )
            self._known[policy, slots] = Replay(policy, slots, **found)
        return self._known[policy, slots]

    def hits(self, policy: str, split: TierSplit) -> Iterator[NDArray[np.int64]]:
        """Yield the hits [steps, layers] of each tier that the split uses."""
        layers = self.trace.num_layers
        slots = [layers * int(count) for count in np.cumsum([0, *filter(None, split.pools)])]
        total = [self.run(policy, count).hits.astype(np.int64) for count in slots[1:]]
        total.insert(0, np.zeros((len(self._tokens), layers), np.int64))
        # FIFO may hit with fewer slots what it misses with more.
        reached = np.maximum.accumulate(np.stack(total))
        for fewer, more in pairwise(reached):
            yield more - fewer

    def cost(self, policy: str, split: TierSplit, model: LayerModel) -> Cost:
        """Say what a policy costs with the tiers of a split."""
        hits = list(self.hits(policy, split))
        everything = self.run(policy, self.most_slots)
        activated = (everything.hits + everything.misses).astype(np.int64)
        held = dict(zip(split.tiers, hits, strict=True))
        absent = activated - np.sum(hits, axis=0)
        read = absent * model.sizes.missing_bytes(Tier.ABSENT)
        whole = np.zeros_like(read)
        for tier, count in held.items():
            read = read + count * model.sizes.missing_bytes(tier)
            whole = whole + (count if tier in {Tier.FULL, Tier.COMPRESSED} else 0)
        decode = self.is_decode
        times = model.times(split, [count[decode] for count in hits], activated[decode])
        return Cost(
            policy=policy,
            split=split,
            hit_rate=float(whole[decode].sum() / activated[decode].sum()),
            read_bytes=int(read.sum()),
            decode_read_bytes=float(read[decode].sum() / decode.sum()),
            decode_s=float(times.sum(axis=1).mean()),
        )


@dataclass(frozen=True)
class Cost:
    """What a policy costs with a split of the memory."""

    policy: str
    split: TierSplit
    hit_rate: float  # of decode: part of the activated experts of which nothing is read
    read_bytes: int  # by the whole trace, prompts too
    decode_read_bytes: float  # by a decode step
    decode_s: float  # of a decode step, in experts alone
