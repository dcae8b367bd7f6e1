"""Replay of traces, what it costs, what a trace is said to contain, and the commands for both."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from zipmoe import _core, hardware
from zipmoe._errors import TraceError
from zipmoe._rank_model import fit_law
from zipmoe._synthetic_routing import Routing, synthetic_trace
from zipmoe.bench import BITS, bench_policies, expert_sizes
from zipmoe.cli import app
from zipmoe.hardware import DECODED, MULTIPLIED, CoreRates, Drive, Profile, Rate
from zipmoe.plan import LayerModel, TierSplit
from zipmoe.rates import TYPICAL, MachineProfile
from zipmoe.replay import Replayer
from zipmoe.routing import Trace, by_recency, save_trace
from zipmoe.schedule import Tier
from zipmoe.trace import summarize

SIZES = Routing(
    num_experts=16, num_layers=3, top_k=2, num_requests=5, prompt_tokens=6, decode_tokens=20
)
PROFILE = TYPICAL
WEIGHTS = 3 * 1024 * 512


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(SIZES, seed=7)


@pytest.fixture(scope="module")
def replayer(trace):
    return Replayer(trace)


def layer_model(trace, codec="rank223", profile=PROFILE):
    law = fit_law(by_recency(trace).inclusion)
    return LayerModel(expert_sizes(trace, WEIGHTS, codec), profile, law)


def test_requests_that_run_together_begin_with_their_share(monkeypatch):
    told = []

    def replay(*arrays, **options):
        told.extend(arrays[1:])
        return {"hits": np.zeros((4, 1)), "misses": np.zeros((4, 1)), "evictions": 0}

    monkeypatch.setattr(_core, "replay", replay)
    together = Trace(
        8,
        np.arange(9).reshape(9, 1, 1) % 8,
        step=np.array([0, 1, 1, 2, 2, 3, 3]),
        request=np.array([4, 4, 9, 4, 9, 4, 9]),
        tokens=np.array([2, 1, 2, 1, 1, 1, 1]),
    )
    replayer = Replayer(together)
    replayer.run("lru", 2)
    tokens, begins = told
    assert tokens.tolist() == [2, 3, 2, 2]
    assert begins.tolist() == [1, 0.5, 0, 0]
    assert replayer.is_decode.tolist() == [False, False, True, True]


def test_a_trace_without_decode_cannot_be_replayed(trace):
    first = trace.of([0])
    prompt = Trace(16, first.experts[:6], first.step[:1], first.request[:1], first.tokens[:1])
    with pytest.raises(TraceError, match="no decode step"):
        Replayer(prompt)


def test_one_tier_costs_what_its_misses_read(trace, replayer):
    model = layer_model(trace)
    size = model.sizes.missing_bytes(Tier.ABSENT)
    cost = replayer.cost("lru", TierSplit(compressed=5), model)
    found = replayer.run("lru", 15)
    decode = replayer.is_decode
    assert cost.read_bytes == found.misses.sum() * size
    assert cost.decode_read_bytes == pytest.approx(found.misses[decode].sum() * size / decode.sum())
    hits, misses = found.hits[decode].sum(), found.misses[decode].sum()
    assert cost.hit_rate == pytest.approx(hits / (hits + misses))


def test_where_only_the_drive_takes_time_a_step_takes_what_it_reads(trace, replayer):
    idle = MachineProfile(2, 1e9, {"raw": 1e18, "rank223": 1e18}, {}, 1e18)
    for split in (TierSplit(compressed=4), TierSplit(compressed=2, sign_mantissa=5)):
        cost = replayer.cost("request", split, layer_model(trace, profile=idle))
        assert cost.decode_s == pytest.approx(cost.decode_read_bytes / 1e9, rel=1e-6)


def test_tiers_are_nested_pools(trace, replayer):
    split = TierSplit(full=2, compressed=3, sign_mantissa=4, exponents=5)
    for policy in ("request", "lru", "lfu", "belady", "fifo", "marking"):
        parts = list(replayer.hits(policy, split))
        assert len(parts) == 4
        assert min(part.min() for part in parts) >= 0
        if policy not in {"fifo", "marking"}:
            assert np.array_equal(sum(parts), replayer.run(policy, 3 * 14).hits)
    model = layer_model(trace)
    few = replayer.cost("lru", TierSplit(compressed=5), model)
    more = replayer.cost("lru", TierSplit(compressed=5, sign_mantissa=5), model)
    assert more.hit_rate == few.hit_rate
    assert more.read_bytes < few.read_bytes
    none = replayer.cost("lru", TierSplit(exponents=16), model)
    assert none.hit_rate == 0


@pytest.mark.parametrize("codec", BITS)
def test_every_codec_is_compared_in_the_splits_that_it_has(trace, codec):
    sizes = expert_sizes(trace, WEIGHTS, codec)
    bits = 8 * sizes.missing_bytes(Tier.ABSENT) / WEIGHTS
    assert bits == pytest.approx(BITS[codec], abs=0.01)
    memory = 3 * 8 * 2 * WEIGHTS
    found = bench_policies(trace, sizes, PROFILE, memory)
    assert len(found.splits) >= (1 if codec == "raw" else 4)
    for split in found.splits:
        assert 3 * split.resident_bytes(sizes) <= memory
        best, lru = (found.of(name, split) for name in ("belady", "lru"))
        assert best.read_bytes <= lru.read_bytes
        assert found.against(lru, "lru") == 1
        for name in _core.policies():
            assert found.of(name, split).read_bytes >= best.read_bytes


def test_memory_for_less_than_an_expert_of_each_layer_is_refused(trace):
    with pytest.raises(ValueError, match="no room"):
        bench_policies(trace, expert_sizes(trace, WEIGHTS, "rank3"), PROFILE, 1000)


def test_the_default_reads_at_most_nine_tenths_of_what_lru_reads():
    # The goal of the replacement, on synthetic routing with the statistics of trained models.
    for shape in ((60, 8, 4), (64, 8, 6)):
        experts, layers, k = shape
        made = synthetic_trace(
            Routing(experts, layers, k, num_requests=8, prompt_tokens=64, decode_tokens=96), seed=3
        )
        replayer = Replayer(made)
        for share in (0.3, 0.5):
            slots = round(share * experts * layers)
            ours, lru = (replayer.run(name, slots).misses.sum() for name in ("request", "lru"))
            assert ours <= 0.9 * lru


def test_a_summary_says_what_is_in_a_trace():
    # Two requests, one layer of four experts: a prompt of two tokens, then three single ones.
    experts = [[0], [1], [1], [1], [0], [2], [3], [3], [3], [3]]
    made = Trace(
        4,
        np.array(experts)[:, None],
        step=np.arange(8),
        request=np.repeat([0, 1], 4),
        tokens=np.array([2, 1, 1, 1, 2, 1, 1, 1]),
    )
    found = summarize(made)
    assert (found.layers, found.experts, found.top_k) == (1, 4, 1)
    assert (found.requests, found.steps) == (2, 8)
    assert (found.prompt_tokens, found.decode_tokens) == (4, 6)
    assert found.distinct == 1.5  # 1 and 0; 3
    assert found.over_all[1] == pytest.approx(3 / 6)  # the most popular of four
    assert found.over_all[2] == pytest.approx(5 / 6)
    assert found.in_hindsight[2] == 1
    assert found.by_recency[1:] == (0.5, 1)  # 1, 0 and 3 come once at the second place
    assert found.reuse_distance == (0, 0, 1)
    alone = summarize(made.of([0]))
    assert alone.on_other_requests is None


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def file(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "t.npz"
    save_trace(trace, path)
    return path


def test_trace_show_prints_the_summary(trace, file):
    result = run("trace", "show", file)
    assert result.exit_code == 0, result.output
    assert "3 layers of 16 experts, 2 chosen" in result.stdout
    assert json.loads(run("trace", "show", file, "--json").stdout)["decode_tokens"] == 100


def test_bench_policy_prints_every_policy_for_every_split(trace, file):
    words = ("bench", "policy", "--trace", file, "--slots", 15, "--weights", WEIGHTS)
    result = run(*words)
    assert result.exit_code == 0, result.output
    document = json.loads(run(*words, "--json").stdout)
    for row in document["policies"]:
        assert row["policy"] in result.stdout
        assert f"a layer holds {row['split']}" in result.stdout
    compressed = [row for row in document["policies"] if row["split"] == "5 compressed"]
    assert [row["policy"] for row in compressed] == _core.policies()
    lru = next(row for row in compressed if row["policy"] == "lru")
    assert lru["hit_rate"] == pytest.approx(
        Replayer(trace).cost("lru", TierSplit(compressed=5), layer_model(trace)).hit_rate
    )
    assert lru["over_lru"] == 1
    assert lru["over_belady"] > 1


def test_bench_policy_takes_the_rates_of_a_store_s_drive(file, tmp_path, monkeypatch):
    rates = Rate(1e18, 1e18, 1e18)
    codecs = dict.fromkeys((*MULTIPLIED, *DECODED), rates)
    drive = Drive("pread", 1 << 20, 8, Rate(1e6, 1e6, 1e6))
    found = Profile(CoreRates("portable", 2, codecs, codecs, rates), drive)
    monkeypatch.setattr(hardware, "profile", lambda folder: found if folder == tmp_path else None)
    result = run("bench", "policy", "--trace", file, "--slots", 15, "--store", tmp_path, "--json")
    for row in json.loads(result.stdout)["policies"]:
        assert row["decode_s"] == pytest.approx(row["decode_read_bytes"] / 1e6)


def test_bench_policy_needs_no_trace_and_refuses_what_it_cannot_do(file, tmp_path):
    made = run("bench", "policy", "--synthetic", "2x8x2", "--memory", "60MB", "--json")
    assert json.loads(made.stdout)["memory_bytes"] == 60_000_000
    for words, code in [
        (("--synthetic", "2x8"), 2),
        (("--synthetic", "2x8x0"), 2),
        (("--trace", file, "--memory", "1MB"), 2),
        (("--memory", "much"), 2),
        (("--trace", tmp_path / "none.npz"), 1),
    ]:
        assert run("bench", "policy", *words).exit_code == code, words
