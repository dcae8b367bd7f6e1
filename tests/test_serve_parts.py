"""The server's parts, apart from any socket and model."""

import json
import threading
from collections import Counter
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_parsing import ResponseParser

from zipmoe import kv
from zipmoe.serve.answer import Answer, Delta, Request
from zipmoe.serve.choose import Chooser, Sampling
from zipmoe.serve.documents import ChatWriter
from zipmoe.serve.limits import Limits
from zipmoe.serve.machine import Spent, diagnose
from zipmoe.serve.pieces import StopTexts
from zipmoe.serve.popularity import Popularity
from zipmoe.serve.prompts import ToolCalls
from zipmoe.serve.room import KvRoom
from zipmoe.serve.scheduler import Scheduler

# ---- texts that end an answer


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_stop_texts_cut_where_a_search_of_the_whole_would(text, stops, size):
    held, said, is_stopped = StopTexts(stops), "", False
    for at in range(0, len(text), size):
        free, is_stopped = held.take(text[at : at + size])
        said += free
        if is_stopped:
            break
    if not is_stopped:
        said += held.rest()
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if is_stopped:
        # The first that is complete ends it; one that began before it may not be complete yet.
        assert any(text.startswith(said + stop) for stop in stops)
    else:
        assert found == []
        assert said == text


# ---- choosing


LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def drawn(count=2000, **sampling):
    chooser = Chooser(Sampling(temperature=1.0, seed=7, **sampling))
    return Counter(chooser.choose(LOGITS, []).token for _ in range(count))


def test_greedy_takes_the_likeliest_and_draws_follow_the_distribution():
    assert Chooser(Sampling()).choose(LOGITS, []).token == 1
    expected = LOGITS.softmax(0)
    counts = drawn(20000)
    for token in range(5):
        assert abs(counts[token] / 20000 - float(expected[token])) < 0.015


def test_limits_cut_the_unlikely():
    assert set(drawn(top_k=2)) == {1, 4}
    assert set(drawn(top_p=0.4)) == {1}
    assert set(drawn(top_p=0.6)) == {1, 4}
    assert set(drawn(min_p=0.5)) == {1, 4}
    assert set(drawn(top_k=-1)) == {0, 1, 2, 3, 4}


def test_a_seed_says_all_and_answers_of_a_request_differ():
    def tokens(seed, index):
        chooser = Chooser(Sampling(temperature=1.0, seed=seed), index=index)
        return [chooser.choose(LOGITS, []).token for _ in range(50)]

    assert tokens(1, 0) == tokens(1, 0)
    assert tokens(1, 0) != tokens(2, 0)
    assert tokens(1, 0) != tokens(1, 1)
    assert tokens(-1, 0) == tokens(-1, 0)
    assert tokens(-1, 0) != tokens(-2, 0)


# ---- room


class FakeStreams:
    def __init__(self):
        self.closed = 0

    def open(self):
        return SimpleNamespace(tokens=[], length=0)

    def fork(self, stream, length):
        return SimpleNamespace(tokens=stream.tokens[:length], length=length)

    def truncate(self, stream, length):
        stream.tokens = stream.tokens[:length]
        stream.length = length

    def close(self, _):
        self.closed += 1


def wanting(prompt, max_tokens=10):
    request = Request("r", prompt, sink=lambda _: None)
    return SimpleNamespace(request=request, index=0, max_tokens=max_tokens, stream=None, reserved=0)


def fill(answer, tokens):
    answer.stream.tokens, answer.stream.length = list(tokens), len(tokens)


def test_answers_are_let_in_while_there_is_room_and_give_it_back():
    room = KvRoom(FakeStreams(), 3 * kv.room(50), kv.room)
    answers = [wanting([1] * 40) for _ in range(4)]
    assert [room.admit(answer) for answer in answers] == [True, True, True, False]
    room.release(answers[0], keep=False)
    assert room.admit(answers[3])
    for answer in answers[1:]:
        room.release(answer, keep=False)
    assert room.used == room.reserved == 0


def test_the_next_turn_takes_the_kept_stream_and_another_conversation_leaves_it():
    room = KvRoom(FakeStreams(), 10 * kv.room(50), kv.room)
    first = wanting([1, 2, 3, 4])
    room.admit(first)
    fill(first, [1, 2, 3, 4, 5, 6])
    room.release(first, keep=True)
    other = wanting([1, 9, 9, 9, 9])  # shares less than half of it
    room.admit(other)
    assert other.stream.length == 0
    following = wanting([1, 2, 3, 4, 5, 6, 7, 8])
    room.admit(following)
    assert (following.stream.length, following.request.cached_tokens) == (6, 6)
    same = wanting([1, 2, 3])
    fill(following, [1, 2, 3, 4])
    room.release(following, keep=True)
    room.admit(same)
    assert same.stream.tokens == [1, 2]  # the last one's logits are wanted


