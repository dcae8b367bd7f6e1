"""The API: what existing clients see. A tiny model in this process, a real socket."""

import json
import socket
import subprocess
import threading
import time

import httpx2 as httpx
import openai
import pytest
from small_store import write_store

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from serving import serving
from waiting import until

import zipmoe
from zipmoe._errors import CorruptError, FetchError
from zipmoe.generate import generate
from zipmoe.serve.limits import Limits

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def served(store):
    with serving(store, context=200) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def solo(store):
    """Give a function: messages or text, tokens -> the greedy answer alone."""
    known = {}

    def answer(prompt, max_tokens=12):
        key = (json.dumps(prompt), max_tokens)
        if key not in known:
            with zipmoe.load(store, memory="16GB", context=200) as loaded:
                known[key] = generate(loaded, prompt, max_tokens=max_tokens)
        return known[key]

    return answer


def post(served, path="chat/completions", **fields):
    return httpx.post(f"{served.url}/v1/{path}", json=fields, timeout=60)


def idle(served):
    return not any(served.service.scheduler.load()[key] for key in ("waiting", "running"))


# ---- answers


def test_an_answer_is_the_library_s_own_greedy_one(client, solo):
    answer = client.chat.completions.create(**GREEDY)
    alone = solo(HELLO)
    assert answer.choices[0].message.content == alone.text
    assert answer.usage.prompt_tokens == alone.prompt_tokens
    assert answer.usage.completion_tokens == len(alone.token_ids)
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_gives_the_same_text_and_usage_at_its_end(client, solo):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**GREEDY, **options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == solo(HELLO).text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count("length") == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_a_stream_ends_with_done_and_comes_as_events(served):
    response = post(served, **GREEDY, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line for line in response.text.split("\n\n") if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"


def test_curl_talks_to_it(served, solo):
    command = ["curl", "-sN", f"{served.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(GREEDY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == solo(HELLO).text


def test_completions_continue_text_and_tokens_alike(client):
    fields = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    by_text = client.completions.create(prompt="abc", **fields).choices[0].text
    tokens = [97 - 33, 98 - 33, 99 - 33]
    by_tokens = client.completions.create(prompt=tokens, **fields).choices[0].text
    assert by_text == by_tokens


def test_answers_are_the_solo_ones_among_others_and_sampled_ones_depend_on_the_seed(served, solo):
    prompts = [[{"role": "user", "content": "word " * n + "?"}] for n in range(1, 9)]
    alone = [solo(prompt).text for prompt in prompts]
    drawn = {"temperature": 1.2, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "max_tokens": 12}
    first = [text_of(post(served, model="tiny", messages=p, seed=5, **drawn)) for p in prompts]
    found = {}

    def ask(name, **fields):
        found[name] = text_of(post(served, model="tiny", max_tokens=12, **fields))

    threads = []
    for number, prompt in enumerate(prompts):
        greedy = {"messages": prompt, "temperature": 0}
        threads.append(threading.Thread(target=ask, args=(("greedy", number),), kwargs=greedy))
        sampled = {"messages": prompt, "seed": 5, **drawn} | {"max_tokens": 12}
        sampled.pop("max_tokens")
        threads.append(threading.Thread(target=ask, args=(("drawn", number),), kwargs=sampled))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found["greedy", number] for number in range(8)] == alone
    assert [found["drawn", number] for number in range(8)] == first
    assert max(served.streams.steps) > 1
    other = [text_of(post(served, model="tiny", messages=p, seed=6, **drawn)) for p in prompts]
    assert other != first


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_a_stop_text_ends_the_answer_and_is_left_out(served, solo):
    text = solo(HELLO).text
    stop = text[2:4]
    choice = post(served, **GREEDY, stop=[stop, "never"]).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    streamed = post(served, **GREEDY, stop=stop, stream=True).text
    assert json.dumps(stop)[1:-1] not in streamed


def test_n_answers_are_drawn_apart_and_the_first_is_that_of_one(served):
    fields = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 1}
    three = post(served, **fields, n=3).json()["choices"]
    assert [choice["index"] for choice in three] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in three]
    assert len(set(texts)) == 3
    assert text_of(post(served, **fields)) == texts[0]


