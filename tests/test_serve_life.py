"""The command `zipmoe serve`: what it refuses, how it begins, how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
from serving import serving
from small_store import write_store
from typer.testing import CliRunner

from zipmoe import _serve_command
from zipmoe.cli import app

LONG = {
    "model": "store",
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
    "logit_bias": {"256": -100},  # the token that ends a text
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("life"))


class Running:
    """The command in a process of its own."""

    def __init__(self, store, *words, **environment):
        command = [sys.executable, "-m", "zipmoe", "serve", str(store), "--port", "0", *words]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.said = []
        self.url = None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("ready: "):
                self.url = line.split(" at ")[1].strip()
                break
        self._drain = threading.Thread(target=self.said.extend, args=(self.process.stderr,))
        self._drain.start()

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._drain.join()
        return code


@contextmanager
def running(store, *words, **environment):
    found = Running(store, *words, **environment)
    watchdog = threading.Timer(300, found.process.kill)
    watchdog.start()
    try:
        assert found.url, found.said
        yield found
    finally:
        watchdog.cancel()
        if found.process.poll() is None:
            found.end(signal.SIGKILL)


def lines_of(response, into):
    for line in response.iter_lines():
        into.append(line)


def refusal(*words):
    result = CliRunner().invoke(app, ["serve", *map(str, words)])
    assert result.exit_code in {1, 3}, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_what_cannot_work_is_refused_in_one_sentence(store, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port}" in refusal(store, "--port", port)
    assert "cannot listen" in refusal(store, "--host", "192.0.2.1")
    assert "floor" in refusal(store, "--port", 0, "--memory", "100MB")
    assert "zipmoe" in refusal(tmp_path, "--port", 0)
    empty = tmp_path / "key"
    empty.write_text(" \n")
    assert "is empty" in refusal(store, "--port", 0, "--api-key", empty)


def test_without_the_extra_one_sentence_says_what_to_install(store, monkeypatch):
    monkeypatch.setattr(_serve_command, "_PACKAGES", ("fastapi", "no_such_package"))
    said = refusal(store)
    assert "no_such_package" in said
    assert "zipmoe[serve]" in said
    assert "fastapi" not in said


def test_it_is_ready_after_a_real_token_and_sigterm_lets_answers_end(store, tmp_path):
    words = ["--context", "500", "--memory", "2GB", "--grace", "100"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        with running(store, *words, NOTIFY_SOCKET=str(tmp_path / "notify")) as server:
            assert manager.recv(100) == b"READY=1"
            fields = LONG | {"stream": True, "max_tokens": 400}
            url = f"{server.url}/v1/chat/completions"
            with httpx.stream("POST", url, json=fields, timeout=60) as response:
                lines = response.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
            assert server.process.wait(100) == 0
            assert manager.recv(100) == b"STOPPING=1"
    server._drain.join()
    line = json.loads(server.said[-2])
    assert (line["status"], line["completion_tokens"]) == (200, 400)
    assert server.said[-1] == "stopped\n"


def test_what_is_left_after_the_grace_ends_with_a_reason(store):
    words = ["--context", "3000", "--grace", "0.3", "--memory", "3GB"]
    with running(store, *words) as server:
        fields = LONG | {"stream": True, "max_tokens": 2900}
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=fields, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "stopping"
        assert server.process.wait(100) == 0
        assert time.monotonic() - began < 30


def test_the_key_comes_from_a_file_or_the_environment_and_is_nowhere_else(store, tmp_path):
    key = tmp_path / "key"
    key.write_text("sesame\n")
    for words, environment in ((["--api-key", str(key)], {}), ([], {"ZIPMOE_API_KEY": "sesame"})):
        with running(store, "--context", "100", *words, **environment) as server:
            assert httpx.get(f"{server.url}/v1/models").status_code == 401
            headers = {"Authorization": "Bearer sesame"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
            assert server.end() == 0
        assert "sesame" not in "".join(server.said)


def test_no_thread_and_no_descriptor_is_left(store):
    def held():
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    def serve_once():
        with serving(store, context=100) as served:
            answer = httpx.post(
                f"{served.url}/v1/chat/completions", json=LONG | {"model": "tiny", "max_tokens": 3}
            )
            assert answer.status_code == 200

    serve_once()
    before = held()
    serve_once()
    end = time.monotonic() + 10
    while held() != before and time.monotonic() < end:
        time.sleep(0.05)
    assert held() == before
