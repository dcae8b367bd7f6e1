"""A cache that gives memory back while it runs: less of it, the same bytes."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from core_process import run_script, unless_sanitized
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import write_store
from synthetic_shards import make_shards
from test_cache_ahead import wait_until
from test_cache_threads import NUM_THREADS, run_threads
from test_reader_faults import replaced, waiting

import zipmoe
from zipmoe import _core
from zipmoe.generate import generate

READERS = ["io_uring", "pread"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def test_a_limit_is_kept_between_two_slots_and_the_capacity(shards):
    cache = shards.open(slots=8)
    whole = cache.allocated_bytes
    half = shards.record_bytes() // 2
    for granted, slots in ((0, 2), (shards.capacity(5), 5), (shards.capacity(5) + half, 5)):
        assert cache.limit(granted) == cache.allocated_bytes <= shards.capacity(slots)
        assert cache.slots == slots
    assert cache.limit(0) == _core.ExpertCache.floor_bytes(shards.table)
    assert cache.limit(1 << 40) == whole
    assert cache.slots == 8
    cache.close()
    with pytest.raises(ValueError, match="closed"):
        cache.limit(1 << 40)


def test_the_least_worthy_go_and_the_others_stay_where_they_fit(shards):
    cache = shards.open(slots=5, policy="lru")
    for expert in (0, 1, 2, 3, 4, 0, 3):  # 1, 2 and 4 were used longest ago
        shards.check_expert(cache, 0, expert)
    cache.limit(shards.capacity(2))
    before = cache.counters()
    for expert in (0, 3, 0):
        shards.check_expert(cache, 0, expert)
    after = cache.counters()
    assert (after["misses"], after["hits"]) == (before["misses"], before["hits"] + 3)
    assert after["evictions"] == 3
    for expert in (1, 2):
        shards.check_expert(cache, 0, expert)
    assert cache.counters()["evictions"] == 5
    assert after["ahead_used"] == 0
    cache.close()


def test_what_was_read_ahead_is_still_known_as_such_in_its_new_place(shards):
    cache = shards.open(slots=3, policy="lru")
    for expert in (0, 1):
        shards.check_expert(cache, 0, expert)
    cache.look_ahead(1, [2])
    wait_until(cache, ahead_reads=1, bytes_read=3 * shards.record_bytes())
    cache.limit(shards.capacity(2))
    shards.check_expert(cache, 1, 2)
    counters = cache.counters()
    assert (counters["misses"], counters["ahead_used"]) == (2, 1)
    cache.close()


def test_slots_given_back_can_be_taken_again(shards):
    cache = shards.open(slots=5, policy="lru")
    for _ in range(3):
        cache.limit(0)
        for expert in (0, 1, 2):
            shards.check_expert(cache, 0, expert)
        cache.limit(shards.capacity(5))
        for expert in range(5):
            shards.check_expert(cache, 0, expert)
        misses = cache.counters()["misses"]
        for expert in range(5):
            shards.check_expert(cache, 0, expert)
        assert cache.counters()["misses"] == misses
    cache.close()


@given(
    policy=st.sampled_from(["request", "lru", "fifo", "marking"]),
    steps=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 9)), max_size=60),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_whatever_the_limits_every_weight_is_right(shards, policy, steps):
    cache = shards.open(slots=7, policy=policy)
    held = set()
    for layer, expert, slots in steps:
        if 2 <= slots <= 7:
            cache.limit(shards.capacity(slots))
        if slots == 8:
            cache.prefetch(layer, [expert, (expert + 1) % 6, (expert + 2) % 6])
        if slots == 9:
            cache.look_ahead(layer, [expert, (expert + 1) % 6])
        shards.check_expert(cache, layer, expert)
        held.add((layer, expert))
    counters = cache.counters()
    assert counters["read_errors"] == 0
    assert counters["ahead_used"] <= counters["ahead_reads"]
    assert counters["misses"] + counters["ahead_reads"] >= len(held)
    cache.close()


@pytest.mark.parametrize("reader", ["io_uring"])
def test_a_read_under_way_comes_to_its_end_and_then_makes_room(shards, reader):
    cache = shards.open(reader=reader, slots=5, policy="lru")
    for expert in (0, 1, 2, 3):
        shards.check_expert(cache, 0, expert)
    path, offset, length = shards.record(1, 0)
    record = Path(path).read_bytes()[offset : offset + length]
    source, sink = os.pipe()
    with replaced(path, source):
        thread, results = waiting(lambda: shards.check_expert(cache, 1, 0))  # in the fifth slot
        while cache.counters()["misses"] < 5:
            pass
        cache.limit(shards.capacity(2))
        shards.check_expert(cache, 0, 3)  # others go on meanwhile
        for at in range(0, length, 4096):
            os.write(sink, record[at : at + 4096])
        thread.join(30)
    assert results == [None]
    misses = cache.counters()["misses"]
    for expert in ((1, 0), (0, 3)):
        shards.check_expert(cache, *expert)
    assert cache.counters()["misses"] == misses
    os.close(source)
    os.close(sink)
    cache.close()


@pytest.mark.parametrize("reader", READERS)
def test_threads_get_the_right_weights_while_the_limit_moves(shards, reader):
    cache = shards.open(slots=8, reader=reader)
    done = threading.Event()

    def move():
        for slots in itertools.cycle((8, 3, 6, 2)):
            cache.limit(shards.capacity(slots))
            if done.wait(0.002):
                return

    def work(number):
        rng = np.random.default_rng(number)
        for _ in range(60):
            layer = int(rng.integers(2))
            wanted = [int(expert) for expert in rng.permutation(6)[:3]]
            cache.prefetch(layer, wanted)
            cache.look_ahead(1 - layer, wanted)
            for expert in wanted:
                shards.check_expert(cache, layer, expert)

    mover, failed = waiting(move)
    try:
        run_threads(work)
    finally:
        done.set()
        mover.join()
    assert failed == [None]
    assert cache.counters()["hits"] > NUM_THREADS
    cache.close()


RETURNED = """
import json
from pathlib import Path
import numpy as np
from synthetic_shards import make_shards
from zipmoe import _core

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024

