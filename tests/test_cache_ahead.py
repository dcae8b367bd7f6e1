"""Reading ahead: only while the drive would be idle, and never at the cost of what is wanted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from invariance import prompts
from synthetic_shards import make_shards
from transformers import DynamicCache

import zipmoe
from zipmoe._errors import CorruptError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_shards(tmp_path_factory.mktemp("shards"))


def wait_until(cache: Any, **counters: int) -> None:
    """Until the counters have reached these values; fails after a while."""
    for _ in range(2000):
        now = cache.counters()
        if all(now[name] >= value for name, value in counters.items()):
            return
        time.sleep(0.005)
    raise AssertionError(f"{cache.counters()} never became {counters}")


def test_what_is_looked_ahead_for_is_read_and_then_found(shards: Any) -> None:
    cache = shards.open(slots=4)
    cache.look_ahead(1, [2, 3])
    wait_until(cache, ahead_reads=2)
    cache.prefetch(1, [2, 3])
    for expert in (2, 3):
        shards.check_expert(cache, 1, expert)
    counters = cache.counters()
    assert (counters["hits"], counters["misses"], counters["ahead_used"]) == (2, 0, 2)
    assert counters["ahead_wasted"] == 0
    cache.close()


def test_a_wrong_guess_is_counted_and_makes_room(shards: Any) -> None:
    cache = shards.open(slots=2)
    cache.look_ahead(1, [0, 1])
    wait_until(cache, ahead_reads=2)
    assert (cache.held, cache.counters()["ahead_wasted"]) == ([0, 2, 0, 0, 10], 0)
    cache.prefetch(0, [2, 3])
    for expert in (2, 3):
        shards.check_expert(cache, 0, expert)
    counters = cache.counters()
    assert (counters["misses"], counters["ahead_used"], counters["evictions"]) == (2, 0, 2)
    assert (cache.held, counters["ahead_wasted"]) == ([0, 2, 0, 0, 10], 2)
    cache.close()


def test_what_is_wanted_now_is_not_dropped_for_a_guess(shards: Any) -> None:
    cache = shards.open(slots=2)
    cache.prefetch(0, [0, 1])  # both slots are awaited
    cache.look_ahead(1, [0, 1, 2, 3])
    time.sleep(0.2)
    assert cache.counters()["ahead_reads"] == 0
    shards.check_expert(cache, 0, 0)  # its slot may be taken now
    wait_until(cache, ahead_reads=1)
    shards.check_expert(cache, 0, 1)
    assert cache.counters()["misses"] == 2
    cache.close()


def test_a_guess_that_is_there_is_kept_rather_than_others(shards: Any) -> None:
    cache = shards.open(slots=3)
    for expert in (0, 1, 2):  # 0 is the one used longest ago
        shards.check_expert(cache, 0, expert)
    cache.look_ahead(0, [0])
    shards.check_expert(cache, 1, 0)
    shards.check_expert(cache, 0, 0)
    counters = cache.counters()
    assert (counters["hits"], counters["misses"], counters["ahead_reads"]) == (1, 4, 0)
    cache.close()


def test_guesses_are_forgotten_when_something_else_is_wanted(shards: Any) -> None:
    cache = shards.open(slots=2)
    rng = np.random.default_rng(2)
    for _ in range(200):
        layer, experts = int(rng.integers(2)), rng.permutation(4)[:2].tolist()
        cache.look_ahead(1 - layer, rng.permutation(4).tolist())
        cache.prefetch(layer, experts)
        cache.look_ahead(1 - layer, rng.permutation(4)[:2].tolist())
        for expert in experts:
            shards.check_expert(cache, layer, expert)
    counters = cache.counters()
    assert counters["ahead_used"] <= counters["ahead_reads"]
    assert counters["hits"] + counters["misses"] == 400
    cache.close()


def test_a_guess_that_cannot_be_read_fails_nobody_but_who_asks_for_it(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, layers=1, experts=4)
    path = next(tmp_path.glob("*.safetensors"))
    cache = shards.open(slots=3)
    with path.open("r+b") as file:  # the last expert's bytes
        file.seek(path.stat().st_size - 4096)
        file.write(b"\xff" * 4096)
    cache.look_ahead(0, [3])
    wait_until(cache, read_errors=1)
    wait_until(cache, ahead_wasted=1)
    for expert in (0, 1, 2):
        shards.check_expert(cache, 0, expert)
    with pytest.raises(CorruptError):
        shards.check_expert(cache, 0, 3)
    shards.check_expert(cache, 0, 0)
    cache.close()


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])  # from the second one's dense layer
def test_looking_ahead_changes_no_bit(name: str, family_store: Any) -> None:
    found = []
    for looks in (True, False):
        with zipmoe.load(family_store(name), memory="64GB", lookahead=looks) as loaded:
            loaded.runtime.source.cache.close()
            loaded.runtime.source.cache = few_slots(loaded)
            ids = prompts(loaded.model, 1)[0]
            found.append([with_cache(loaded.model, ids[:count]) for count in (23, 1, 7)])
            assert bool(loaded.runtime.cache.counters()["ahead_reads"]) == looks
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_cold_cache_with_room_for_all_is_looked_ahead_for(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen3_moe"), memory="64GB") as loaded:
        ids = prompts(loaded.model, 1)[0]
        with_cache(loaded.model, ids[:1])
        assert loaded.runtime.cache.counters()["ahead_reads"] > 0
        with_cache(loaded.model, ids.repeat(8))  # every expert of every layer
        full = loaded.runtime.cache.counters()
        with_cache(loaded.model, ids[:7])
        again = loaded.runtime.cache.counters()
        assert again["ahead_reads"] == full["ahead_reads"]
        assert again["misses"] == full["misses"]


@pytest.mark.parametrize("looks", [True, False])
def test_a_long_prompt_has_its_first_experts_read_before_a_layer_runs(
    family_store: Any, looks: bool
) -> None:
    with zipmoe.load(family_store("qwen3_moe"), memory="64GB", lookahead=looks) as loaded:
        cache, read = loaded.runtime.cache, []
        loaded.model.model.layers[0].register_forward_pre_hook(
            lambda *_: read.append(cache.counters()["ahead_reads"])
        )
        experts = loaded.runtime.source.layers[0].experts
        ids = prompts(loaded.model, 1)[0].repeat(8)
        with_cache(loaded.model, ids[: 2 * experts - 1])
        assert read.pop() == 0
        loaded.runtime.cache.limit(0)  # what it has goes
        with_cache(loaded.model, ids[: 2 * experts])
        assert (read.pop() > 0) == looks


@torch.no_grad()
def with_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits as generation computes them: layers in one call."""
    logits: torch.Tensor = model(
        ids[None], past_key_values=DynamicCache(config=model.config)
    ).logits
    return logits[0]


