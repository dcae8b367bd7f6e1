"""Tiers of the expert cache: parts of experts in one capacity, the same bits from all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_shards import CODEC_IDS, flip_bit, make_shards

from zipmoe import _core
from zipmoe._errors import BudgetError, CorruptError

CODED = [codec for codec in CODEC_IDS if codec != "raw"]
LAYERS, EXPERTS = 2, 6
# Full, compressed, sign-mantissas alone, exponents alone.
SPLITS = [
    (0, 4, 0, 0),
    (0, 2, 3, 0),
    (0, 2, 0, 4),
    (0, 0, 5, 0),
    (0, 0, 0, 5),
    (3, 2, 0, 0),
    (2, 2, 3, 0),
    (2, 3, 0, 2),
    (5, 0, 0, 0),
    (1, 12, 0, 0),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Shards of every codec."""
    return {
        codec: make_shards(tmp_path_factory.mktemp(codec), codec=codec, experts=EXPERTS)
        for codec in CODED
    }


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("codec", CODED)
def test_every_split_gives_every_weight(stores, codec, split):
    shards = stores[codec]
    cache = shards.open(tiers=split)
    assert cache.tiers == effective(split)
    rng = np.random.default_rng(3)
    keys = sorted(shards.weights)
    for i in rng.integers(0, len(keys), 120):
        shards.check(cache, *keys[i])
    cache.close()


def effective(split):
    """What a split comes to: two slots at least, and whole experts where both planes could be."""
    full, compressed, first, second = split
    if first or second:
        first, second = max(2, compressed + first), max(2, compressed + second)
        whole = min(first, second)
        return [full, whole, first - whole, second - whole]
    return [full, max(2, compressed), 0, 0]


class Model:
    """A least-recently-used cache of each plane, with room for some experts."""

    def __init__(self, split):
        _, whole, first, second = effective(split)
        self.room = (whole + first, whole + second)
        self.held = ({}, {})  # a dict remembers the order of insertion
        self.counts = dict.fromkeys(
            ("hits", "sign_mantissa_hits", "exponent_hits", "bytes_read", "evictions", "demotions"),
            0,
        )

    def visit(self, key, plane_bytes):
        there = [key in held for held in self.held]
        if all(there):
            self.counts["hits"] += 1
        elif any(there):
            self.counts[("sign_mantissa_hits", "exponent_hits")[there.index(True)]] += 1
        for plane in (0, 1):
            held, other = self.held[plane], self.held[1 - plane]
            if there[plane]:
                del held[key]
            else:
                self.counts["bytes_read"] += plane_bytes[plane]
                if len(held) == self.room[plane]:
                    gone = next(iter(held))
                    del held[gone]
                    self.counts["demotions" if gone in other else "evictions"] += 1
            held[key] = True


@given(
    split=st.sampled_from([split for split in SPLITS if split[0] == 0 and any(split[2:])]),
    uses=st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), max_size=60),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_planes_leave_in_the_order_of_their_experts_last_use(shards, split, uses):
    cache = shards.open(tiers=split, policy="lru")
    model = Model(split)
    for key in uses:
        shards.check_expert(cache, *key)
        model.visit(key, shards.planes(*key))
    counters = cache.counters()
    assert {name: counters[name] for name in model.counts} == model.counts
    assert counters["hits"] + counters["misses"] == len(uses)
    cache.close()


def routing(rng, passes):
    """[passes, layers, k]: skewed choices, each token's different."""
    scores = rng.gumbel(size=(passes, LAYERS, EXPERTS)) + np.linspace(2, 0, EXPERTS)
    return np.argsort(-scores, axis=2)[:, :, :2].astype(np.uint32)


