"""Time to first token: of the library, and of `zipmoe serve` over HTTP, on the demo model."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pathlib import Path

MEMORY = "8GB"  # all experts
CONTEXT = 1024


def messages(number: int) -> list[dict[str, str]]:
    """A prompt of its own, about 200 tokens: nothing of it is in a KV cache already."""
    return [{"role": "user", "content": f"{number} " + "Tell me about the sea. " * 35}]


class Library:
    """The model in a process of its own."""

    def __init__(self, store: str) -> None:
        import zipmoe  # noqa: PLC0415

        self.loaded = zipmoe.load(store, memory=MEMORY, context=CONTEXT)

    def first_token(self, number: int) -> float:
        from zipmoe.generate import generate  # noqa: PLC0415

        begin = time.perf_counter()
        generate(self.loaded, messages(number), max_tokens=1)
        return time.perf_counter() - begin


class Server:
    """The command in a process of its own."""

    def __init__(self, store: Path) -> None:
        words = ["serve", str(store), "--port", "0", "--memory", MEMORY, "--context", str(CONTEXT)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zipmoe", *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        said = ""
        for said in self._process.stderr:
            if said.startswith("ready: "):
                break
        else:
            raise RuntimeError(f"zipmoe serve ended: {said}")
        url = urlsplit(said.split(" at ")[1].strip())
        self._connection = http.client.HTTPConnection(str(url.hostname), url.port)
        self._model = store.name

    def first_token(self, number: int) -> float:
        asked = {"model": self._model, "messages": messages(number), "max_tokens": 1}
        body = json.dumps(asked | {"stream": True, "temperature": 0})
        begin = time.perf_counter()
        self._connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        response = self._connection.getresponse()
        for line in response:
            if b'"content":"' in line.replace(b" ", b"") or b"[DONE]" in line:
                break
        seconds = time.perf_counter() - begin
        response.read()
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def compare(library: Any, store: Path, times: int) -> dict[str, list[float]]:
    """Seconds to first tokens, in turns. library: a worker with a `Library`."""
    found: dict[str, list[float]] = {"library": [], "api": []}
    with Server(store) as server:
        for number in range(-2, times):  # the first ones do not count
            ways = {"library": lambda n: library.call("first_token", n), "api": server.first_token}
            for name in sorted(ways, reverse=bool(number % 2)):
                seconds = ways[name](1000 + number)
                if number >= 0:
                    found[name].append(seconds)
    return found