def few_slots(loaded: Any) -> Any:
    """Make a cache that holds less than the experts of two layers."""
    from zipmoe import _core  # noqa: PLC0415
    from zipmoe.store import open_store  # noqa: PLC0415

    with open_store(loaded.runtime.folder) as store:
        paths, table = store.expert_table()
    floor = _core.ExpertCache.floor_bytes(table)
    cache = _core.ExpertCache(paths, table, capacity_bytes=floor + 100_000)
    assert 4 <= cache.slots < len(table) // 3
    return cache


def test_what_was_read_ahead_stays_until_the_next_list(shards: Any) -> None:
    # Whatever a policy thinks of an expert that nobody has used yet.
    cache = shards.open(slots=4)
    for _ in range(4):
        for expert in (0, 1, 2, 3):
            cache.prefetch(0, [expert])
            shards.check_expert(cache, 0, expert)
    cache.prefetch(0, [0])
    shards.check_expert(cache, 0, 0)
    cache.look_ahead(1, [5])
    wait_until(cache, ahead_reads=1)
    for expert in (4, 5):  # asked for without a list
        shards.check_expert(cache, 0, expert)
    cache.prefetch(1, [5])
    shards.check_expert(cache, 1, 5)
    assert cache.counters()["ahead_used"] == 1
    cache.close()


def test_a_guess_that_was_wrong_and_a_list_that_was_not_used_go_at_the_next_list(
    shards: Any,
) -> None:
    cache = shards.open(slots=2)
    sizes = [shards.record(layer, expert)[2] for layer in (0, 1) for expert in (0, 1, 2, 3)]
    cache.look_ahead(0, [0, 1])
    wait_until(cache, ahead_reads=2, bytes_read=sum(sizes[:2]))
    cache.prefetch(0, [2, 3])  # in the places of both guesses
    wait_until(cache, bytes_read=sum(sizes[:4]))
    cache.prefetch(1, [0, 1])  # in those of what was listed
    wait_until(cache, bytes_read=sum(sizes[:6]))
    assert cache.counters()["evictions"] == 4
    cache.close()