def test_logprobs_are_those_of_the_model_whatever_the_temperature(client):
    fields = GREEDY | {"logprobs": True, "top_logprobs": 3}
    greedy = client.chat.completions.create(**fields).choices[0].logprobs.content
    assert len(greedy) == 12
    for entry in greedy:
        assert entry.logprob == entry.top_logprobs[0].logprob
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
    drawn = client.chat.completions.create(**fields | {"temperature": 2, "seed": 1})
    first = drawn.choices[0].logprobs.content[0]
    assert first.top_logprobs == greedy[0].top_logprobs
    old = client.completions.create(
        model="tiny", prompt="ab", max_tokens=4, logprobs=2, temperature=0
    ).choices[0]
    assert len(old.logprobs.tokens) == 4
    assert old.logprobs.text_offset[0] == 0


def test_biases_and_penalties_change_what_is_chosen(served):
    def answer(**fields):
        return text_of(post(served, **GREEDY, logit_bias={"65": 20}, **fields))

    assert answer() == "b" * 12
    assert answer(presence_penalty=2) == "b" * 12
    assert answer(frequency_penalty=2).startswith("bbb")
    assert answer(frequency_penalty=2) != "b" * 12


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_its_schema(served, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    fields = GREEDY | {"max_tokens": 100, "temperature": temperature, "seed": 3}
    choice = post(served, **fields, response_format=form).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert 0 <= json.loads(choice["message"]["content"])["a"] <= 99


# ---- refusals

NAMED = {"type": "function", "function": {"name": "f"}}
BAD_FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"user": "me"}, 400, "user"),
        ({"echo": True}, 400, "echo"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"n": 9}, 400, "n"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": NAMED}, 400, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"logit_bias": {"999": 1}}, 400, "logit_bias"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "no"}},
                }
            },
            400,
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages"),
        ({"max_tokens": 199}, 400, "max_tokens"),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"temperature": "hot"}, 422, "temperature"),
        ({"temperature": -1}, 422, "temperature"),
        ({"messages": []}, 422, "messages"),
        ({"stream_options": {}}, 422, None),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(served, fields, status, param):
    before = len(served.streams.prefilled)
    response = post(served, **GREEDY | fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert len(served.streams.prefilled) == before


def test_fields_that_ask_for_nothing_are_taken(served):
    neutral = {"store": False, "user": None, "parallel_tool_calls": True, "service_tier": "auto"}
    assert post(served, **GREEDY, **neutral).status_code == 200


def test_a_body_that_is_no_json_or_too_large_is_refused(store):
    with serving(store, context=100, limits=Limits(body_bytes=2000)) as served:
        url = f"{served.url}/v1/chat/completions"
        headers = {"content-type": "application/json"}
        assert httpx.post(url, content=b"{", headers=headers).status_code == 400
        large = b" " * 3000
        assert httpx.post(url, content=large, headers=headers).status_code == 413
        pieces = (large[:500] for _ in range(6))
        assert httpx.post(url, content=pieces, headers=headers).status_code == 413


def test_what_the_template_refuses_is_the_client_s_error(served, monkeypatch):
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(served.loaded.tokenizer, "chat_template", template)
    response = post(served, **GREEDY)
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]


# ---- who may ask


def test_a_key_is_asked_for_and_never_logged(store):
    with serving(store, context=100, key="sesame") as served:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
            for path in ("/v1/models", "/metrics", "/machine", "/openapi.json"):
                assert httpx.get(served.url + path, headers=given).status_code == 401
        right = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{served.url}/v1/models", headers=right).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert httpx.get(f"{served.url}/").status_code == 200
        keyed = openai.OpenAI(base_url=f"{served.url}/v1", api_key="sesame")
        assert keyed.chat.completions.create(**GREEDY).choices
        assert "sesame" not in json.dumps(served.lines)


