"""The expert cache: the right bytes, in a fixed amount of memory, whatever the order of use."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_shards import CODEC_IDS, make_shards
from waiting import until

from zipmoe import _core
from zipmoe._errors import BudgetError, CorruptError, FetchError, FormatError

READERS = ["io_uring", "io_uring+buffered", "pread", "pread+buffered"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("reader", READERS)
def test_random_access_with_few_slots_returns_every_weight(shards, reader):
    cache = shards.open(slots=2, reader=reader)
    rng = np.random.default_rng(1)
    keys = sorted(shards.weights)
    for i in rng.integers(0, len(keys), 150):
        shards.check(cache, *keys[i])
    assert cache.counters()["evictions"] > 20
    cache.close()


@pytest.mark.parametrize("codec", CODEC_IDS)
def test_every_codec_is_decoded(tmp_path, codec):
    shards = make_shards(tmp_path, layers=1, experts=3, codec=codec)
    cache = shards.open(slots=2)
    for expert in (0, 1, 2, 0):
        shards.check_expert(cache, 0, expert)
    cache.close()


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_raw_elements_of_any_size_are_copied(tmp_path, dtype):
    shards = make_shards(tmp_path, layers=1, experts=3, dtype=dtype)
    cache = shards.open(slots=2)
    for expert in (2, 0, 1, 2):
        shards.check_expert(cache, 0, expert)
    cache.close()


def test_empty_matrices_are_decoded_without_reading(tmp_path):
    shards = make_shards(tmp_path, layers=1, experts=2, shapes=((0, 64), (64, 0)), codec="raw")
    cache = shards.open(slots=2)
    cache.prefetch(0, [0])
    for expert in (0, 1):
        shards.check_expert(cache, 0, expert)
    assert cache.counters()["bytes_read"] == 0
    cache.close()


def test_rows_of_the_target_may_be_strided(shards):
    cache = shards.open()
    wanted = shards.weights[1, 3, 0]
    canvas = np.full((wanted.shape[0], wanted.shape[1] + 100), 7, np.uint16)
    cache.decode(1, 3, 0, canvas[:, 10 : 10 + wanted.shape[1]])
    np.testing.assert_array_equal(canvas[:, 10 : 10 + wanted.shape[1]], wanted)
    assert (canvas[:, :10] == 7).all()
    assert (canvas[:, 10 + wanted.shape[1] :] == 7).all()
    cache.close()


def test_a_target_that_does_not_fit_is_refused(shards):
    cache = shards.open()
    shape = shards.weights[0, 0, 0].shape
    good = np.zeros(shape, np.uint16)
    read_only = good.copy()
    read_only.flags.writeable = False
    for bad in (
        np.zeros((shape[0] + 1, shape[1]), np.uint16),
        np.zeros((shape[1], shape[0]), np.uint16).T,
        np.zeros(shape, np.uint32),
        good[::-1],
        np.broadcast_to(good[:1], shape),
        read_only,
    ):
        with pytest.raises((ValueError, TypeError)):
            cache.decode(0, 0, 0, bad)
    for place in ((9, 0, 0), (0, 99, 0), (0, 0, 3), (2**40, 0, 0)):
        with pytest.raises(ValueError, match="no "):
            cache.decode(*place, good)
    with pytest.raises(ValueError, match="no expert 77"):
        cache.prefetch(0, [0, 77])
    shards.check(cache, 0, 0, 0)
    cache.close()


def counted(cache):
    counters = cache.counters()
    return counters["hits"], counters["misses"], counters["evictions"]


def test_the_least_recently_used_expert_goes_first(shards):
    cache = shards.open(slots=3, policy="lru")
    assert cache.slots == 3
    for expert in (0, 1, 2):
        shards.check_expert(cache, 0, expert)
    shards.check_expert(cache, 0, 0)
    assert counted(cache) == (1, 3, 0)
    shards.check_expert(cache, 0, 3)  # takes the place of 1
    assert counted(cache) == (1, 4, 1)
    for expert in (0, 2, 3):
        shards.check_expert(cache, 0, expert)
    assert counted(cache) == (4, 4, 1)
    shards.check_expert(cache, 0, 1)  # takes the place of 0
    assert counted(cache) == (4, 5, 2)
    shards.check_expert(cache, 0, 2)
    shards.check_expert(cache, 0, 3)
    assert counted(cache) == (6, 5, 2)
    cache.close()


@given(
    slots=st.integers(2, 6),
    uses=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), max_size=60),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_counters_are_those_of_a_least_recently_used_cache(shards, slots, uses):
    cache = shards.open(slots=slots, policy="lru")
    model, hits, num_bytes, evictions = {}, 0, 0, 0  # a dict remembers the order of insertion
    for key in uses:
        shards.check_expert(cache, *key)
        if key in model:
            hits += 1
            del model[key]
        else:
            num_bytes += shards.record(*key)[2]
            if len(model) == slots:
                del model[next(iter(model))]
                evictions += 1
        model[key] = True
    assert counted(cache) == (hits, len(uses) - hits, evictions)
    assert cache.counters()["bytes_read"] == num_bytes
    assert cache.counters()["read_errors"] == 0
    cache.close()


def test_a_visit_is_counted_once_however_many_matrices_it_decodes(shards):
    cache = shards.open(slots=4)
    cache.prefetch(0, [2, 4])
    cache.prefetch(0, [2, 4])  # the same visits, not yet used
    assert counted(cache) == (0, 2, 0)
    for matrix in (0, 1, 2):
        shards.check(cache, 0, 4, matrix)
        shards.check(cache, 0, 2, matrix)
    assert counted(cache) == (0, 2, 0)
    shards.check(cache, 0, 2, 1)
    shards.check(cache, 0, 2, 2)
    assert counted(cache) == (1, 2, 0)
    cache.prefetch(0, [4, 5])
    assert counted(cache) == (2, 3, 0)
    size = sum(shards.record(0, e)[2] for e in (2, 4, 5))
    shards.check_expert(cache, 0, 5)
    assert cache.counters()["bytes_read"] == size
    cache.close()


def test_a_list_longer_than_the_cache_is_read_once_each(shards):
    cache = shards.open(slots=2)
    wanted = [(1, e) for e in (5, 0, 3, 1, 4, 2)]
    cache.prefetch(1, [e for _, e in wanted])
    for layer, expert in wanted:
        shards.check_expert(cache, layer, expert)
    counters = cache.counters()
    assert counters["misses"] == 6
    assert counters["bytes_read"] == sum(shards.record(*key)[2] for key in wanted)
    cache.close()


def wait_until_read(cache, num_bytes):
    until(lambda: cache.counters()["bytes_read"] >= num_bytes, seconds=30)
    time.sleep(0.02)  # for what must not be read any more
    assert cache.counters()["bytes_read"] == num_bytes


@pytest.mark.parametrize("reader", READERS)
def test_prefetch_reads_in_the_background_as_far_as_slots_allow(shards, reader):
    cache = shards.open(slots=3, reader=reader)
    cache.prefetch(0, [4, 1, 5, 0, 2])
    wait_until_read(cache, sum(shards.record(0, e)[2] for e in (4, 1, 5)))
    waited = cache.counters()["wait_ns"]
    for expert in (4, 1, 5):
        shards.check(cache, 0, expert, 0)
    assert cache.counters()["wait_ns"] == waited == 0
    shards.check(cache, 0, 1, 2)  # its last matrix: the next of the list takes the slot
    wait_until_read(cache, sum(shards.record(0, e)[2] for e in (4, 1, 5, 0)))
    cache.close()


def test_a_list_does_not_evict_its_own_experts_before_their_use(shards):
    cache = shards.open(slots=3)
    for expert in (0, 1, 2):
        shards.check_expert(cache, 0, expert)
    cache.prefetch(0, [3, 4, 0, 1])  # 0 and 1 are the oldest: only 2 may go
    wait_until_read(cache, sum(shards.record(0, e)[2] for e in (0, 1, 2, 3)))
    assert counted(cache) == (2, 5, 1)
    for expert in (0, 1, 3, 4):
        shards.check_expert(cache, 0, expert)
    assert counted(cache) == (2, 5, 2)
    cache.close()


def test_experts_may_be_used_in_another_order_than_listed(shards):
    cache = shards.open(slots=2)
    for _ in range(3):
        cache.prefetch(0, list(range(6)))
        for expert in reversed(range(6)):
            shards.check_expert(cache, 0, expert)
        cache.prefetch(1, [0, 1, 2])  # never used
    cache.close()


def takes_direct_reads(path):
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    with mmap.mmap(-1, 4096) as page:
        try:
            return os.preadv(fd, [page], 0) == 4096
        except OSError:
            return False
        finally:
            os.close(fd)


@pytest.mark.parametrize("reader", READERS)
def test_the_reader_asked_for_engages(shards, reader):
    cache = shards.open(reader=reader)
    method, _, how = reader.partition("+")
    direct = how != "buffered" and takes_direct_reads(shards.paths[0])
    assert cache.reader == method + ("+direct" if direct else "")
    assert cache.isa == _core.available_isas()[0]
    cache.close()


def test_unknown_readers_instruction_sets_and_policies_are_refused(shards):
    for reader in ("mmap", "io_uring+", "pread+sideways", "+direct+"):
        with pytest.raises(ValueError, match="unknown"):
            shards.open(reader=reader)
    with pytest.raises(ValueError, match="vax"):
        shards.open(isa="vax")
    for policy in ("random", "static", "belady"):  # a cache knows neither popularity nor future
        with pytest.raises(ValueError, match=policy):
            shards.open(policy=policy)


def test_slots_and_memory_follow_the_capacity(shards):
    floor = _core.ExpertCache.floor_bytes(shards.table)
    for capacity in (floor, floor + 1, floor + shards.record_bytes(), 2 * floor, 1 << 40):
        cache = _core.ExpertCache(shards.paths, shards.table, capacity_bytes=capacity)
        assert 2 <= cache.slots <= 12
        assert cache.slots * shards.record_bytes() < cache.allocated_bytes <= capacity
        cache.close()
    assert shards.open(slots=12).slots == 12
    for capacity in (0, 1, floor - 1):
        with pytest.raises(BudgetError) as error:
            _core.ExpertCache(shards.paths, shards.table, capacity_bytes=capacity)
        assert error.value.floor_bytes == floor


def threads_and_files():
    tasks, files = (os.listdir(f"/proc/self/{kind}") for kind in ("task", "fd"))  # noqa: PTH208
    return len(tasks), sorted(files)


def check_all_is_freed(before):
    """The kernel takes threads that have ended, io_uring's own too, off its list a little later."""
    until(lambda: threads_and_files() == before)


