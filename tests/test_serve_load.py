"""Many clients at once, some of whom leave or talk nonsense: every answer is still the solo one."""

import random
import threading
import time
from collections import Counter

import httpx2 as httpx
import pytest
from serving import serving
from small_store import write_store

import zipmoe
from zipmoe.generate import generate
from zipmoe.serve.limits import Limits

LEAVING, NONSENSE = 1 / 3, 0.02
PROMPTS = [[{"role": "user", "content": "ab" * n}] for n in range(1, 13)]
LENGTHS = (1, 5, 20, 60)
BAD = [
    {"content": b"{", "headers": {"content-type": "application/json"}},
    {"json": {"model": "tiny"}},
    {"json": {"model": "tiny", "messages": PROMPTS[0], "max_tokens": 10**9}},
    {"json": {"model": "other", "messages": PROMPTS[0]}},
    {"json": {"model": "tiny", "messages": PROMPTS[0], "temperature": "hot"}},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("load"))


class Clients:
    """Clients that ask until `end`. `counts`: how their requests ended."""

    def __init__(self, url, expected, end, seed):
        self.url, self.expected, self.end, self.seed = url, expected, end, seed
        self.counts, self.wrong = Counter(), []

    def run(self, number):
        draw = random.Random(f"{self.seed}-{number}")
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < self.end:
                try:
                    self.counts[self.ask(client, draw)] += 1
                except Exception as error:  # noqa: BLE001 - the test shows it
                    self.wrong.append(repr(error))
                    return

    def ask(self, client, draw):
        if draw.random() < NONSENSE:
            status = client.post("/v1/chat/completions", **draw.choice(BAD)).status_code
            assert status in {400, 404, 422}, status
            return "nonsense"
        at, length = draw.randrange(len(PROMPTS)), draw.choice(LENGTHS)
        fields = {"model": "tiny", "messages": PROMPTS[at], "temperature": 0, "max_tokens": length}
        if draw.random() < LEAVING:
            with client.stream(
                "POST", "/v1/chat/completions", json=fields | {"stream": True}
            ) as response:
                for _, _ in zip(response.iter_lines(), range(draw.randrange(1, 8)), strict=False):
                    pass
            return "left"
        response = client.post("/v1/chat/completions", json=fields)
        if response.status_code == 429:
            time.sleep(0.05)
            return "queue full"
        assert response.status_code == 200, response.text
        text = response.json()["choices"][0]["message"]["content"]
        assert text == self.expected[at, length], (at, length, text)
        return "answered"


def solo(store):
    """Answers of one client alone, by prompt and length: a shorter one begins the longest."""
    expected = {}
    with zipmoe.load(store, memory="16GB", context=200) as loaded:
        for at, prompt in enumerate(PROMPTS):
            tokens = generate(loaded, prompt, max_tokens=max(LENGTHS)).token_ids
            for length in LENGTHS:
                said = loaded.tokenizer.decode(tokens[:length], skip_special_tokens=True)
                expected[at, length] = said
    return expected


def load(store, clients, seconds, seed):
    """Let clients loose on a server; return their counts and the server's account of memory."""
    expected = solo(store)
    limits = Limits(streams=16, queue=32)
    with serving(store, context=200, limits=limits) as served:
        crowd = Clients(served.url, expected, time.monotonic() + seconds, seed)
        threads = [threading.Thread(target=crowd.run, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert crowd.wrong == []
        end = time.monotonic() + 5
        while any(served.service.scheduler.load()[k] for k in ("running", "waiting")):
            assert time.monotonic() < end
        assert served.service.scheduler._room.reserved == 0
        assert served.service.scheduler.status() == ("ok", None)
    assert served.streams.open_streams == 0
    return crowd.counts


def test_a_crowd_gets_the_answers_that_each_would_get_alone(store):
    counts = load(store, clients=12, seconds=6, seed=1)
    assert counts["answered"] > 10
    assert counts["left"] > 3


@pytest.mark.soak
def test_a_large_crowd_gets_the_answers_that_each_would_get_alone(store, soak_record):
    counts = load(store, clients=64, seconds=180, seed=soak_record.seed)
    soak_record("64 clients for 3 minutes", **counts)
    assert counts["answered"] > 100
    assert counts["left"] > 50
    assert counts["nonsense"] > 0
