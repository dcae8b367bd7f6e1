"""A prompt reads each expert once, the next layer's early, and leaves a stream what it uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from synthetic_shards import make_shards
from transformers import DynamicCache

import zipmoe
from zipmoe import _core
from zipmoe.recording import RoutingRecording
from zipmoe.store import open_store

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, EXPERTS = 8, 32
FAVOURITES = 6  # of each layer


def step(rng: np.random.Generator) -> list[list[int]]:
    """What a token of a stream in the middle of its answer chooses: two of few, in each layer."""
    return [rng.permutation(FAVOURITES)[:2].tolist() for _ in range(LAYERS)]


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_long_prompt_leaves_a_stream_what_it_uses(looks_ahead: bool, tmp_path: Path) -> None:
    shapes = ((4, 64), (4, 64), (64, 4))
    shards = make_shards(tmp_path, layers=LAYERS, experts=EXPERTS, shapes=shapes)
    cache = shards.open(slots=LAYERS * FAVOURITES + 16)
    rng = np.random.default_rng(4)

    def run(chosen: list[list[int]], num_tokens: int) -> int:
        misses = cache.counters()["misses"]
        for layer, experts in enumerate(chosen):
            tokens = [num_tokens * 2 // len(experts)] * len(experts)
            cache.prefetch(layer, sorted(experts), tokens, num_tokens)
            if looks_ahead and layer + 1 < LAYERS:
                cache.look_ahead(layer + 1, sorted(chosen[layer + 1]))
            for expert in sorted(experts):
                shards.check_expert(cache, layer, expert)
        return int(cache.counters()["misses"] - misses)

    cache.begin_request()
    for _ in range(60):
        run(step(rng), 1)
    assert sum(run(step(rng), 1) for _ in range(20)) == 0
    cache.begin_request(0.5)
    run([list(range(EXPERTS))] * LAYERS, 500)
    assert sum(run(step(rng), 1) for _ in range(20)) <= 2
    cache.close()


def part_of_a_layer(loaded: Any, layers: float) -> int:
    """Let the model read from a cold cache for so many layers' experts; bytes of all experts."""
    with open_store(loaded.runtime.folder) as store:
        paths, table = store.expert_table()
    ends = table[:, 13] + (table[:, 14] + 4095) // 4096 * 4096
    records = [
        int(ends[rows][-1] - table[rows][0, 10])
        for expert in np.unique(table[:, :2], axis=0)
        for rows in [(table[:, :2] == expert).all(axis=1)]
    ]
    slots = round(len(records) / len(loaded.runtime.source.layers) * layers)
    floor = _core.ExpertCache.floor_bytes(table)
    loaded.runtime.source.cache.close()
    cache = _core.ExpertCache(
        paths, table, capacity_bytes=floor + (slots - 2) * (max(records) + 1000)
    )
    assert cache.slots == slots
    loaded.runtime.source.cache = cache
    return sum(records)


@pytest.mark.parametrize("layers", [0.5, 1.0, 1.5])
def test_each_expert_is_read_once_and_the_next_layers_before_this_one_ends(
    layers: float, family_store: Any
) -> None:
    with zipmoe.load(family_store("qwen3_moe"), memory="64GB") as loaded, torch.no_grad():
        model, all_bytes = loaded.model, part_of_a_layer(loaded, layers)
        cache, generator = loaded.runtime.cache, torch.Generator().manual_seed(7)
        ids = torch.randint(3, model.config.vocab_size, (1, 400), generator=generator)
        ahead = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_: ahead.append(cache.counters()["ahead_reads"]))
        with RoutingRecording(model, loaded.runtime.source) as recording:
            model(ids, past_key_values=DynamicCache(config=model.config))
        chosen = recording.trace().experts
        for layer in range(chosen.shape[1]):
            assert len(np.unique(chosen[:, layer])) == loaded.runtime.source.layers[layer].experts
        counters = cache.counters()
        assert counters["bytes_read"] == all_bytes
        assert counters["ahead_used"] == counters["ahead_reads"]
        assert all(np.diff([0, *ahead])[:-1] > 0)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])  # with a shared expert
def test_more_tokens_than_are_multiplied_in_one_go_give_the_bits_of_pieces(
    name: str, family_store: Any
) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded, torch.no_grad():
        model, generator = loaded.model, torch.Generator().manual_seed(7)
        ids = torch.randint(3, model.config.vocab_size, (1, 1100), generator=generator)
        found = []
        for pieces in ([ids], ids.split(400, dim=1)):
            past = DynamicCache(config=model.config)
            found.append(torch.cat([model(p, past_key_values=past).logits for p in pieces], dim=1))
        assert torch.equal(*found)
