"""Streams: each one's logits are those it has alone, whoever comes, goes or waits beside it."""

from __future__ import annotations

import random
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from small_store import write_store
from test_cache_ahead import few_slots

import zipmoe
from zipmoe import kv
from zipmoe.blocks import NativeAttention
from zipmoe.streams import Stream, Streams

RAGGED = ["qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe"]
# Latent attention, a window that slides, recurrent layers, rotations in FP32.
IN_TURNS = ["deepseek_v3", "gpt_oss", "qwen3_next", "flex_olmo"]
ANSWER = 4


def text(loaded: zipmoe.Loaded, rng: random.Random) -> list[int]:
    """Token ids of some length."""
    most = loaded.model.config.get_text_config(decoder=True).vocab_size
    return [rng.randrange(3, most) for _ in range(rng.randrange(ANSWER + 1, 60))]


@torch.no_grad()
def alone(loaded: zipmoe.Loaded, ids: list[int], begin: int) -> torch.Tensor:
    """Logits [tokens, vocabulary] from token begin - 1 on, of the model itself, token by token."""
    out = loaded.model(torch.tensor([ids[:begin]]), use_cache=True)
    rows = [out.logits[0, -1]]
    for token in ids[begin:]:
        out = loaded.model(torch.tensor([[token]]), past_key_values=out.past_key_values)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("name", RAGGED + IN_TURNS)
def test_any_number_of_streams_has_the_logits_that_each_has_alone(
    name: str, family_store: Any
) -> None:
    rng = random.Random(0)
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        streams = Streams(loaded)
        for count in (1, 2, 5, 17) if name in RAGGED else (2,):
            ids = [text(loaded, rng) for _ in range(count)]
            expected = [alone(loaded, one, len(one) - ANSWER) for one in ids]
            opened = [streams.open() for _ in ids]
            for stream, one, logits in zip(opened, ids, expected, strict=True):
                assert torch.equal(streams.prefill(stream, one[:-ANSWER]), logits[0])
            for step in range(1, ANSWER + 1):
                rows = streams.decode(opened, [one[step - ANSWER - 1] for one in ids])
                assert rows.dtype is logits.dtype
                assert torch.equal(rows, torch.stack([logits[step] for logits in expected]))
            assert [stream.tokens for stream in opened] == ids
        assert streams.is_ragged == (name in RAGGED)


@dataclass
class Request:
    """A stream that must get what its tokens get alone."""

    stream: Stream
    ids: list[int]
    expected: torch.Tensor  # of all tokens
    seen: int = field(default=0)

    def check(self, logits: torch.Tensor, count: int) -> None:
        self.seen += count
        assert torch.equal(logits, self.expected[self.seen - 1])


class Company:
    """Streams that come, go, decode, go back and are read further, at random."""

    def __init__(self, loaded: zipmoe.Loaded, seed: int) -> None:
        self.loaded, self.rng = loaded, random.Random(seed)
        self.streams = Streams(loaded)
        self.running: list[Request] = []
        self.widths: set[int] = set()

    def join(self) -> None:
        ids = text(self.loaded, self.rng)
        request = Request(self.streams.open(), ids, alone(self.loaded, ids, 1))
        self.running.append(request)
        self.read(request, self.rng.randrange(1, len(ids)))

    def read(self, request: Request, count: int) -> None:
        part = request.ids[request.seen : request.seen + count]
        request.check(self.streams.prefill(request.stream, part), len(part))

    def read_on(self) -> None:
        request = self.rng.choice(self.running)
        left = len(request.ids) - request.seen
        if left:
            self.read(request, self.rng.randrange(1, left + 1))

    def go_back(self) -> None:
        request = self.rng.choice(self.running)
        length = self.rng.randrange(request.seen)
        request.seen = self.streams.truncate(request.stream, length)
        assert request.seen in {0, length}
        assert request.stream.tokens == request.ids[: request.seen]
        self.read(request, min(self.rng.randrange(1, 9), len(request.ids) - request.seen))

    def step(self) -> None:
        able = [r for r in self.running if r.seen < len(r.ids)]
        for request in [r for r in self.running if r not in able]:
            self.leave(request)
        self.rng.shuffle(able)
        able = able[: self.rng.randrange(len(able) + 1)]
        if able:
            self.widths.add(len(able))
            streams = [request.stream for request in able]
            rows = self.streams.decode(streams, [r.ids[r.seen] for r in able])
            for request, row in zip(able, rows, strict=True):
                request.check(row, 1)

    def leave(self, request: Request) -> None:
        self.running.remove(request)
        self.streams.close(request.stream)

    def live(self, steps: int, most: int) -> None:
        for _ in range(steps):
            chance = self.rng.random()
            if len(self.running) < most and chance < 0.35:
                self.join()
            elif self.running and chance < 0.4:
                self.leave(self.rng.choice(self.running))
            elif self.running and chance < 0.5:
                self.go_back()
            elif self.running and chance < 0.58:
                self.read_on()
            else:
                self.step()


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_streams_that_come_and_go_change_nothing_for_the_others(
    name: str, family_store: Any
) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        company = Company(loaded, seed=len(name))
        company.live(120, most=7)
        assert max(company.widths) >= 5


