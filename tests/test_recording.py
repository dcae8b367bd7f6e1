"""Recording of routing: what is recorded is what the routers chose, on every path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import zipmoe
from zipmoe._errors import TraceError
from zipmoe.recording import RoutingRecording
from zipmoe.streams import Streams

if TYPE_CHECKING:
    from pathlib import Path

# A whole layer in one call, an MoE block in one call, experts product by product.
NAMES = ["qwen2_moe", "deepseek_v3", "gpt_oss"]
PROMPT = torch.tensor([[5, 9, 2, 7, 1, 3]])
NEW_TOKENS = 5


def generate(model: Any, ids: torch.Tensor = PROMPT) -> Any:
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **options)


def choices_of_stock(folder: Path) -> tuple[Any, Any]:
    """[tokens, layers, k] of transformers' own routers while it generates, and what came out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    modules = [m for name, m in model.named_modules() if name.endswith(".experts")]
    seen: list[list[Any]] = [[] for _ in modules]
    for number, module in enumerate(modules):
        module.register_forward_pre_hook(
            lambda _, args, number=number: seen[number].append(args[1].clone())
        )
    answer = generate(model)
    layers = [torch.cat(parts).numpy() for parts in seen]
    return np.stack(layers, axis=1), answer


@pytest.mark.parametrize("name", NAMES)
def test_with_torch_the_choices_are_those_of_stock_routers(name: str, family_store: Any) -> None:
    store = family_store(name)
    expected, answer = choices_of_stock(store.parent / "checkpoint")
    with zipmoe.load(store, memory="64GB", compute="torch") as loaded:
        with RoutingRecording(loaded.model, loaded.runtime.source) as recording:
            assert torch.equal(generate(loaded.model), answer)
        generate(loaded.model)  # not recorded any more
    trace = recording.trace()
    assert np.array_equal(trace.experts, expected)
    assert trace.tokens.tolist() == [6, 1, 1, 1, 1]
    assert trace.is_decode.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_with_native_compute_the_choices_are_those_that_experts_were_read_for(
    name: str, family_store: Any
) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        before = loaded.runtime.cache.counters()
        with RoutingRecording(loaded.model, loaded.runtime.source) as recording:
            answer = generate(loaded.model)
        after = loaded.runtime.cache.counters()
        assert torch.equal(generate(loaded.model), answer)
        assert after["hits"] + after["misses"] > before["hits"] + before["misses"]
    trace = recording.trace()
    visits = sum(
        len(step.activated(layer)[0]) for step in trace.steps() for layer in range(trace.num_layers)
    )
    counted = sum(after[name] - before[name] for name in ("hits", "misses"))
    assert visits == counted
    stock, _ = choices_of_stock(family_store(name).parent / "checkpoint")
    alike = np.sort(trace.experts[:6], axis=2) == np.sort(stock[:6], axis=2)  # of the prompt
    assert alike.mean() > 0.9


def test_each_sequence_of_a_batch_and_each_new_one_is_a_request(family_store: Any) -> None:
    with (
        zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded,
        RoutingRecording(loaded.model, loaded.runtime.source) as recording,
    ):
        generate(loaded.model, PROMPT.repeat(2, 1))
        generate(loaded.model)
        loaded.model(PROMPT, use_cache=False)
        loaded.model(input_ids=PROMPT[:, :1], use_cache=False)
    trace = recording.trace()
    assert trace.request.tolist() == [0, 1] * NEW_TOKENS + [2] * NEW_TOKENS + [3, 4]
    assert trace.tokens.tolist() == [6, 6] + [1, 1] * 4 + [6, 1, 1, 1, 1, 6, 1]
    twice = trace.experts[:12].reshape(2, 6, trace.num_layers, trace.top_k)
    assert np.array_equal(twice[0], twice[1])


def test_streams_side_by_side_are_the_requests_that_they_are(family_store: Any) -> None:
    with (
        zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded,
        RoutingRecording(loaded.model, loaded.runtime.source) as recording,
    ):
        streams = Streams(loaded)
        opened = [streams.open() for _ in range(3)]
        for stream in opened[:2]:
            streams.prefill(stream, [5, 9, 2])
        streams.decode(opened[1::-1], [7, 8])
        streams.prefill(opened[2], [1])
        streams.decode(opened, [3, 3, 3])
        streams.prefill(opened[1], [1, 2])  # the conversation goes on
        streams.truncate(opened[0], 0)
        streams.prefill(opened[0], [4])
        past = loaded.model(PROMPT, use_cache=True).past_key_values
        loaded.model(PROMPT[:, :1], past_key_values=past)
    trace = recording.trace()
    assert trace.request.tolist() == [0, 1, 1, 0, 2, 0, 1, 2, 1, 3, 4, 4]
    assert trace.tokens.tolist() == [3, 3, 1, 1, 1, 1, 1, 1, 2, 1, 6, 1]


@pytest.mark.parametrize("compute", ["native", "torch"])
def test_a_pass_that_fails_leaves_no_trace(compute: str, family_store: Any) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with zipmoe.load(family_store("qwen2_moe"), memory="64GB", compute=compute) as loaded:
        with RoutingRecording(loaded.model, loaded.runtime.source) as recording:
            broken = loaded.model.lm_head.register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                loaded.model(PROMPT)
            broken.remove()
            with pytest.raises(TraceError, match="no step"):
                recording.trace()
            loaded.model(PROMPT[:, :4])
            with pytest.raises(RuntimeError, match="already"):
                RoutingRecording(loaded.model, loaded.runtime.source).__enter__()
        assert recording.trace().tokens.tolist() == [4]
        assert recording.steps == 1


def test_the_cache_is_told_when_a_request_begins(family_store: Any) -> None:
    class Spy:
        def __init__(self, cache: Any) -> None:
            self.cache, self.shares = cache, []

        def begin_request(self, share: float = 1.0) -> None:
            self.shares.append(share)
            self.cache.begin_request(share)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.cache, name)

    with zipmoe.load(family_store("qwen2_moe"), memory="64GB", compute="torch") as loaded:
        spy = loaded.runtime.source.cache = Spy(loaded.runtime.source.cache)  # type: ignore[assignment]
        generate(loaded.model)
        assert spy.shares == [1.0]
        generate(loaded.model)
        loaded.model(PROMPT)
        assert spy.shares == [1.0] * 3