def test_kept_streams_make_room_the_oldest_first():
    streams = FakeStreams()
    room = KvRoom(streams, 2 * kv.room(50), kv.room)
    for token in (1, 2):
        answer = wanting([token] * 40)
        room.admit(answer)
        fill(answer, [token] * 45)
        room.release(answer, keep=True)
    assert room.admit(wanting([3] * 40))
    assert streams.closed == 1
    assert room.admit(wanting([2] * 50, 1)) is True
    assert room.used <= room.total


def test_what_a_running_answer_shares_is_copied_if_it_is_worth_it():
    room = KvRoom(FakeStreams(), 10 * kv.room(50), kv.room)
    first = wanting([*range(40)])
    room.admit(first)
    fill(first, range(45))
    sibling = wanting([*range(40)])
    room.admit(sibling)
    assert sibling.stream is not first.stream
    assert (sibling.stream.tokens, sibling.request.cached_tokens) == ([*range(39)], 39)
    other = wanting([*range(5), 9, 9, 9])
    room.admit(other)
    assert other.stream.length == 0
    for answer in (first, sibling, other):
        room.release(answer, keep=False)
    last = wanting([*range(40)])
    room.admit(last)
    assert last.stream.length == 0


# ---- the scheduler


class Endless(FakeStreams):
    """Reads a prompt until its stream is closed."""

    def __init__(self):
        super().__init__()
        self.reads, self.is_closed = threading.Event(), threading.Event()

    def prefill(self, *_):
        self.reads.set()
        assert self.is_closed.wait(20)
        raise kv.UnwantedError("closed")

    def close(self, stream):
        super().close(stream)
        self.is_closed.set()


@pytest.mark.parametrize(("way", "status"), [("cancel", 499), ("close", 503)])
def test_a_prompt_is_not_read_to_its_end_when_nobody_waits_for_it(way, status):
    streams, told = Endless(), []
    scheduler = Scheduler(
        streams,
        room=KvRoom(streams, 4096, kv.room),
        limits=Limits(),
        metrics=MagicMock(),
        probe=[1],
        popularity=MagicMock(),
    )
    request = Request("r", [1, 2, 3], told.append)
    request.answers.append(
        Answer(
            request,
            0,
            max_tokens=5,
            ends=frozenset(),
            chooser=Chooser(Sampling()),
            pieces=None,
        )
    )
    scheduler.submit(request)
    assert streams.reads.wait(20)
    assert scheduler.load()["running"] == 1
    if way == "cancel":
        scheduler.cancel(request)
    scheduler.close()
    assert [delta.error.status for delta in told] == [status]
    assert scheduler.load()["kv_used"] == 0


# ---- tool calls


TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<end>", "content": "text"},
    },
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def writer():
    request = Request("r", [1], sink=lambda _: None)
    calls = [ToolCalls(ResponseParser(TEMPLATE, prefix="<assistant>"))]
    return ChatWriter(request, "m", str, is_shown=False, calls=calls)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_tool_calls_are_parted_from_the_text(size):
    text = "Let me see." + CALL
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    deltas = [Delta(0, piece) for piece in pieces] + [Delta(0, finish="stop")]
    (choice,) = writer().document(deltas)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 1}
    chunks = [chunk for w in [writer()] for delta in deltas for chunk in w.chunks(delta)]
    told = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in told) == "Let me see."
    assert [d["tool_calls"][0]["index"] for d in told if "tool_calls" in d] == [0]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


# ---- diagnosis


def spent(**parts):
    nothing = dict.fromkeys(Spent.__dataclass_fields__, 0)
    return Spent(**nothing | {"tokens": 100, "wall": 10.0} | parts)


def test_the_diagnosis_names_what_takes_the_time():
    disk = diagnose(spent(wait=6.1, busy=8.0, bytes_read=10**9), saved=0.5)
    assert disk == (
        "disk-bound: 61% of the time waits on reads, 10.00 MB a token; 2.00 GB more memory would "
        "save about 30%"
    )
    assert diagnose(spent(busy=8.0), saved=0.5).startswith("compute-bound: 80%")
    assert diagnose(spent(wait=2.0, busy=4.0), saved=0.5).startswith("mixed")
    assert diagnose(spent(tokens=1), saved=0.5).startswith("idle")


def test_popularity_says_what_more_room_would_save():
    routing = [(0, 2, [0, 0, 0, 0, 1, 1, 2, 3]), (1, 2, [3, 3])]
    engine = SimpleNamespace(
        record_routing=lambda _: None, take_routing=lambda: [routing.pop(0)] if routing else []
    )
    layers = [SimpleNamespace(experts=4)] * 2
    popularity = Popularity(SimpleNamespace(engine=engine, layers=layers))
    for _ in range(2):
        popularity.note()
    assert np.isclose(popularity.saved(2, 1), 0.5)  # of 2 + 1 + 1 choices of absent experts
    assert popularity.saved(2, 10) == 1
    assert popularity.saved(8, 1) == 0