@pytest.mark.parametrize("policy", ["request", "lru", "lfu"])
@pytest.mark.parametrize("split", [(0, 4, 4, 0), (0, 3, 0, 5), (0, 2, 3, 3)], ids=str)
def test_hits_of_each_tier_are_those_of_the_replay(shards, split, policy):
    # As `zipmoe.replay` sees a split: the first tier is what fewer slots would hold.
    chosen = routing(np.random.default_rng(5), 80)
    _, whole, first, second = effective(split)

    def hits(slots):
        found = _core.replay(
            chosen,
            np.ones(len(chosen), np.uint32),
            np.zeros(len(chosen)),
            num_experts=EXPERTS,
            policy=policy,
            slots=slots,
            popularity=np.zeros(0),
        )
        return int(found["hits"].sum())

    cache = shards.open(tiers=split, policy=policy)
    for step in chosen:
        for layer, experts in enumerate(step):
            cache.prefetch(layer, sorted(experts.tolist()))
            for expert in sorted(experts.tolist()):
                shards.check_expert(cache, layer, expert)
    counters = cache.counters()
    assert counters["hits"] == hits(whole) > 0
    partial = hits(whole + first + second) - hits(whole)
    assert counters["sign_mantissa_hits"] + counters["exponent_hits"] == partial
    assert (counters["sign_mantissa_hits"] > 0) == (first > 0)
    assert (counters["exponent_hits"] > 0) == (second > 0)
    cache.close()


def test_what_is_missing_is_read_alone(shards):
    for split, plane in (((0, 2, 10, 0), 1), ((0, 2, 0, 10), 0)):
        cache = shards.open(tiers=split, policy="lru")
        for expert in (0, 1, 2):
            shards.check_expert(cache, 0, expert)
        before = cache.counters()["bytes_read"]
        shards.check_expert(cache, 0, 0)
        assert cache.counters()["bytes_read"] - before == shards.planes(0, 0)[plane]
        cache.close()


def test_a_prefetch_reads_what_is_missing_and_keeps_what_is_there(shards):
    cache = shards.open(tiers=(0, 3, 9, 0), policy="lru")
    for expert in range(6):
        shards.check_expert(cache, 0, expert)
    for _ in range(20):
        cache.prefetch(0, [0, 1, 2, 3, 4, 5])  # exponents of three at a time
        for expert in range(6):
            shards.check_expert(cache, 0, expert)
    signs = sum(shards.planes(0, expert)[0] for expert in range(6))
    exponents = sum(shards.planes(0, expert)[1] for expert in range(6))
    assert cache.counters()["bytes_read"] <= signs + 21 * exponents
    assert cache.counters()["evictions"] == 0
    cache.close()


@pytest.mark.parametrize("codec", CODED)
def test_experts_that_stay_decoded_are_read_and_decoded_once(stores, codec):
    shards = stores[codec]
    cache = shards.open(tiers=(3, 2, 0, 0))
    for _ in range(5):
        for expert in (0, 1, 2):
            cache.prefetch(0, [expert])
            shards.check_expert(cache, 0, expert)
    counters = cache.counters()
    assert (counters["promotions"], counters["full_hits"], counters["misses"]) == (3, 12, 3)
    assert counters["bytes_read"] == sum(shards.record(0, expert)[2] for expert in (0, 1, 2))
    cache.close()


def test_who_is_worth_more_takes_the_place_of_a_decoded_expert(shards):
    cache = shards.open(tiers=(1, 3, 0, 0), policy="lfu")
    shards.check_expert(cache, 0, 0)
    shards.check_expert(cache, 0, 1)  # as often used, and no more
    assert cache.counters()["promotions"] == 1
    shards.check_expert(cache, 0, 1)
    counters = cache.counters()
    assert (counters["promotions"], counters["evictions"]) == (2, 1)  # expert 0 is gone
    shards.check_expert(cache, 0, 1)
    assert cache.counters()["full_hits"] == 1
    shards.check_expert(cache, 0, 0)
    assert cache.counters()["misses"] == 3
    cache.close()


