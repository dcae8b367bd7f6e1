"""Memory that nothing else needs is the cache's, from pass to pass."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import zipmoe
from zipmoe import budget
from zipmoe.budget import Demand, Growth, MemoryReport
from zipmoe.generate import generate
from zipmoe.lending import MARGIN_BYTES, Lending

MB = 1_000_000
REPORT = MemoryReport(
    promised=2000 * MB, base=500 * MB, dense=600 * MB, kv=200 * MB, scratch=300 * MB, cache=400 * MB
)
DEMAND = Demand(states=Growth(linear=MB / 10), forward=Growth(20 * MB, MB / 5), decoded=0)


@dataclass
class Cache:
    filled_bytes: int = 0
    limits: list[int] = field(default_factory=list)

    def limit(self, most):
        self.limits.append(most)
        self.filled_bytes = min(self.filled_bytes, most)
        return most


@dataclass
class Process:
    others: int
    cache: Cache

    def __call__(self):
        return self.others + self.cache.filled_bytes


def lending(others=1000 * MB, capacity=1500 * MB):
    cache = Cache()
    process = Process(others, cache)
    return Lending(cache, capacity, REPORT, DEMAND, resident=process), cache, process


def run(share, tokens, known=0):
    share.begin(tokens, known)
    share.end()


def test_nothing_is_lent_before_a_pass_has_shown_what_the_process_grows_to():
    share, cache, _ = lending()
    run(share, 100)
    assert share.lent == 0
    assert cache.limits == []
    run(share, 1, known=100)
    coming = DEMAND.kv_bytes(357) - DEMAND.kv_bytes(100) + DEMAND.scratch_bytes(1)
    assert share.lent == 2000 * MB - 1000 * MB - coming - MARGIN_BYTES - 400 * MB
    assert cache.limits == [400 * MB + share.lent]


def test_a_long_prompt_takes_back_what_it_needs_and_the_next_token_lends_it_again():
    share, cache, process = lending()
    run(share, 10)
    run(share, 1, known=10)
    before = share.lent
    cache.filled_bytes = 400 * MB + before
    share.begin(1000)
    assert share.lent < before
    assert process() + DEMAND.kv_bytes(1000) + DEMAND.scratch_bytes(1000) <= REPORT.promised
    share.end()
    run(share, 1, known=1000)
    assert share.lent == before


def test_passes_under_way_together_are_counted_together():
    share, _, _ = lending()
    run(share, 10)
    share._coming[0] = 300 * MB  # of another thread
    share.begin(1, 10)
    alone = share.lent + 300 * MB
    del share._coming[0]
    share.begin(1, 10)
    assert share.lent == alone


def test_never_less_than_the_cache_s_own_share_nor_more_than_it_can_take():
    share, cache, process = lending(others=1900 * MB)
    run(share, 10)
    run(share, 1, known=10)
    assert share.lent == 0
    process.others = 100 * MB
    run(share, 1, known=10)
    assert cache.limits[-1] == 1500 * MB


def test_a_little_more_does_not_move_the_limit_and_a_little_less_does():
    share, cache, process = lending()
    run(share, 10)
    run(share, 1, known=10)
    process.others -= 5 * MB
    run(share, 1, known=10)
    assert len(cache.limits) == 1
    process.others += 6 * MB
    run(share, 1, known=10)
    assert len(cache.limits) == 2
    assert cache.limits[1] < cache.limits[0]


def test_what_others_need_is_withheld_from_share_and_loan_together():
    share, cache, _ = lending()
    run(share, 10)
    run(share, 1, known=10)
    whole = cache.limits[-1]
    assert share.limit(300 * MB) == whole - 100 * MB == cache.limits[-1]
    run(share, 1, known=10)
    assert cache.limits[-1] == whole - 100 * MB
    assert share.limit(400 * MB) == whole


def test_a_pass_that_fails_is_no_longer_counted(small_store):
    with zipmoe.load(small_store, memory="64GB", context=64) as loaded:
        with pytest.raises(Exception, match=r"."):
            loaded.model(input_ids="no tokens")
        assert loaded.runtime.lending._coming == {}


def test_the_resident_memory_is_what_the_system_says():
    status = Path("/proc/self/status").read_text()
    told = int(re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024
    assert budget.rss_bytes() == pytest.approx(told, rel=0.05)


def test_a_model_below_its_size_is_lent_what_it_does_not_use(small_store, at_floor):
    """And gives the same tokens."""
    with zipmoe.load(small_store, memory="4GB", context=64) as loaded:
        whole = loaded.runtime.cache.slots
        expected = generate(loaded, "lend", max_tokens=8).token_ids
    with at_floor() as loaded:
        assert loaded.runtime.cache.slots == 2
        assert generate(loaded, "lend", max_tokens=8).token_ids == expected
        assert loaded.runtime.cache.slots == whole
        assert loaded.runtime.engaged()["lent"] != "0 bytes"
