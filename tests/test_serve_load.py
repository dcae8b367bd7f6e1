"""A crowd of clients: every answer is the solo one, memory is as promised, and faults pass."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from crowd import Crowd, Questions
from faulty_drive import faulty_drive
from serving import serving
from small_store import write_store
from test_serve_life import running
from test_suspension import give_few_slots

from zipmoe.serve.limits import Limits

BYTES = ["ab" * n for n in range(1, 13)]
WORDS = [f"Name {n} things that are {colour}." for n in "23" for colour in ("red", "big", "old")]
POOL = min(32, 4 + (os.cpu_count() or 1))  # threads that asyncio keeps for blocking calls
SHARD = "experts-00001.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def questions(store):
    return Questions(store, BYTES, "16GB")


def gauge(url, name):
    pattern = rf"^zipmoe:{name}{{.*}} (\S+)$"
    found = re.search(pattern, httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found[1])


def held(process):
    """Count the threads and descriptors of a process."""
    return tuple(len(list(Path(f"/proc/{process.pid}/{of}").iterdir())) for of in ("task", "fd"))


def settled(url):
    """Wait until no answer is being written."""
    end = time.monotonic() + 60
    while gauge(url, "num_requests_running") or gauge(url, "num_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(0.05)


def load(store, questions, memory, *, clients, seconds, seed, spoilt=0.0):
    """Let a crowd loose on the command, its drive failing meanwhile; give what it came to."""
    words = ["--memory", str(memory), "--context", "200", "--conversations", "16"]
    with faulty_drive(store) as drive:
        words += ["--queue", "32", "--name", questions.model]
        with running(drive.path, *words) as server:
            Crowd(server.url, questions, 1.0, "first").run(clients)
            settled(server.url)
            before = held(server.process)
            crowd = Crowd(server.url, questions, seconds, seed)
            fault = threading.Timer(seconds / 4, crowd.spoil, (drive, SHARD, spoilt))
            if spoilt:
                fault.start()
            crowd.run(clients)
            fault.cancel()
            assert crowd.wrong == []
            settled(server.url)
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert gauge(server.url, "memory_peak_bytes") <= memory
            most = (before[0] + POOL, before[1])
            end = time.monotonic() + 30  # idle connections are closed after 5 s
            while any(now > then for now, then in zip(held(server.process), most, strict=True)):
                assert time.monotonic() < end, (held(server.process), most)
                time.sleep(0.2)
            peak = gauge(server.url, "memory_peak_bytes")
            assert server.end() == 0
    return dict(crowd.counts) | {"peak_bytes": int(peak), "memory_bytes": memory}


def test_a_crowd_gets_the_answers_that_each_would_get_alone(store, questions):
    counts = load(store, questions, 2_000_000_000, clients=12, seconds=5, seed=1)
    assert counts["answered"] > 10
    assert counts["left"] > 3


def test_a_drive_that_fails_for_a_while_ends_what_it_must_with_503(store, questions):
    with faulty_drive(store) as drive:
        limits = Limits(streams=16, queue=32)
        with serving(drive.path, context=200, limits=limits, name="store") as served:
            give_few_slots(served.loaded)
            crowd = Crowd(served.url, questions, 6.0, 2)
            fault = threading.Timer(1.5, crowd.spoil, (drive, SHARD, 1.5))
            fault.start()
            crowd.run(12)
            fault.join()
            assert crowd.wrong == []
            assert crowd.counts["unreadable"] > 0
            assert crowd.counts["answered"] > 10
            settled(served.url)
            assert served.service.scheduler._room.reserved == 0
            assert httpx.get(f"{served.url}/health").status_code == 200
    assert served.streams.open_streams == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run(
        [sys.executable, "-m", "zipmoe", "demo", "--json", "--folder", folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return folder


@pytest.mark.soak
def test_a_large_crowd_talks_with_the_demo_model_in_half_of_its_memory(demo, soak_record):
    half = sum(file.stat().st_size for file in (demo / "checkpoint").iterdir()) // 2
    asked = Questions(demo / "store", WORDS, "8GB")
    counts = load(
        demo / "store", asked, half, clients=64, seconds=180, seed=soak_record.seed, spoilt=10
    )
    soak_record("64 clients for 3 minutes, in half of the checkpoint's bytes", **counts)
    assert counts["answered"] > 100
    assert counts["left"] > 50
    assert counts["nonsense"] > 0
    assert counts["unreadable"] > 0
