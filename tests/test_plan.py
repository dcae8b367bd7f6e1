"""The planner: its arithmetic against enumeration and simulation, its choices in clear cases."""

from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest

from zipmoe._rank_model import fit_law
from zipmoe._synthetic_routing import Routing, synthetic_trace, typical_popularity
from zipmoe.budget import MemoryReport
from zipmoe.plan import (
    HELD,
    LayerModel,
    ModelSizes,
    PartSize,
    TierSplit,
    Workload,
    candidate_splits,
    expert_task,
    plan_cache,
)
from zipmoe.rates import MachineProfile
from zipmoe.routing import Popularity, by_recency, recency_ranks
from zipmoe.schedule import Tier, by_johnson, in_sequence, simulate

WEIGHTS = 2048 * 1408
MACHINE = MachineProfile(
    workers=2,
    read_bytes_s=2.8e9,
    multiply_bytes_s={"raw": 30e9, "rank3": 37e9, "rank223": 36e9},
    decode_bytes_s={"zstd": 1.8e9, "lz4hc": 3e9},
    flops=200e9,
    layer_s=0.001,
)
TYPICAL = typical_popularity(60, 4)
EXPONENT_BYTES = {"rank223": 0.34, "zstd": 0.36, "lz4hc": 0.49}


def model(codec="rank223", experts=60, top_k=4):
    """Eight layers of experts as large as Qwen1.5-MoE's."""
    raw = codec == "raw"
    parts = [
        PartSize(n, n * (1 + raw), 0 if raw else int(EXPONENT_BYTES[codec] * n))
        for n in (2 * WEIGHTS, WEIGHTS)
    ]
    return ModelSizes(8, experts, top_k, tuple(parts), codec, 500_000_000, "rank3")


def memory(sizes, share):
    """A cache of this share of all experts in BF16."""
    cache = int(share * sizes.layers * sizes.experts * sizes.resident_bytes(Tier.FULL))
    return MemoryReport(promised=cache, base=0, dense=0, kv=0, scratch=0, cache=cache)


def curve(experts, k, seed=1):
    return np.sort(np.random.default_rng(seed).dirichlet(np.full(experts, 2.0)))[::-1] * k


def planned(codec="rank223", share=0.5, machine=MACHINE, **workload):
    sizes = model(codec)
    return plan_cache(sizes, machine, TYPICAL, memory(sizes, share), Workload(**workload))


