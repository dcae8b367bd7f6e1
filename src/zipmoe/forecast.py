"""Sizes, a machine's rates and routing → what a run should take, and what it took beside that.

A run is replayed from its cold or warm beginning: synthetic routing of as many tokens goes through
the cache's own policy, and the planner says what each step's hits and misses cost. Nothing is
measured here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from zipmoe import hardware
from zipmoe._rank_model import fit_law
from zipmoe._synthetic_routing import Routing, synthetic_trace, typical_popularity
from zipmoe.plan import LayerModel, TierSplit, expert_task, prompt_rest_s, rest_s
from zipmoe.rates import machine_profile
from zipmoe.replay import Replayer
from zipmoe.schedule import Flow, Tier, flow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zipmoe.plan import ModelSizes
    from zipmoe.rates import MachineProfile
    from zipmoe.replay import Replay
    from zipmoe.routing import Trace

__all__ = ["LEAST_TOKENS", "Forecaster", "RunForecast", "engine_sizes", "scaled_rates"]

ENGINE_TIERS = (Tier.COMPRESSED,)  # what the expert cache can hold
LEAST_TOKENS = 8  # of a run whose times are worth remembering
_MOST_REPLAYED = 128  # tokens: longer prompts and answers are as these
_HELD = TierSplit(compressed=1)  # any split of this one tier has the same table of times


@dataclass(frozen=True)
class RunForecast:
    """What a run should take."""

    ttft_s: float
    tpot_s: float
    hit_rate: float
    bytes_per_token: float
    is_cold: bool  # nothing was in memory when it began


def engine_sizes(sizes: ModelSizes) -> ModelSizes:
    """Let the planner give memory only to tiers that the engine has."""
    return replace(sizes, held=ENGINE_TIERS)


def scaled_rates(measured: hardware.Profile, sizes: ModelSizes, identity: str) -> MachineProfile:
    """Fill in what a profile does not say: from observed runs of a store, or by an estimate."""
    rates = machine_profile(measured)
    observed_s = hardware.known_work(identity)
    return rates if observed_s is None else rates.scaled(observed_s / work_s(sizes, rates))


def work_s(sizes: ModelSizes, rates: MachineProfile) -> float:
    """Seconds of a token that finds all of its experts in memory."""
    one = flow(expert_task(sizes, rates, Tier.COMPRESSED), rates.workers)
    return sizes.layers * one.times(sizes.top_k).span_s + rest_s(sizes, rates, 0)


class Forecaster:
    """Forecasts runs of one store on one machine."""

    def __init__(
        self, sizes: ModelSizes, rates: MachineProfile, *, slots: int, policy: str
    ) -> None:
        self.sizes, self.rates, self.slots, self.policy = sizes, rates, slots, policy
        law = fit_law(typical_popularity(sizes.experts, sizes.top_k).inclusion)
        self._model = LayerModel(engine_sizes(sizes), rates, law)

    def run(self, prompt_tokens: int, tokens: int, *, is_cold: bool = True) -> RunForecast:
        """Forecast a prompt and an answer of so many tokens; not cold: another came before."""
        trace = _typical_run(
            self.sizes.experts,
            self.sizes.layers,
            self.sizes.top_k,
            *(min(count, _MOST_REPLAYED) for count in (prompt_tokens, max(tokens, 2))),
            requests=1 if is_cold else 2,
        )
        return self.replay(trace, prompt_tokens, is_cold=is_cold)

    def replay(self, trace: Trace, prompt_tokens: int, *, is_cold: bool = False) -> RunForecast:
        """Forecast the last request of a trace, whose prompt has so many tokens."""
        replayer = Replayer(trace)
        found = replayer.run(self.policy, self.slots)
        begins = int(np.flatnonzero(~replayer.is_decode).max())
        decode = np.arange(len(found.hits)) > begins
        tpot_s, hit_rate, read = self.decoding(found, decode, prompt_tokens)
        ttft_s = self._prompt_s(found.hits[begins], found.misses[begins], prompt_tokens)
        return RunForecast(ttft_s, tpot_s, hit_rate, read, is_cold)

    def decoding(
        self, found: Replay, steps: NDArray[np.bool_], context: int
    ) -> tuple[float, float, float]:
        """Say of some replayed steps: seconds of one, part of experts in memory, bytes read."""
        hits, misses = (x[steps].astype(np.int64) for x in (found.hits, found.misses))
        times = self._model.times(_HELD, [hits], hits + misses).sum(axis=1)
        seconds = float(times.mean()) + rest_s(self.sizes, self.rates, context)
        read = float(misses.sum(axis=1).mean()) * self.sizes.missing_bytes(Tier.ABSENT)
        return seconds, float(hits.sum() / (hits.sum() + misses.sum())), read

    def _prompt_s(self, hits: Any, misses: Any, tokens: int) -> float:
        """Seconds of a prompt, whose layers overlap."""
        whole = Flow()
        each_s = prompt_rest_s(self.sizes, self.rates, tokens)
        each_s /= self.sizes.layers
        for held, absent in zip(hits.tolist(), misses.tolist(), strict=True):
            share = tokens * self.sizes.top_k / max(held + absent, 1)
            there, read = (
                flow(expert_task(self.sizes, self.rates, tier, share), self.rates.workers)
                for tier in (Tier.COMPRESSED, Tier.ABSENT)
            )
            layer = there.times(held).then(read.times(absent))
            whole = whole.then(Flow(0.0, each_s, each_s)).then(layer)
        return whole.span_s


@lru_cache(maxsize=8)
def _typical_run(
    experts: int, layers: int, top_k: int, prompt: int, tokens: int, *, requests: int
) -> Trace:
    sizes = Routing(experts, layers, top_k, requests, prompt_tokens=prompt, decode_tokens=tokens)
    return synthetic_trace(sizes, seed=0)