shape = (512, 768)
shards = make_shards(Path(sys.argv[1]), layers=1, experts=40, shapes=(shape,) * 2)
out = np.ones(shape, np.uint16)
cache = shards.open(slots=40)
before = resident() - cache.filled_bytes
told = []
for slots in (40, 10, 40, 2, 25):
    allocated = cache.limit(shards.capacity(slots))
    after_limit = resident() - before
    for expert in range(40):
        for matrix in (0, 1):
            cache.decode(0, expert, matrix, out)
            assert (out == shards.weights[0, expert, matrix]).all()
    told.append([allocated, after_limit, resident() - before])
print(json.dumps([shards.record_bytes(), *told]))
"""


@unless_sanitized
def test_what_is_given_back_is_no_longer_resident(tmp_path):
    record, *told = json.loads(run_script(RETURNED, tmp_path))
    huge = 2 << 20  # one page may lie half in what is kept
    for slots, (allocated, after_limit, used) in zip((40, 10, 40, 2, 25), told, strict=True):
        assert slots * record <= allocated < slots * record + huge
        assert after_limit <= allocated + huge
        assert used <= allocated + huge
        assert used >= slots * record * 0.95


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("compute", ["native", "torch"])
def test_tokens_stay_the_same_when_the_limit_moves_in_the_middle(small, compute):
    with zipmoe.load(small, memory="64GB", context=100, compute=compute) as loaded:
        cache = loaded.runtime.cache
        whole = cache.allocated_bytes
        rest = whole - cache.limit(0)
        expected = generate(loaded, "hello", max_tokens=24).token_ids
        sizes = itertools.cycle([whole - rest // part for part in (1, 2, 100, 3)])
        slots = set()

        def move(_):
            cache.limit(next(sizes))
            slots.add(cache.slots)

        assert generate(loaded, "hello", max_tokens=24, on_text=move).token_ids == expected
        assert len(slots) == 4
        assert cache.counters()["evictions"] > 0
        with torch.no_grad():
            ids = torch.arange(60)[None]
            logits = loaded.model(ids).logits
            cache.limit(0)
            assert torch.equal(loaded.model(ids).logits, logits)