@pytest.mark.parametrize("plane", [0, 1])
@pytest.mark.parametrize("reader", ["io_uring", "pread"])
def test_a_flipped_bit_in_a_plane_that_is_read_alone_names_its_place(tmp_path, reader, plane):
    shards = make_shards(tmp_path, experts=4)
    split = (0, 2, 0, 6) if plane == 0 else (0, 2, 6, 0)
    for matrix in (0, 1, 2):
        cache = shards.open(tiers=split, reader=reader, policy="lru")
        for expert in (2, 0, 1):  # leaves one plane of expert 2
            shards.check_expert(cache, 1, expert)
        row = shards.row(1, 2, matrix)
        offset = int(row[10 + 3 * plane])
        flip_bit(shards.paths[1], offset + 5, 3)
        for _ in range(2):
            out = np.full_like(shards.weights[1, 2, matrix], 123)
            with pytest.raises(CorruptError, match=f"matrix {matrix} ") as error:
                cache.decode(1, 2, matrix, out)
            found = error.value
            assert (found.file, found.layer, found.expert) == (shards.paths[1], 1, 2)
            assert (found.plane, found.offset) == (("sign-mantissa", "exponent")[plane], offset)
            assert (out == 123).all()
        assert cache.counters()["read_errors"] == 4  # each read was tried twice
        flip_bit(shards.paths[1], offset + 5, 3)
        for expert in (2, 0, 1, 3, 2):
            shards.check_expert(cache, 1, expert)
        cache.close()


def test_verified_planes_that_are_no_coding_leave_no_decoded_expert(tmp_path):
    shards = make_shards(tmp_path, layers=1, experts=3)
    row = shards.row(0, 1, 2)
    offset, length = int(row[13]), int(row[14])
    padded = bytes([255]) * length + bytes(-length % 4096)
    with Path(shards.paths[0]).open("r+b") as file:
        file.seek(offset)
        file.write(padded)
    row[15] = _core.xxh3(padded)
    cache = shards.open(tiers=(3, 2, 0, 0))
    for _ in range(3):
        with pytest.raises(CorruptError, match=r"matrix 2 \(down\)") as error:
            cache.decode(0, 1, 0, np.zeros_like(shards.weights[0, 1, 0]))
        assert (error.value.expert, error.value.plane) == (1, "exponent")
        for expert in (0, 2):
            shards.check_expert(cache, 0, expert)
    assert cache.counters()["promotions"] == 2
    cache.close()


def test_tiers_take_what_they_are_said_to_take(shards):
    base, *each = _core.ExpertCache.tier_bytes(shards.table)
    assert each[1] == each[2] + each[3]
    for split in SPLITS:
        cache = shards.open(tiers=split)
        taken = sum(n * size for n, size in zip(cache.tiers, each, strict=True))
        assert taken < cache.allocated_bytes <= base + taken
        least = cache.allocated_bytes
        cache.close()
        shards.open(tiers=split, capacity_bytes=max(least, shards.capacity(2))).close()
        if least > shards.capacity(2):
            with pytest.raises(BudgetError, match="these tiers need") as error:
                shards.open(tiers=split, capacity_bytes=least - 1)
            assert error.value.floor_bytes == least


def test_more_than_there_is_is_not_held(shards):
    cache = shards.open(tiers=(99, 99, 99, 99))
    assert cache.tiers == [12, 12, 0, 0]
    cache.close()


def test_raw_experts_have_one_tier(tmp_path):
    shards = make_shards(tmp_path, layers=1, experts=3, codec="raw")
    for split in ((1, 2, 0, 0), (0, 2, 1, 0), (0, 2, 0, 1)):
        with pytest.raises(ValueError, match="stored raw"):
            shards.open(tiers=split)
    cache = shards.open(tiers=(0, 2, 0, 0))
    for expert in (0, 1, 2, 0):
        shards.check_expert(cache, 0, expert)
    cache.close()