SPLITS = [TierSplit(1, 1, 1, 1), TierSplit(0, 3, 0, 2), TierSplit(), TierSplit(full=6)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("codec", ["rank223", "zstd"])
def test_the_expected_makespan_is_that_of_simulating_every_set(split, codec):
    sizes, machine = model(codec, experts=6, top_k=2), replace(MACHINE, workers=1)
    law = fit_law(curve(6, 2))
    tier_of = [tier for tier, n in zip(HELD, split.pools, strict=True) for _ in range(n)]
    tier_of += [Tier.ABSENT] * (6 - len(tier_of))
    odds = law.coins / (1 - law.coins)
    weights, times, unread, read = [], [], [], []
    for chosen in combinations(range(6), 2):
        tasks = [expert_task(sizes, machine, tier_of[rank]) for rank in chosen]
        times.append(simulate(tasks, by_johnson(tasks, 1), 1).makespan_s)
        weights.append(np.prod(odds[list(chosen)]))
        unread.append(np.mean([task.read_s == 0 for task in tasks]))
        read.append(sum(task.read_s for task in tasks) * machine.read_bytes_s)
    weights = np.array(weights) / sum(weights)
    expected = LayerModel(sizes, machine, law)
    mean, deviation = expected.makespan(split)
    assert mean == pytest.approx(weights @ times)
    assert deviation == pytest.approx((weights @ np.square(times) - mean**2) ** 0.5, abs=1e-9)
    assert expected.hit_rate(split) == pytest.approx(weights @ unread)
    assert expected.read_bytes(split) == pytest.approx(weights @ read)


def test_tables_of_makespans_are_flows_in_johnsons_order():
    sizes = model("zstd", experts=6, top_k=3)
    expected = LayerModel(sizes, MACHINE, fit_law(curve(6, 3)))
    table = expected._table(HELD, 3)
    for hits in product(range(4), repeat=4):
        if sum(hits) <= 3:
            tiers = [tier for tier, n in zip(HELD, hits, strict=True) for _ in range(n)]
            tiers += [Tier.ABSENT] * (3 - sum(hits))
            tasks = [expert_task(sizes, MACHINE, tier) for tier in tiers]
            joined = in_sequence(tasks, by_johnson(tasks, 2), 2).span_s
            assert table[hits] == pytest.approx(joined)


@pytest.mark.parametrize("codec", ["rank223", "zstd", "lz4hc"])
@pytest.mark.parametrize("share", [0.2, 0.45, 0.7])
def test_the_split_is_as_good_as_the_best_of_all(codec, share):
    sizes = model(codec, experts=9, top_k=2)
    popularity = Popularity(curve(9, 2), "made up")
    grant = memory(sizes, share)
    chosen = plan_cache(sizes, MACHINE, popularity, grant).split
    expected = LayerModel(sizes, MACHINE, fit_law(popularity.inclusion))
    room = grant.cache // sizes.layers
    everything = [
        expected.makespan(split)[0]
        for pools in product(range(10), repeat=4)
        if (split := TierSplit(*pools)).resident_bytes(sizes) <= room and sum(pools) <= 9
    ]
    assert expected.makespan(chosen)[0] <= 1.011 * min(everything)


def test_more_memory_is_never_forecast_slower():
    for codec in ("rank223", "zstd", "raw"):
        times = [planned(codec, share).tpot.seconds for share in (0.05, 0.2, 0.4, 0.6, 0.9)]
        assert all(after <= 1.011 * before for before, after in pairwise(times))
        assert times[-1] < 0.7 * times[0]


def test_layers_stay_within_the_cache_and_use_it():
    for codec, share in [
        ("rank223", 0.01),
        ("rank223", 0.123),
        ("rank223", 0.77),
        ("zstd", 0.5),
        ("raw", 0.123),
    ]:
        sizes = model(codec)
        plan = planned(codec, share)
        used = sum(split.resident_bytes(sizes) for split in plan.layers)
        spare = plan.memory.cache - used
        assert spare >= 0
        assert spare < sizes.resident_bytes(Tier.FULL) or sum(plan.split.pools) == 60
        assert all(sum(split.pools) <= sizes.experts for split in plan.layers)


def test_planes_that_are_multiplied_directly_are_held_compressed():
    plan = planned("rank223", 0.3)
    assert plan.split.full == 0
    assert plan.split.compressed > 15
    assert "drive" in plan.reason


def test_where_decoding_takes_longer_than_reading_decoded_experts_are_held():
    assert planned("zstd", 0.5).split.tiers == (Tier.FULL,)


def test_where_reading_takes_longer_compressed_ones_are_held_even_if_they_must_be_decoded():
    slow = replace(MACHINE, read_bytes_s=0.2e9)
    assert Tier.FULL not in planned("zstd", 0.5, slow).split.tiers


def test_uncompressed_stores_have_one_tier():
    assert planned("raw", 0.5).split == TierSplit(compressed=30)


def test_where_all_fits_nothing_is_read():
    plan = planned("rank223", 0.8)
    assert plan.split == TierSplit(compressed=60)
    assert (plan.hit_rate, plan.read_bytes) == (1, 0)
    assert "all 60" in plan.reason
    experts_s = 4 * 3 * 2 * WEIGHTS / 36e9
    assert plan.tpot.seconds == pytest.approx(8 * (experts_s + 0.001) + 2 * 500e6 / 37e9)


def test_forecasts_have_a_band_and_a_reason_of_one_sentence():
    for codec, share in [("rank223", 0.1), ("zstd", 0.5), ("raw", 1.2)]:
        plan = planned(codec, share)
        for forecast in (plan.tpot, plan.ttft):
            assert 0 < forecast.low < forecast.seconds < forecast.high
        assert ". " not in plan.reason
        assert "\n" not in plan.reason


def test_a_batch_reads_an_expert_once_for_all_of_it():
    one, eight = planned(share=0.3), planned(share=0.3, batch=8)
    assert one.read_bytes * 3 < eight.read_bytes < one.read_bytes * 8
    assert eight.tpot.seconds < 8 * one.tpot.seconds


def test_a_prompt_reads_every_expert_once_at_most():
    sizes = model()
    whole = sizes.layers * sizes.experts * sizes.missing_bytes(Tier.ABSENT) / MACHINE.read_bytes_s
    times = [planned(prompt_tokens=tokens).ttft.seconds for tokens in (1, 8, 64, 4096)]
    assert times == sorted(times)
    assert times[0] < whole / 8
    assert 0.9 * whole < times[2] < 1.5 * whole
    assert times[-1] > 2 * times[-2]  # bound by products


def test_popularity_of_another_model_is_refused():
    with pytest.raises(ValueError, match="60"):
        plan_cache(model(), MACHINE, Popularity(curve(64, 4), "other"), memory(model(), 0.5))
    with pytest.raises(ValueError, match="5"):
        plan_cache(model(), MACHINE, Popularity(curve(60, 5), "other"), memory(model(), 0.5))


@pytest.mark.parametrize("codec", ["rank223", "zstd"])
def test_forecasts_of_splits_agree_with_replaying_another_part_of_the_trace(codec):
    sizes = model(codec)
    trace = synthetic_trace(Routing(60, 4, 4, 16, prompt_tokens=32, decode_tokens=64), seed=4)
    known, unknown = trace.split(0.5, seed=1)
    expected = LayerModel(sizes, MACHINE, fit_law(by_recency(known).inclusion))
    ranks = recency_ranks(unknown)
    room = memory(sizes, 0.5).cache // sizes.layers
    splits = list(candidate_splits(expected, room))[::6]
    forecast = np.array([expected.makespan(split)[0] for split in splits])
    replayed = np.array([expected.replay(split, ranks) for split in splits])
    assert np.abs(forecast / replayed - 1).max() < 0.05
    assert (
        np.corrcoef(np.argsort(np.argsort(forecast)), np.argsort(np.argsort(replayed)))[0, 1] > 0.95
    )
    popularity = by_recency(known)
    chosen = plan_cache(sizes, MACHINE, popularity, memory(sizes, 0.5)).split
    assert expected.replay(chosen, ranks) <= 1.03 * replayed.min()