def test_other_hosts_names_are_refused_on_this_machine_s_address(served):
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"):
        response = httpx.get(f"{served.url}/v1/models", headers={"Host": host})
        assert response.status_code == 200
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:8000",
        "::1",
        "",
    ):
        response = httpx.get(f"{served.url}/v1/models", headers={"Host": host})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_host"


def test_a_log_line_tells_nothing_of_what_was_said(served):
    served.lines.clear()
    post(served, **GREEDY | {"messages": [{"role": "user", "content": "a secret"}]})
    post(served, **GREEDY | {"model": "nosuch"})
    assert [line["status"] for line in served.lines] == [200, 404]
    assert "secret" not in json.dumps(served.lines)
    assert served.lines[0].keys() >= {"request", "prompt_tokens", "first_token_s", "seconds"}


# ---- conversations


def test_the_next_turn_reuses_the_kv_cache_and_gives_the_same_answer(served, solo):
    first = text_of(post(served, **GREEDY))
    turn = [*HELLO, {"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
    answer = post(served, **GREEDY | {"messages": turn}).json()
    assert answer["choices"][0]["message"]["content"] == solo(turn).text
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > len(solo(HELLO).token_ids)


def test_several_answers_read_their_prompt_once(served, solo):
    prompt = [{"role": "user", "content": "once " * 20}]
    served.streams.prefilled.clear()
    answer = post(served, **GREEDY | {"messages": prompt, "n": 4}).json()
    alone = solo(prompt)
    assert [choice["message"]["content"] for choice in answer["choices"]] == [alone.text] * 4
    assert sorted(served.streams.prefilled)[:-1] == [1, 1, 1]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert served.streams.prefilled[0] > 20


# ---- leaving


def steps(served):
    return len(served.streams.steps)


def leave_when(served, fields, condition):
    """Ask, and close the connection in the middle of the answer."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    body = json.dumps(fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        until(condition)


def test_a_client_that_leaves_is_noticed_within_a_step_and_frees_its_memory(store):
    with serving(store, context=200) as served:
        served.streams.before = lambda: time.sleep(0.02)
        fields = GREEDY | {"max_tokens": 150}
        for is_stream in (True, False):
            begun = len(served.streams.steps)
            leave_when(
                served, fields | {"stream": is_stream}, lambda n=begun: steps(served) > n + 3
            )
            until(lambda: idle(served), 2)
            assert steps(served) - begun < 60
            until(lambda: served.lines and served.lines[-1]["status"] == 499)
            served.lines.clear()
        assert served.service.scheduler._room.reserved == 0


def test_a_request_that_takes_too_long_ends_with_a_reason(store):
    with serving(store, context=200, limits=Limits(seconds=0.5)) as served:
        served.streams.before = lambda: time.sleep(0.1)
        response = post(served, **GREEDY | {"max_tokens": 100})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "timeout"


# ---- faults


def test_a_read_error_ends_that_request_with_503_and_the_next_one_is_answered(store, solo):
    with serving(store, context=200) as served:
        for error in (FetchError("no", errno=5), CorruptError("bad", layer=1, expert=2)):
            served.streams.fail = [error]
            response = post(served, **GREEDY)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "store_unreadable"
            assert "retry-after" in response.headers
            assert served.service.scheduler._room.used == 0
            assert text_of(post(served, **GREEDY)) == solo(HELLO).text
            served.service.scheduler._room.close()


def test_health_says_that_the_store_is_unreadable_until_it_can_be_read(store):
    with serving(store, context=200) as served:
        served.streams.fail = [FetchError("no", errno=5)] * 3
        post(served, **GREEDY)
        health = httpx.get(f"{served.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "unreadable")
        until(lambda: httpx.get(f"{served.url}/health").status_code == 200)
        assert served.streams.fail == []


def test_an_error_in_the_middle_of_a_stream_is_an_event(store):
    with serving(store, context=200) as served:

        def fail_at_third_step():
            if len(served.streams.steps) == 3:
                served.streams.fail = [FetchError("no", errno=5)] * 2  # the step, and it alone

        served.streams.before = fail_at_third_step
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="could not be read"):
            list(client.chat.completions.create(**GREEDY, stream=True))


def test_a_failed_step_is_repeated_one_by_one_and_spares_those_that_can_go_on(store, solo):
    with serving(store, context=200) as served:
        other = [{"role": "user", "content": "another"}]
        expected = {"hello": solo(HELLO).text, "another": solo(other).text}
        done = {}

        def fail_once_there_are_two():
            if len(served.streams.steps) and served.streams.steps[-1] == 2 and not done.get("f"):
                done["f"] = True
                served.streams.fail = [FetchError("no", errno=5)] * 2
            time.sleep(0.01)

        served.streams.before = fail_once_there_are_two
        found = {}

        def ask(messages):
            found[messages[0]["content"]] = post(served, **GREEDY | {"messages": messages})

        threads = [threading.Thread(target=ask, args=(m,)) for m in (HELLO, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(response.status_code for response in found.values())
        assert statuses == [200, 503]
        for content, response in found.items():
            if response.status_code == 200:
                assert text_of(response) == expected[content]


def test_when_the_loop_dies_everybody_is_told_and_health_says_so(store):
    with serving(store, context=200) as served:
        served.streams.before = lambda: time.sleep(0.05)
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(post(served, **GREEDY))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        until(lambda: served.streams.steps)
        served.streams.fail = [RuntimeError("a fault of ours")]
        for thread in threads:
            thread.join()
        assert [response.status_code for response in found] == [503] * 4
        assert {response.json()["error"]["code"] for response in found} == {"broken"}
        health = httpx.get(f"{served.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "broken")
        assert post(served, **GREEDY).status_code == 503


# ---- too much


def test_a_full_queue_is_429_with_retry_after_and_the_others_are_answered(store, solo):
    with serving(store, context=200, limits=Limits(streams=1, queue=1)) as served:
        served.streams.before = lambda: time.sleep(0.02)
        found = []

        def ask():
            found.append(post(served, **GREEDY))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
            time.sleep(0.03)
        for thread in threads:
            thread.join()
        refused = [response for response in found if response.status_code == 429]
        assert refused
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        assert all(response.json()["error"]["code"] == "queue_full" for response in refused)
        for response in found:
            if response not in refused:
                assert text_of(response) == solo(HELLO).text


# ---- what it says of itself


def test_metrics_follow_what_happened(served):
    post(served, **GREEDY)
    text = httpx.get(f"{served.url}/metrics").text
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name.replace('{model_name="tiny"}', "").replace('model_name="tiny",', "")] = (
                float(value)
            )
    assert values["zipmoe:generation_tokens_total"] >= 12
    assert values["zipmoe:time_to_first_token_seconds_count"] >= 1
    assert values["zipmoe:expert_hits_total"] > 0
    asked = {name: n for name, n in values.items() if name.startswith("zipmoe:experts_asked_total")}
    assert len(asked) == 5
    assert (
        sum(asked.values())
        == values["zipmoe:expert_hits_total"] + values["zipmoe:expert_misses_total"]
    )
    assert asked['zipmoe:experts_asked_total{tier="compressed"}'] > 0
    assert values['zipmoe:experts_held{tier="compressed"}'] > 0
    assert values["zipmoe:num_requests_running"] == 0
    assert 0 < values["zipmoe:memory_resident_bytes"] <= values["zipmoe:memory_promised_bytes"]


def test_models_and_the_machine_are_described(served, client):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 200)
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{served.url}/v1/models/other").status_code == 404
    picture = httpx.get(f"{served.url}/machine").json()
    assert picture["load"].keys() == {"waiting", "running", "kv_used", "kv_total"}
    assert picture["spent"]["tokens"] > 0
    assert sum(picture["experts"]["held"].values()) == picture["experts"]["all"]
    assert picture["diagnosis"]
