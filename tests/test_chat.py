"""generate and chat: documents, streams, turns, context, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from speaking import build_speaking
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from zipmoe import _chat, pack_checkpoint
from zipmoe._errors import FetchError, ZipmoeError
from zipmoe._terminal import Terminal
from zipmoe.budget import available_memory
from zipmoe.cli import app
from zipmoe.routing import load_trace


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return build_speaking(tmp_path_factory.mktemp("chat") / "checkpoint")


@pytest.fixture(scope="module")
def store(checkpoint):
    pack_checkpoint(checkpoint, checkpoint.parent / "store")
    return checkpoint.parent / "store"


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """What runs teach is kept apart from the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words, stdin=None):
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


# In this process torch and other tests have taken memory already: the budget must be above that.
ROOMY = ["--memory", "16GB", "--context", "200"]


def test_generate_prints_one_document_with_stock_s_tokens(checkpoint, store):
    words = ["generate", store, "--prompt", "hello", "--max-tokens", 12, "--json", *ROOMY]
    result = run(*words, "--compute", "torch")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    tokens = stock.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
    prompt_tokens = inputs["input_ids"].shape[1]
    assert document["token_ids"] == tokens[prompt_tokens:]
    assert document["text"] == tokenizer.decode(document["token_ids"], skip_special_tokens=True)
    assert document["prompt_tokens"] == prompt_tokens
    assert document["ttft_s"] > 0
    assert document["tpot_s"] > 0
    assert document["memory_bytes"] == 16_000_000_000
    assert document["peak_rss_bytes"] > 0
    parts = {"full_hits", "sign_mantissa_hits", "exponent_hits"}
    parts |= {"ahead_reads", "ahead_used", "ahead_wasted"}
    assert document["cache"].keys() == {"hits", "misses", "bytes_read", *parts}
    assert document["cache"]["misses"] > 0
    engaged = {"compute", "codec", "isa", "reader", "tiers", "in_parts", "fell_back"}
    engaged |= {"watches", "gave_back", "on_drive", "lent"}
    assert document["engaged"].keys() == engaged
    assert document["memory"].keys() >= {"base", "dense", "kv", "scratch", "cache"}


def test_generate_and_chat_record_their_routing(store, tmp_path):
    words = ["generate", store, "--prompt", "hello", "--max-tokens", 6, "--json", *ROOMY]
    result = run(*words, "--record", tmp_path / "one.npz")
    assert result.exit_code == 0, result.output
    trace = load_trace(tmp_path / "one.npz")
    document = json.loads(result.stdout)
    assert trace.tokens.tolist() == [document["prompt_tokens"], 1, 1, 1, 1, 1]
    chat = run(
        "chat", store, "--max-tokens", 3, *ROOMY, "--record", tmp_path / "two.npz", stdin="a\nb\n"
    )
    assert chat.exit_code == 0, chat.output
    assert len(load_trace(tmp_path / "two.npz").requests) == 2
    silent = run("chat", store, *ROOMY, "--record", tmp_path / "none.npz", stdin="")
    assert silent.exit_code == 0, silent.output
    assert "no routing was recorded" in silent.stderr
    assert not (tmp_path / "none.npz").exists()


def test_generate_puts_the_text_on_stdout_and_the_account_on_stderr(store):
    words = ["generate", store, "--max-tokens", 8, *ROOMY]
    document = json.loads(run(*words, "--prompt", "hello", "--json").stdout)
    result = run(*words, "--prompt", "-", stdin="hello")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == document["text"] + "\n"
    for word in ["memory 16", "base", "dense", "kv", "scratch", "cache", "peak", "promised"]:
        assert word in result.stderr


