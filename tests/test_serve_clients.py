"""Clients that know nothing of zipmoe hold a conversation: openai, curl, and llm.

The soak test talks with the demo model, at the end of docs/serving.md; ZIPMOE_WRITE_DOCS=1 writes
what was said there.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from serving import serving
from small_store import write_store

import zipmoe
from zipmoe.generate import generate

PAGE = Path(__file__).resolve().parent.parent / "docs" / "serving.md"
TITLE = "## A conversation with the demo model\n\n"
FIRST, SECOND = "What is the capital of France?", "And of Italy?"
LLM = "import sys; from llm.cli import cli; cli(sys.argv[1:], prog_name='llm')"


def with_llm(folder, url, model, *words):
    """Say what the command-line client `llm` prints. The conversation is kept in the folder."""
    entry = {"model_id": model, "model_name": model, "api_base": f"{url}/v1"}
    (folder / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    done = subprocess.run(
        [sys.executable, "-c", LLM, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        # No plugins: the package that the demo's weights come from is one, and wants llama.cpp.
        env=os.environ | {"LLM_USER_PATH": str(folder), "LLM_LOAD_PLUGINS": ""},
        timeout=120,
    )
    return done.stdout.decode().rstrip("\n")


def with_curl(url, fields):
    """Say what curl prints, its stream put together."""
    command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    command += ["-d", json.dumps(fields | {"stream": True})]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    data = [line.removeprefix("data: ") for line in out.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return "".join(json.loads(d)["choices"][0]["delta"].get("content", "") for d in data[:-1])


def with_openai(url, fields):
    """Say what the official client streams."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chunks = client.chat.completions.create(**fields, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_llm_curl_and_openai_hear_the_same(tmp_path):
    pytest.importorskip("llm", reason="llm is not installed")
    store = write_store(tmp_path)
    words = ["-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "12", "hello"]
    fields = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    fields["messages"] = [{"role": "user", "content": "hello"}]
    with serving(store, context=200) as served:
        said = with_llm(tmp_path, served.url, "tiny", *words)
        assert said == with_curl(served.url, fields) == with_openai(served.url, fields)
    with zipmoe.load(store, memory="16GB", context=200) as loaded:
        assert generate(loaded, fields["messages"], max_tokens=12).text == said


def conversation(folder, url):
    """Hold the same conversation three times; give its transcript."""
    lines = ["```console"]
    words = ["-m", "demo", "-o", "temperature", "0", "-o", "max_tokens", "64"]
    for question, more in ((FIRST, []), (SECOND, ["-c"])):
        said = with_llm(folder, url, "demo", *words, *more, question)
        lines += [f"$ {shlex.join(['llm', *more, *words, question])}", said]
    messages = [{"role": "user", "content": FIRST}]
    fields = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 64}
    curl = ["curl", "-sN", "http://127.0.0.1:8000/v1/chat/completions"]
    curl += ["-H", "Content-Type: application/json", "-d", json.dumps(fields | {"stream": True})]
    first = with_curl(url, fields)
    lines += [f"$ {shlex.join(curl)}", f"(the stream, put together) {first}", "```"]
    made = 'client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")'
    lines += ["", "```python", f">>> {made}"]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": SECOND}]
    second = with_openai(url, fields)
    lines += [">>> # streamed, after the first turn:", f">>> # {SECOND}", second, "```"]
    return "\n".join(lines) + "\n"


@pytest.mark.soak
def test_the_demo_model_talks_and_the_transcript_is_in_the_documents(tmp_path, soak_record):
    folder = tmp_path / "demo"
    subprocess.run(
        [sys.executable, "-m", "zipmoe", "demo", "--json", "--folder", folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    with serving(folder / "store", name="demo", context=1000) as served:
        said = conversation(tmp_path, served.url)
    soak_record("conversation with openai, curl and llm", lines=said.count("\n"))
    assert "Paris" in said
    before, _, kept = PAGE.read_text().partition(TITLE)
    if os.environ.get("ZIPMOE_WRITE_DOCS"):
        PAGE.write_text(f"{before.rstrip()}\n\n{TITLE}{said}")
        return
    assert kept == said, "write it with ZIPMOE_WRITE_DOCS=1"
