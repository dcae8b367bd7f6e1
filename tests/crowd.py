"""Many clients at once, some of whom leave or talk nonsense, each checking every answer it gets."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import Any

import httpx2 as httpx

import zipmoe
from zipmoe.generate import generate

LEAVING, NONSENSE = 1 / 3, 0.02
LENGTHS = (1, 5, 20, 60)
LATE_S = 3.0  # after a fault is over, answers that it has ended may still be told so


class Questions:
    """Prompts for a store, and their greedy answers of one client alone, by prompt and length."""

    def __init__(self, store: Any, prompts: list[str], memory: str) -> None:
        self.model = store.name
        self.prompts = [[{"role": "user", "content": text}] for text in prompts]
        self.expected = {}
        with zipmoe.load(store, memory=memory, context=200) as loaded:
            for at, prompt in enumerate(self.prompts):
                tokens = generate(loaded, prompt, max_tokens=max(LENGTHS)).token_ids
                for length in LENGTHS:
                    said = loaded.tokenizer.decode(tokens[:length], skip_special_tokens=True)
                    self.expected[at, length] = said

    def nonsense(self, draw: random.Random) -> dict[str, Any]:
        body = {"model": self.model, "messages": self.prompts[0]}
        return draw.choice(
            [
                {"content": b"{", "headers": {"content-type": "application/json"}},
                {"json": {"model": self.model}},
                {"json": body | {"max_tokens": 10**9}},
                {"json": body | {"model": "other"}},
                {"json": body | {"temperature": "hot"}},
            ]
        )


class Crowd:
    """Clients that ask until `end`. counts: how their requests ended; wrong: what must not be."""

    def __init__(self, url: str, questions: Questions, seconds: float, seed: object) -> None:
        self.url, self.questions, self.seed = url, questions, seed
        self.end = time.monotonic() + seconds
        self.counts, self.wrong = Counter(), []
        self.faults_until = 0.0

    def run(self, clients: int) -> None:
        """Let them loose, and wait until the last has had its answer."""
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, number: int) -> None:
        draw = random.Random(f"{self.seed}-{number}")
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < self.end:
                try:
                    self.counts[self._ask(client, draw)] += 1
                except Exception as error:  # noqa: BLE001 - the test shows it
                    self.wrong.append(repr(error))
                    return

    def _ask(self, client: Any, draw: random.Random) -> str:
        if draw.random() < NONSENSE:
            nonsense = self.questions.nonsense(draw)
            status = client.post("/v1/chat/completions", **nonsense).status_code
            assert status in {400, 404, 422}, status
            return "nonsense"
        at, length = draw.randrange(len(self.questions.prompts)), draw.choice(LENGTHS)
        fields = {"model": self.questions.model, "messages": self.questions.prompts[at]}
        fields |= {"temperature": 0, "max_tokens": length}
        if draw.random() < LEAVING:
            with client.stream(
                "POST", "/v1/chat/completions", json=fields | {"stream": True}
            ) as response:
                if response.status_code == 429:
                    return self._wait("queue full")
                for _, _ in zip(response.iter_lines(), range(draw.randrange(1, 8)), strict=False):
                    pass
            return "left"
        response = client.post("/v1/chat/completions", json=fields)
        if response.status_code == 429:
            return self._wait("queue full")
        if response.status_code == 503 and time.monotonic() < self.faults_until:
            error = response.json()["error"]
            assert error["code"] == "store_unreadable", error
            assert "could not be read" in error["message"], error
            return self._wait("unreadable")
        assert response.status_code == 200, response.text
        text = response.json()["choices"][0]["message"]["content"]
        assert text == self.questions.expected[at, length], (at, length, text)
        return "answered"

    def _wait(self, why: str) -> str:
        time.sleep(0.2)
        return why

    def spoil(self, drive: Any, file: str, seconds: float) -> None:
        """Let every read of a file fail for some time."""
        self.faults_until = float("inf")
        drive.plan(broken=[file, 0, 1 << 60])
        time.sleep(seconds)
        drive.plan()
        self.faults_until = time.monotonic() + LATE_S