def test_a_budget_below_the_floor_is_refused_in_one_sentence_with_the_floor(store):
    result = run("generate", store, "--prompt", "x", "--memory", "100MB", "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "BudgetError"
    assert "floor" in error["message"]
    assert result.stderr.count("\n") == 1


def test_the_default_memory_is_what_is_available_less_a_reserve_and_is_said(store):
    result = run("generate", store, "--prompt", "x", "--max-tokens", 1, "--context", 100, "--json")
    assert result.exit_code == 0, result.stderr
    available = available_memory()
    promised = json.loads(result.stdout)["memory_bytes"]
    assert 0.8 * available.budget < promised < available.bytes
    assert "less a reserve" in result.stderr.splitlines()[0]


def test_chat_without_a_terminal_answers_each_line_and_ends(store):
    result = run("chat", store, "--max-tokens", 5, *ROOMY, stdin="hello\nagain\n/exit\nnever\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") >= 2
    assert "Ctrl-C" in result.stderr


def test_ctrl_c_stops_a_real_answer_and_the_next_one_still_comes(store):
    command = [sys.executable, "-m", "zipmoe", "chat", str(store), "--max-tokens", "3500"]
    talk = subprocess.Popen(
        [*command, "--context", "4096"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    watchdog = threading.Timer(120, talk.kill)
    watchdog.start()
    talk.stdin.write(b"hello\n")
    talk.stdin.flush()
    first = talk.stdout.read1(1)  # the answer has begun
    talk.send_signal(signal.SIGINT)
    talk.stdin.write(b"/new\nhello\n")
    talk.stdin.flush()
    said = b""
    while b"(a new conversation)" not in said:
        said += talk.stderr.read1(1000)
        assert talk.poll() is None
    assert b"(stopped)" in said
    talk.send_signal(signal.SIGINT)  # before or in the second answer: neither ends the program
    talk.stdin.write(b"/exit\n")
    out, _ = talk.communicate()
    watchdog.cancel()
    assert talk.returncode == 0
    assert first + out


# ---- the conversation itself, with a stand-in for the model


class Echo:
    """Stands for `generate`: answers with the last message, and keeps what it was given."""

    def __init__(self, monkeypatch):
        self.seen = []
        self.during = lambda: None
        monkeypatch.setattr(_chat, "generate", self)

    def __call__(self, loaded, messages, *, on_text, stop, max_tokens):
        self.seen.append([message["content"] for message in messages])
        self.during()
        text = "..." if stop() else messages[-1]["content"].upper()
        on_text(text)
        return SimpleNamespace(text=text)


class Words:
    """Stands for a tokenizer: a token is a word."""

    chat_template = "yes"

    def apply_chat_template(self, messages, **_):
        return {"input_ids": " ".join(message["content"] for message in messages).split()}


def talk(lines, monkeypatch, *, context=100, max_tokens=10, system=None):
    inputs = iter(lines)

    def readline():
        line = next(inputs, "")
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, readline=readline))
    loaded = SimpleNamespace(tokenizer=Words(), context=context)
    _chat.Chat(Terminal(as_json=False), loaded, system=system, max_tokens=max_tokens).run()


def test_turns_build_on_each_other_and_new_begins_again(monkeypatch, capsys):
    echo = Echo(monkeypatch)
    talk(["one\n", "\n", "two\n", "/new\n", "/what\n", "three\n"], monkeypatch, system="be kind")
    assert echo.seen == [
        ["be kind", "one"],
        ["be kind", "one", "ONE", "two"],
        ["be kind", "three"],
    ]
    out, err = capsys.readouterr()
    assert out == "ONE\nTWO\nTHREE\n"
    assert "no command /what" in err


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(monkeypatch, capsys):
    echo = Echo(monkeypatch)
    talk(["a b c\n", "d e f\n", "g h i\n"], monkeypatch, context=20, max_tokens=8)
    assert echo.seen[-1] == ["d e f", "D E F", "g h i"]
    assert "the oldest turn does not fit" in capsys.readouterr().err


def test_a_message_beyond_the_context_is_refused_and_the_chat_goes_on(monkeypatch, capsys):
    echo = Echo(monkeypatch)
    talk(["x " * 30 + "\n", "short\n"], monkeypatch, context=20)
    assert echo.seen == [["short"]]
    assert "exceed the context of 20" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_keeps_its_beginning_and_restores_the_handler(monkeypatch, capsys):
    echo = Echo(monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    echo.during = lambda: os.kill(os.getpid(), signal.SIGINT) if len(echo.seen) == 1 else None
    talk(["one\n", "two\n"], monkeypatch)
    assert echo.seen[1] == ["one", "...", "two"]
    assert "(stopped)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_gives_the_answer_up_and_not_the_program(monkeypatch, capsys):
    echo = Echo(monkeypatch)

    def twice():
        if len(echo.seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    echo.during = twice
    talk(["one\n", "two\n"], monkeypatch)
    assert echo.seen[1] == ["two"]
    assert "/exit or Ctrl-D leaves" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_says_how_to_leave(monkeypatch, capsys):
    echo = Echo(monkeypatch)
    talk([KeyboardInterrupt(), "one\n"], monkeypatch)
    assert echo.seen == [["one"]]
    assert "/exit or Ctrl-D leaves" in capsys.readouterr().err


def test_a_failed_read_ends_the_answer_and_not_the_chat(monkeypatch, capsys):
    echo = Echo(monkeypatch)

    def fail():
        if len(echo.seen) == 1:
            raise FetchError("the drive did not answer")

    echo.during = fail
    talk(["one\n", "two\n"], monkeypatch)
    assert echo.seen[1] == ["two"]
    assert "the drive did not answer" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused(monkeypatch):
    monkeypatch.setattr(Words, "chat_template", None)
    with pytest.raises(ZipmoeError, match="zipmoe generate"):
        talk([], monkeypatch)