def test_long_streams_grow_into_new_rooms(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        streams, rng = Streams(loaded), random.Random(1)
        ids = [text(loaded, rng) * 20 for _ in range(2)]
        ids = [one[: kv.room(1) + offset] for one, offset in zip(ids, (3, 60), strict=True)]
        begin = [kv.room(1) - 4, 3]
        expected = [alone(loaded, one, at) for one, at in zip(ids, begin, strict=True)]
        opened = [streams.open() for _ in ids]
        for stream, one, at in zip(opened, ids, begin, strict=True):
            streams.prefill(stream, one[:at])
        for step in range(7):
            rows = streams.decode(
                opened, [one[at + step] for one, at in zip(ids, begin, strict=True)]
            )
            for row, logits in zip(rows, expected, strict=True):
                assert torch.equal(row, logits[step + 1])
        assert opened[0].cache.layers[0].capacity == 2 * opened[1].cache.layers[0].capacity


def test_streams_whose_experts_are_read_again_and_again_have_the_same_bits(
    family_store: Any,
) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        company = Company(loaded, seed=3)
        company.live(30, most=5)
        loaded.runtime.cache.close()
        loaded.runtime.source.cache = few_slots(loaded)
        company.live(50, most=5)


def test_compute_torch_is_near_and_takes_turns(family_store: Any) -> None:
    rng = random.Random(2)
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB", compute="torch") as loaded:
        streams = Streams(loaded)
        assert not streams.is_ragged
        ids = [text(loaded, rng) for _ in range(3)]
        opened = [streams.open() for _ in ids]
        for stream, one in zip(opened, ids, strict=True):
            streams.prefill(stream, one[:-1])
        rows = streams.decode(opened, [one[-1] for one in ids])
        for row, one in zip(rows, ids, strict=True):
            expected = alone(loaded, one, len(one) - 1)[1]
            assert torch.allclose(row, expected, atol=0.05, rtol=0.05)
            assert row.argmax() == expected.argmax()


def test_a_step_reads_each_expert_once_for_all(family_store: Any) -> None:
    rng = random.Random(4)
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        streams = Streams(loaded)
        engine, cache = loaded.runtime.source.engine, loaded.runtime.cache
        opened = [streams.open() for _ in range(9)]
        for stream in opened:
            streams.prefill(stream, text(loaded, rng))
        calls, asked = engine.counters()["calls"], cache.counters()
        engine.record_routing(is_on=True)
        streams.decode(opened, [5] * 9)
        chosen = engine.take_routing()
        layers = loaded.model.config.num_hidden_layers
        assert engine.counters()["calls"] - calls == layers + 2  # embedding and head
        distinct = sum(len(set(experts)) for _, _, experts in chosen)
        assert [len(experts) // k for _, k, experts in chosen] == [9] * layers
        now = cache.counters()
        assert now["hits"] + now["misses"] - asked["hits"] - asked["misses"] == distinct


def test_a_closed_stream_frees_its_memory(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        streams = Streams(loaded)
        kept, gone = streams.open(), streams.open()
        for stream in (kept, gone):
            streams.prefill(stream, [5, 6, 7])
        streams.decode([kept, gone], [8, 9])
        held = [weakref.ref(layer) for layer in gone.cache.layers]
        held += [weakref.ref(space) for layer in gone.cache.layers for space in layer._rooms]
        assert all(ref() is not None for ref in held)
        streams.close(gone)
        streams.close(gone)
        assert all(ref() is None for ref in held)
        with pytest.raises(ValueError, match="closed"):
            streams.decode([kept, gone], [1, 2])
        streams.decode([kept], [1])


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_a_stream_that_is_closed_in_the_middle_of_its_prompt_ends(
    name: str, family_store: Any
) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        streams = Streams(loaded)
        gone, kept = streams.open(), streams.open()
        layers, seen = loaded.model.model.layers, []
        layers[0].register_forward_pre_hook(lambda *_: streams.close(gone))
        layers[-1].register_forward_hook(lambda *_: seen.append(1))
        with pytest.raises(kv.UnwantedError):
            streams.prefill(gone, [5, 6, 7])
        assert gone.cache is None
        assert gone.tokens == []
        assert not seen
        assert torch.equal(streams.prefill(kept, [5, 6]), alone(loaded, [5, 6], 2)[0])


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_what_a_stream_takes_is_within_what_is_set_aside(name: str, family_store: Any) -> None:
    with zipmoe.load(family_store(name), memory="64GB", context=512) as loaded:
        streams = Streams(loaded)
        for tokens in (1, 255, 256, 600):
            stream = streams.open()
            streams.prefill(stream, [5] * tokens)
            spaces = [space for layer in stream.cache.layers for space in layer._rooms]
            taken = sum(space.nbytes for space in spaces)
            most = loaded.runtime.stream_bytes(tokens)
            assert taken + 2 * max(space.nbytes for space in spaces) <= most
            assert most <= 2 * taken + 100


def test_a_copy_goes_on_as_the_whole_would_and_leaves_the_other_alone(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        streams = Streams(loaded)
        prompt, rest = [*range(3, 40)], [5, 6]
        one = streams.open()
        streams.prefill(one, prompt)
        streams.decode([one], [7])
        two = streams.fork(one, len(prompt) - 1)
        assert two is not None
        assert two.tokens == prompt[:-1]
        expected = alone(loaded, [*prompt, *rest], len(prompt))
        assert torch.equal(streams.prefill(two, prompt[-1:]), expected[0])
        for token, logits in zip(rest, expected[1:], strict=True):
            assert torch.equal(streams.decode([two], [token])[0], logits)
        both = streams.decode([one, two], [8, 8])
        assert torch.equal(both[0], alone(loaded, [*prompt, 7, 8], len(prompt) + 2)[0])
        assert streams.fork(one, 1000) is None


def test_what_cannot_be_parted_is_not_copied(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen3_next"), memory="64GB") as loaded:
        streams = Streams(loaded)
        one = streams.open()
        assert streams.fork(one, 0) is None
        streams.prefill(one, [3, 4, 5])
        assert streams.fork(one, 2) is None


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "qwen3_next"])
def test_a_step_that_fails_leaves_no_trace(name: str, family_store: Any) -> None:
    rng = random.Random(5)
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        streams = Streams(loaded)
        ids = [text(loaded, rng) for _ in range(3)]
        expected = [alone(loaded, one, len(one) - 2) for one in ids]
        opened = [streams.open() for _ in ids]
        for stream, one in zip(opened, ids, strict=True):
            streams.prefill(stream, one[:-2])

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        broken = loaded.model.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            streams.decode(opened, [3, 4, 5])
        with pytest.raises(ZeroDivisionError):
            streams.prefill(opened[0], [3, 4, 5])
        broken.remove()
        for stream, one in zip(opened, ids, strict=True):
            assert stream.tokens in ([], one[:-2])
            if not stream.tokens:
                assert name == "qwen3_next"
                streams.prefill(stream, one[:-2])
        assert torch.equal(streams.prefill(opened[0], ids[0][-2:-1]), expected[0][1])
        rows = streams.decode(opened[1:], [one[-2] for one in ids[1:]])
        assert torch.equal(rows, torch.stack([logits[1] for logits in expected[1:]]))
        rows = streams.decode(opened, [one[-1] for one in ids])
        assert torch.equal(rows, torch.stack([logits[2] for logits in expected]))


def test_requests_tell_the_cache_their_share(family_store: Any, monkeypatch: Any) -> None:
    class Spy:
        def __init__(self, cache: Any) -> None:
            self.cache, self.shares = cache, []

        def begin_request(self, share: float = 1.0) -> None:
            self.shares.append(share)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.cache, name)

    with zipmoe.load(family_store("qwen2_moe"), memory="64GB", compute="torch") as loaded:
        spy = Spy(loaded.runtime.source.cache)
        monkeypatch.setattr(loaded.runtime.source, "cache", spy)
        streams = Streams(loaded)
        opened = [streams.open() for _ in range(3)]
        streams.prefill(opened[0], [5, 6])
        streams.decode(opened[:1], [7])
        streams.prefill(opened[1], [5, 6])
        streams.decode(opened[:2], [7, 8])
        streams.prefill(opened[2], [5, 6])
        streams.truncate(opened[0], 1)
        streams.prefill(opened[0], [9])  # the next request of a conversation
        streams.close(opened[1])
        streams.prefill(opened[2], [9])
        assert spy.shares == [1, 1 / 2, 1 / 3, 1 / 2, 1 / 2]


def test_a_prompt_is_read_in_a_thread_of_its_own(family_store: Any) -> None:
    rng = random.Random(6)
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        streams = Streams(loaded)
        prompt, other = text(loaded, rng) * 8, text(loaded, rng)
        expected, own = alone(loaded, prompt, len(prompt))[0], alone(loaded, other, 1)
        stream, found = streams.open(), []
        streams.prefill(stream, other[:1])

        def read() -> None:
            for _ in range(5):
                reader = streams.open()
                found.append(streams.prefill(reader, prompt))
                streams.close(reader)

        thread = threading.Thread(target=read)
        thread.start()
        for n, token in enumerate(other[1:], 1):
            assert torch.equal(streams.decode([stream], [token])[0], own[n])
        thread.join(60)
        assert len(found) == 5
        assert all(torch.equal(logits, expected) for logits in found)


def test_where_attention_turns_out_not_to_be_native_streams_take_turns(family_store: Any) -> None:
    rng = random.Random(7)
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        streams = Streams(loaded)
        ids = [text(loaded, rng) for _ in range(3)]
        expected = [alone(loaded, one, len(one) - 2) for one in ids]
        opened = [streams.open() for _ in ids]
        for stream, one in zip(opened, ids, strict=True):
            streams.prefill(stream, one[:-2])
        attentions = [m for m in loaded.model.modules() if isinstance(m, NativeAttention)]
        attentions[-1].k_proj.register_forward_hook(lambda _, __, out: out)
        for step in (1, 2):
            rows = streams.decode(opened, [one[step - 3] for one in ids])
            assert torch.equal(rows, torch.stack([logits[step] for logits in expected]))
            assert not streams.is_ragged


def test_what_cannot_be_done_is_refused(tmp_path: Any) -> None:
    with zipmoe.load(write_store(tmp_path), memory="64GB") as loaded:
        streams = Streams(loaded)
        assert streams.is_ragged
        stream, empty = streams.open(), streams.open()
        with pytest.raises(ValueError, match="at least one token"):
            streams.prefill(stream, [])
        streams.prefill(stream, [5, 6])
        for wrong in ([], [stream, stream], [stream]):
            with pytest.raises(ValueError, match="distinct streams"):
                streams.decode(wrong, [1, 2])
        with pytest.raises(ValueError, match="begins with a prefill"):
            streams.decode([stream, empty], [1, 2])
        for length in (-1, 3):
            with pytest.raises(ValueError, match="cannot be cut"):
                streams.truncate(stream, length)
        assert streams.truncate(stream, 2) == 2
        assert streams.truncate(stream, 0) == 0
        assert stream.tokens == []
