"""Several threads may use one cache: every answer is right, and none is waited for in vain."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from core_process import run_script
from synthetic_shards import flip_bit, make_shards

from zipmoe._errors import CorruptError

NUM_THREADS = 6
READERS = ["io_uring", "pread"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four layers; expert 3 of layer 2 is damaged."""
    shards = make_shards(tmp_path_factory.mktemp("shards"), layers=4, experts=5, codec="rank223")
    path, offset, _ = shards.record(2, 3)
    flip_bit(path, offset)
    return shards


def run_threads(work):
    """Runs work(number) in every thread; the first failure is raised here."""
    failures = []

    def run(number):
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  raised below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


@pytest.mark.parametrize(
    "size",
    [
        {"slots": 2},
        {"slots": 7},
        *({"tiers": split} for split in [(0, 2, 3, 0), (0, 0, 0, 5), (2, 2, 2, 0), (3, 2, 0, 0)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("reader", READERS)
def test_threads_that_read_and_prefetch_at_random_get_the_right_weights(shards, reader, size):
    cache = shards.open(reader=reader, **size)

    def work(number):
        rng = np.random.default_rng(number)
        for _ in range(40):
            layer = int(rng.integers(4))
            wanted = rng.permutation(5)[: int(rng.integers(1, 5))]
            if rng.random() < 0.7:
                cache.prefetch(layer, [int(expert) for expert in wanted])
            for expert in wanted:
                if (layer, expert) == (2, 3):
                    with pytest.raises(CorruptError) as error:
                        cache.decode(2, 3, 0, np.zeros_like(shards.weights[2, 3, 0]))
                    assert (error.value.layer, error.value.expert) == (2, 3)
                elif rng.random() < 0.5:
                    shards.check_expert(cache, layer, int(expert))
                else:
                    shards.check(cache, layer, int(expert), int(rng.integers(3)))

    run_threads(work)
    counters = cache.counters()
    assert counters["evictions"] > 0
    assert counters["read_errors"] > 0
    assert counters["hits"] + counters["misses"] > NUM_THREADS
    cache.close()


@pytest.mark.parametrize("reader", READERS)
def test_closing_under_load_ends_every_call(shards, reader):
    cache = shards.open(slots=2, reader=reader)
    started = threading.Barrier(NUM_THREADS)

    def work(number):
        rng = np.random.default_rng(number)
        started.wait()
        if number == 0:
            threading.Event().wait(0.05)
            cache.close()

        def go_on():
            while True:
                shards.check(cache, 3, int(rng.integers(5)), 0)

        with pytest.raises(ValueError, match="closed"):
            go_on()

    run_threads(work)


def test_several_threads_may_close(shards):
    for _ in range(20):
        cache = shards.open()
        cache.prefetch(0, [0, 1, 2, 3])
        run_threads(lambda _number, cache=cache: cache.close())


FORK = """
import os
from pathlib import Path
import numpy as np
from synthetic_shards import make_shards

shards = make_shards(Path(sys.argv[1]), layers=1, experts=3)
cache = shards.open(slots=2, reader=sys.argv[2])
cache.prefetch(0, [0, 1])
child = os.fork()
if child == 0:
    try:
        shards.check(cache, 0, 0, 0)
        os._exit(1)
    except ValueError as error:
        if "fork" not in str(error):
            os._exit(2)
    cache.close()
    del cache
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
for expert in (0, 1, 2):
    shards.check_expert(cache, 0, expert)
cache.close()
print("done")
"""


@pytest.mark.parametrize("reader", READERS)
def test_a_forked_child_is_refused_and_leaves_its_parent_alone(shards, tmp_path, reader):
    shards.open(reader=reader).close()  # skips where there is no such reader
    assert run_script(FORK, tmp_path, reader) == "done\n"