@pytest.mark.parametrize("reader", READERS)
def test_close_frees_threads_and_files_and_ends_all_calls(shards, reader):
    before = threads_and_files()
    cache = shards.open(reader=reader)
    assert threads_and_files()[0] > before[0]
    cache.prefetch(0, [0, 1, 2])
    cache.close()
    cache.close()
    check_all_is_freed(before)
    assert cache.allocated_bytes == 0
    out = np.zeros_like(shards.weights[0, 0, 0])
    for call in (
        lambda: cache.decode(0, 0, 0, out),
        lambda: cache.prefetch(0, [1]),
        cache.counters,
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_cache_that_is_dropped_frees_everything_too(shards):
    before = threads_and_files()
    cache = shards.open()
    cache.prefetch(0, [0, 1, 2])
    del cache
    check_all_is_freed(before)


def table_error(shards, place, value):
    """What the constructor says of a table with one number changed."""
    row, column = place
    table = shards.table.copy()
    table[row, column] = value
    with pytest.raises((CorruptError, FormatError)) as error:
        _core.ExpertCache(shards.paths, table, capacity_bytes=1 << 30)
    return error.value


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (0, 65536),
        (1, 65536),
        (2, 1),
        (3, 2),
        (4, 9),
        (4, 0),
        (5, 3),
        (5, 4),
        (6, 2**31),
        (6, 30),
        (7, 2**63),
        (8, 2**32 + 4),
        (8, 6),
        (9, 2**20),
        (10, 8193),
        (10, 2**64 - 4096),
        (10, 2**63),
        (11, 2**64 - 1),
        (11, 2**40),
        (11, 1),
        (13, 8192),
        (13, 2**64 - 4096),
        (14, 2**64 - 1),
        (14, 0),
    ],
)
def test_a_table_that_breaks_the_format_is_refused(shards, column, value):
    error = table_error(shards, (0, column), value)
    if column == 4 and value == 9:
        assert isinstance(error, FormatError)
        assert "codec id 9" in str(error)
    else:
        assert isinstance(error, CorruptError)
        assert error.expert is not None


def test_a_table_with_an_expert_twice_or_without_rows_is_refused(shards):
    twice = np.concatenate([shards.table, shards.table[:3]])
    with pytest.raises(CorruptError, match="twice"):
        _core.ExpertCache(shards.paths, twice, capacity_bytes=1 << 30)
    for bad in (shards.table[:0], shards.table[:, :15]):
        with pytest.raises(ValueError, match="table"):
            _core.ExpertCache(shards.paths, np.ascontiguousarray(bad), capacity_bytes=1 << 30)


def test_shards_that_are_no_plain_files_are_refused(shards, tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(shards.paths[0])
    os.mkfifo(pipe)
    for path in (link, pipe, tmp_path):
        with pytest.raises(FormatError, match=path.name):
            _core.ExpertCache([str(path), shards.paths[1]], shards.table, capacity_bytes=1 << 30)
    with pytest.raises(FetchError) as error:
        _core.ExpertCache(
            [str(tmp_path / "none"), shards.paths[1]], shards.table, capacity_bytes=1 << 30
        )
    assert Path(error.value.path).name == "none"
    assert error.value.errno == 2
