"""Requests leave nothing behind: no memory, no thread, no descriptor, whatever their end was."""

from __future__ import annotations

import gc
import os
import statistics
from collections import Counter
from pathlib import Path

import pytest
from small_store import write_store
from test_cache_ahead import few_slots
from test_reader_faults import replaced

import zipmoe
from zipmoe._errors import FetchError
from zipmoe.budget import rss_bytes
from zipmoe.generate import generate

MB = 1_000_000


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    store = write_store(tmp_path_factory.mktemp("small"))
    with zipmoe.load(store, memory="64GB", context=100) as result:
        result.runtime.cache.close()
        result.runtime.source.cache = few_slots(result)
        yield result


class Requests:
    """Short answers, one in five of which ends badly: a failed read, a stop, an interrupt."""

    def __init__(self, loaded):
        self.loaded, self.ended = loaded, Counter()
        (self.shard,) = Path(loaded.runtime.folder).glob("experts-*.safetensors")
        self.expected = [self.answer(n) for n in range(7)]

    def answer(self, number, **options):
        prompt = "abcdefghijklmnopqrstuvwxyz"[number % 7 :]
        return generate(self.loaded, prompt, max_tokens=3, **options).token_ids

    def run(self, number):
        kind = {3: "failed", 8: "stopped", 13: "interrupted"}.get(number % 15, "whole")
        if kind == "failed":
            memory = os.open("/proc/self/mem", os.O_RDONLY)  # nothing is mapped where it reads
            with replaced(self.shard, memory), pytest.raises(FetchError):
                self.answer(number)
            os.close(memory)
        elif kind == "stopped":
            assert self.answer(number, stop=lambda: True) == self.expected[number % 7][:1]
        elif kind == "interrupted":

            def interrupt(_):
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                self.answer(number, on_text=interrupt)
        else:
            assert self.answer(number) == self.expected[number % 7]
        self.ended[kind] += 1


def held():
    """Memory, threads and descriptors of this process."""
    gc.collect()
    status = Path("/proc/self/status").read_text().splitlines()
    (threads,) = [int(line.split()[1]) for line in status if line.startswith("Threads:")]
    return rss_bytes(), threads, len(list(Path("/proc/self/fd").iterdir()))


def growth(requests, count):
    """What memory grew by from the second quarter of so many requests to the last; the rest stays.

    Medians, since what the system and malloc hold at a moment varies; and the least numbers, since
    the thread that watches memory has a file open now and then.
    """
    samples = []
    for number in range(count):
        requests.run(number)
        if (number + 1) % (count // 20) == 0:
            samples.append(held())
    memory, threads, descriptors = zip(*samples[5:], strict=True)
    for counts in (threads, descriptors):
        assert min(counts[10:]) == min(counts[:5]), counts
    return statistics.median(memory[10:]) - statistics.median(memory[:5])


def test_two_hundred_requests_leave_nothing_behind(loaded):
    requests = Requests(loaded)
    assert growth(requests, 200) < 5 * MB
    assert requests.ended.keys() == {"whole", "failed", "stopped", "interrupted"}


@pytest.mark.soak
def test_ten_thousand_requests_leave_nothing_behind(loaded, soak_record):
    requests = Requests(loaded)
    grown = growth(requests, 10_000)
    soak_record(
        "requests that leave nothing behind", requests=10_000, grown_bytes=grown, **requests.ended
    )
    assert grown < 2 * MB  # 270 bytes each
