"""A forward pass lets another thread's urgent steps pass in its middle, and goes on: same bits."""

from __future__ import annotations

import shutil
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import pytest
import torch
from synthetic_shards import flip_bit
from transformers import DynamicCache

import zipmoe
from zipmoe import _core
from zipmoe._errors import CorruptError
from zipmoe.recording import RoutingRecording
from zipmoe.store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT, STEPS = 600, 12  # more than are multiplied in one go
PATIENCE = 120  # seconds


def tokens(model: Any, count: int, seed: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (1, count), generator=generator)


class Stream:
    """A request: a short prompt, then one forced token after the other."""

    def __init__(self, model: Any) -> None:
        self._model, self._ids = model, tokens(model, 5 + STEPS, 2)
        self._past: Any = None
        self.at = 0

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        if self.at == 0:
            self._past = DynamicCache(config=self._model.config)
        begin, end = (0, 5) if self.at == 0 else (4 + self.at, 5 + self.at)
        self.at = (self.at + 1) % (STEPS + 1)
        logits: torch.Tensor = self._model(
            self._ids[:, begin:end], past_key_values=self._past
        ).logits
        return logits[0, -1]


class Prefill(threading.Thread):
    """Runs the same prompt over and over, in a thread of its own, until it is told to stop."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model, self._ids = model, tokens(model, PROMPT, 1)
        self.ends = threading.Event()
        self.results: list[torch.Tensor] = []
        self.error: Exception | None = None

    @torch.no_grad()
    def once(self) -> torch.Tensor:
        past = DynamicCache(config=self._model.config)
        logits: torch.Tensor = self._model(self._ids, past_key_values=past).logits
        return logits[0]

    def run(self) -> None:
        try:
            while not self.ends.is_set():
                self.results.append(self.once())
        except Exception as error:  # noqa: BLE001  for the test to look at
            self.error = error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.join(PATIENCE)
        assert not self.is_alive(), "the prefill hangs"


def give_few_slots(loaded: Any, paths: Callable[[str], str] = str) -> None:
    """Let the model read from a cache that holds a fraction of its experts."""
    with open_store(loaded.runtime.folder) as store:
        found, table = store.expert_table()
    floor = _core.ExpertCache.floor_bytes(table)
    loaded.runtime.source.cache.close()
    cache = _core.ExpertCache(
        [paths(path) for path in found], table, capacity_bytes=floor + 100_000
    )
    assert 2 <= cache.slots < len(table) // 3
    loaded.runtime.source.cache = cache


def visits(loaded: Any) -> int:
    counters = loaded.runtime.cache.counters()
    return counters["hits"] + counters["misses"]


def suspensions(loaded: Any) -> int:
    found: int = loaded.runtime.source.engine.counters()["suspensions"]
    return found


# In one call, attention and experts by themselves, product by product.
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("slots", ["few", "all"])
def test_steps_in_the_middle_of_a_prefill_change_no_bit(
    name: str, slots: str, family_store: Any
) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        if slots == "few":
            give_few_slots(loaded)
        loaded.runtime.announces_requests = False
        model, engine = loaded.model, loaded.runtime.source.engine
        stream, prefill = Stream(model), Prefill(model)
        expected_prompt = prefill.once()
        expected = [stream.step() for _ in range(STEPS + 1)]
        before, counted = visits(loaded), []
        for work in (prefill.once, lambda: [stream.step() for _ in range(STEPS + 1)]):
            work()
            counted.append(visits(loaded) - before - sum(counted))
        before, rounds, until = visits(loaded), 0, time.monotonic() + PATIENCE
        with prefill:
            # Families whose experts are not one call wait between two calls instead.
            while (
                rounds < 3 or not prefill.results or (name != "gpt_oss" and suspensions(loaded) < 5)
            ):
                assert time.monotonic() < until
                for step in expected:
                    with engine.urgent():
                        assert torch.equal(stream.step(), step)
                rounds += 1
        assert prefill.error is None
        for result in prefill.results:
            assert torch.equal(result, expected_prompt)
        if name != "gpt_oss":  # there each product is a visit of its own to whoever comes between
            assert (
                visits(loaded) - before == len(prefill.results) * counted[0] + rounds * counted[1]
            )


def test_an_urgent_step_waits_for_one_group_and_nobody_is_in_its_way_then(
    family_store: Any,
) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        give_few_slots(loaded)
        engine, head = loaded.runtime.source.engine, loaded.model.lm_head
        x = torch.zeros(1, head.weight.shape[1], dtype=torch.bfloat16)
        waited, took, until = [], 0.0, time.monotonic() + PATIENCE
        with Prefill(loaded.model), torch.no_grad():
            while len(waited) < 300 or suspensions(loaded) < 20:
                assert time.monotonic() < until
                time.sleep(2 * took)  # until the prefill has had what the last block owes it
                begin = time.monotonic()
                with engine.urgent():
                    first = engine.counters()["groups"]
                    head(x)
                    second = engine.counters()["groups"]
                    for _ in range(3):
                        head(x)
                    time.sleep(0.0005)
                    assert engine.counters()["groups"] == second
                waited.append(second - first)
                took = time.monotonic() - begin
        # A thread that woke late is owed more than was waited for here.
        assert sum(groups > 1 for groups in waited) < len(waited) / 10


def test_urgent_blocks_without_a_pause_do_not_stop_a_prefill(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded, torch.no_grad():
        engine, head = loaded.runtime.source.engine, loaded.model.lm_head
        x = torch.zeros(1, head.weight.shape[1], dtype=torch.bfloat16)
        until = time.monotonic() + PATIENCE
        with Prefill(loaded.model) as prefill:
            blocks, waits = 0, suspensions(loaded)
            block = engine.urgent()
            block.__enter__()
            while len(prefill.results) < 2:
                assert time.monotonic() < until
                following = engine.urgent()
                following.__enter__()  # so that somebody is urgent at every moment
                block.__exit__()
                head(x)
                block, blocks = following, blocks + 1
            block.__exit__()
        assert blocks > 0
        assert suspensions(loaded) > waits


def test_a_prefill_gets_more_time_than_urgent_blocks_without_a_pause(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded, torch.no_grad():
        give_few_slots(loaded)
        engine, prefill = loaded.runtime.source.engine, Prefill(loaded.model)
        prefill.once()
        alone = max(seconds_of(prefill.once) for _ in range(3))
        begin, blocks, groups = time.monotonic(), 0, engine.counters()["groups"]
        with prefill:
            while len(prefill.results) < 5:
                assert time.monotonic() < begin + PATIENCE
                with engine.urgent():
                    time.sleep(alone / 4)
                blocks += 1
        groups = engine.counters()["groups"] - groups
    # Else it would have a group's time after each block.
    assert blocks < groups / 4
    assert blocks < 5 * 8


def seconds_of(call: Callable[[], Any]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def test_an_error_in_a_step_leaves_the_prefill_whole(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        give_few_slots(loaded)
        engine, prefill = loaded.runtime.source.engine, Prefill(loaded.model)
        expected, until = prefill.once(), time.monotonic() + PATIENCE

        def fail_after_a_step(stream: Stream) -> None:
            stream.step()
            raise ZeroDivisionError

        with prefill:
            while suspensions(loaded) < 10 or not prefill.results:
                assert time.monotonic() < until
                with pytest.raises(ZeroDivisionError), engine.urgent():
                    fail_after_a_step(Stream(loaded.model))
                with pytest.raises(ValueError, match="expert"), engine.urgent():
                    engine.multiply_expert(loaded.runtime.cache, 0, 1 << 40, 0, 0, 0, 0, 0, 0)
        assert prefill.error is None
        assert all(torch.equal(result, expected) for result in prefill.results)


def test_an_error_in_the_prefill_leaves_steps_whole(family_store: Any, tmp_path: Path) -> None:
    store = shutil.copytree(family_store("qwen2_moe"), tmp_path / "copy")
    with zipmoe.load(store, memory="64GB") as loaded:
        model, engine = loaded.model, loaded.runtime.source.engine
        stream, prefill = Stream(model), Prefill(model)
        with RoutingRecording(model, loaded.runtime.source) as recording:
            expected = [stream.step() for _ in range(STEPS + 1)]
        last = len(loaded.runtime.source.layers) - 1
        chosen = set(recording.trace().experts[:, last].reshape(-1).tolist())
        unused = next(e for e in range(99) if e not in chosen)  # by the stream
        with open_store(store) as opened:
            paths, table = opened.expert_table()
        row = table[(table[:, :3] == (last, unused, 0)).all(axis=1)][0]
        flip_bit(paths[int(row[3])], int(row[10]))
        give_few_slots(loaded)
        until = time.monotonic() + PATIENCE
        while suspensions(loaded) < 3:
            assert time.monotonic() < until
            prefill = Prefill(model)
            with prefill:
                while prefill.is_alive():
                    for step in expected:
                        with engine.urgent():
                            assert torch.equal(stream.step(), step)
            assert isinstance(prefill.error, CorruptError)
            assert (prefill.error.layer, prefill.error.expert) == (last, unused)
            assert not prefill.results


def test_closing_while_a_prefill_is_suspended_ends_it(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        engine, until = loaded.runtime.source.engine, time.monotonic() + PATIENCE
        with Prefill(loaded.model) as prefill:
            while True:
                assert time.monotonic() < until
                before = suspensions(loaded)
                with engine.urgent():
                    time.sleep(0.01)
                    if suspensions(loaded) > before:
                        loaded.runtime.cache.close()
                        break
        assert isinstance(prefill.error, ValueError)
        assert "closed" in str(prefill.error)
        with engine.urgent(), pytest.raises(ValueError, match="closed"):
            Stream(loaded.model).step()


def test_an_urgent_block_is_entered_once() -> None:
    block = _core.Engine(threads=1).urgent()
    with block, pytest.raises(ValueError, match="once"):
        block.__enter__()
