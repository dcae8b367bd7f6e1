"""The example with Ray Serve: replicas on one machine, a stream through, a killed one replaced."""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from small_store import write_store

import zipmoe
from zipmoe.generate import generate

ray = pytest.importorskip("ray", reason="ray is not installed: tools/setup.sh ray")
serve = pytest.importorskip("ray.serve")
ROOT = Path(__file__).resolve().parent.parent
ASKED = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """The URL of two replicas, and what one alone answers."""
    store = write_store(tmp_path_factory.mktemp("ray"))
    with zipmoe.load(store, memory="2GB", context=100) as loaded:
        alone = generate(loaded, ASKED["messages"], max_tokens=12).text
    paths = [str(ROOT / "examples"), *filter(None, sys.path)]
    environment = {"env_vars": {"PYTHONPATH": ":".join(paths)}}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env=environment)
    try:
        sys.path.insert(0, paths[0])
        example = importlib.import_module("ray_serve")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            example.application(str(store), memory="2GB", context=100, replicas=2, each_node=None)
        )
        yield f"http://127.0.0.1:{port}", alone
    finally:
        sys.path.remove(paths[0])
        serve.shutdown()
        ray.shutdown()


def replicas():
    """The processes of the running replicas, by the names that Ray gives them."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (process / "cmdline").read_text().startswith("ray::ServeReplica:"):
                found.add(int(process.name))
    return found


def streamed(url):
    fields = ASKED | {"model": "store", "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=fields, timeout=60) as response:
        assert response.status_code == 200, response.read()
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"] for line in data[:-1]]
    assert len(deltas) > 3
    return "".join(delta.get("content", "") for delta in deltas)


@pytest.mark.soak
def test_streams_pass_and_a_killed_replica_is_replaced(deployed, soak_record):
    url, alone = deployed
    assert [streamed(url) for _ in range(6)] == [alone] * 6
    before = replicas()
    assert len(before) == 2
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    end = time.monotonic() + 120
    while len(now := replicas() - {killed}) < 2:
        assert time.monotonic() < end, now
        time.sleep(0.5)
    assert now - before
    assert [streamed(url) for _ in range(6)] == [alone] * 6
    soak_record("Ray Serve", replicas=2, killed=1, replaced=len(now - before), streams=12)
