"""Answers: streamed, stopped, measured, and possible again after a fault."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from small_store import write_store, write_tokenizer

import zipmoe
from zipmoe.generate import generate


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    store = write_store(tmp_path_factory.mktemp("small"))
    with zipmoe.load(store, memory="64GB", context=100) as result:
        yield result


def test_an_answer_is_what_the_model_generates_and_comes_in_pieces(loaded):
    pieces = []
    result = generate(loaded, "hello", max_tokens=12, on_text=pieces.append)
    prompt = loaded.tokenizer("<user>hello<assistant>", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = loaded.model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert result.token_ids == expected[0, prompt.shape[1] :].tolist()
    assert result.text == loaded.tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert "".join(pieces) == result.text
    assert len(pieces) > 1
    assert result.prompt_tokens == prompt.shape[1]


def test_messages_go_through_the_chat_template(loaded):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]
    result = generate(loaded, messages, max_tokens=2)
    assert result.prompt_tokens == len("<system>be<user>hello<assistant>")
    single = generate(loaded, [{"role": "user", "content": "hello"}], max_tokens=5)
    assert single.token_ids == generate(loaded, "hello", max_tokens=5).token_ids


def test_what_it_took_is_measured(loaded):
    result = generate(loaded, "hello", max_tokens=8)
    document = json.loads(json.dumps(result.as_dict()))
    parts = {"full_hits", "sign_mantissa_hits", "exponent_hits"}
    parts |= {"ahead_reads", "ahead_used", "ahead_wasted"}
    assert set(document["cache"]) == {"hits", "misses", "bytes_read", *parts}
    engaged = {"compute", "codec", "isa", "reader", "tiers", "in_parts", "fell_back"}
    engaged |= {"watches", "gave_back", "on_drive", "lent"}
    assert set(document["engaged"]) == engaged
    assert document["engaged"]["compute"] == "native"
    assert document["engaged"]["codec"] == "rank223"
    assert document["engaged"]["fell_back"] == "nothing"
    assert all(document["engaged"].values())
    assert document["cache"]["hits"] + document["cache"]["misses"] > 0
    assert document["memory_bytes"] == 64 * 10**9
    assert document["peak_rss_bytes"] > 10**8
    assert result.ttft_s > 0
    assert result.tpot_s > 0
    assert generate(loaded, "hello", max_tokens=1).tpot_s == 0


def test_drawing_depends_on_the_seed_and_leaves_the_callers_alone(loaded):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    draws = [
        generate(loaded, "a", max_tokens=12, temperature=2.0, seed=s).token_ids for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state)
    greedy = [generate(loaded, "a", max_tokens=12, seed=s).token_ids for s in (1, 2)]
    assert greedy[0] == greedy[1]


def test_an_answer_stops_when_asked(loaded):
    whole = generate(loaded, "hello", max_tokens=20).token_ids
    count = itertools.count(1)
    result = generate(loaded, "hello", max_tokens=20, stop=lambda: next(count) >= 4)
    assert result.token_ids == whole[:4]


def test_an_interrupt_ends_an_answer_and_the_model_lives_on(loaded):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(loaded, "hello", max_tokens=20, on_text=interrupt)
    assert generate(loaded, "hello", max_tokens=5).token_ids


def test_without_a_number_an_answer_has_what_the_context_has_room_for(loaded):
    frame = len("<user><assistant>")
    result = generate(loaded, "x" * (100 - frame - 3), temperature=1.0)
    assert len(result.token_ids) <= 3


def test_what_the_memory_was_not_counted_for_is_refused_before_any_token(loaded):
    frame = len("<user><assistant>")
    before, pieces = loaded.runtime.cache.counters(), []
    for prompt, options, total in [
        ("x" * (100 - frame - 3), {"max_tokens": 4}, 101),
        ("x" * (100 - frame), {}, 101),
        ("hello", {"max_tokens": 500}, len("hello") + frame + 500),
    ]:
        with pytest.raises(zipmoe.BudgetError, match=f"{total} tokens, .* KV cache") as caught:
            generate(loaded, prompt, on_text=pieces.append, **options)
        assert caught.value.floor_bytes > loaded.memory.base
    assert pieces == []
    assert loaded.runtime.cache.counters() == before
    assert generate(loaded, "x" * (100 - frame - 3), max_tokens=3).token_ids


def test_what_cannot_be_asked_is_refused(loaded, tmp_path):
    for options in ({"max_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="max_tokens"):
            generate(loaded, "x", **options)
    write_tokenizer(tmp_path, chat=False)
    tokenizer, loaded.tokenizer = loaded.tokenizer, type(loaded.tokenizer).from_pretrained(tmp_path)
    try:
        assert generate(loaded, "hello", max_tokens=1).prompt_tokens == len("hello")
        with pytest.raises(zipmoe.ZipmoeError, match="no chat template"):
            generate(loaded, [{"role": "user", "content": "hello"}])
        loaded.tokenizer = None
        with pytest.raises(zipmoe.ZipmoeError, match="no tokenizer"):
            generate(loaded, "hello")
    finally:
        loaded.tokenizer = tokenizer


def test_a_damaged_expert_fails_its_request_only(tmp_path):
    store = write_store(tmp_path)
    (shard,) = store.glob("experts-*.safetensors")
    good = shard.read_bytes()
    with zipmoe.load(store, memory="64GB") as other:
        expected = generate(other, "hello", max_tokens=8)
    with zipmoe.load(store, memory="64GB") as loaded:
        damage(shard, good)
        pieces = []
        with pytest.raises(zipmoe.CorruptError) as caught:
            generate(loaded, "hello", max_tokens=8, on_text=pieces.append)
        assert caught.value.layer == 0
        assert Path(caught.value.file).name == shard.name
        assert pieces == []
        shard.write_bytes(good)  # the same file: the cache holds it open
        assert generate(loaded, "hello", max_tokens=8).token_ids == expected.token_ids


def damage(shard, good):
    """Flip a bit in every page of the first layer's records."""
    bad = bytearray(good)
    header = 8 + int.from_bytes(good[:8], "little")
    for offset in range(header, header + (len(good) - header) // 2, 4096):
        bad[offset] ^= 1
    shard.write_bytes(bad)
