"""The commands: what they print and where, and the codes they leave with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import build
from typer.testing import CliRunner

from zipmoe import _terminal
from zipmoe._errors import BudgetError, CorruptError, FetchError, MismatchError, SpaceError
from zipmoe.cli import app

COMMANDS = ["pack", "unpack", "verify", "inspect", "plan", "generate", "chat", "demo", "serve"]
NESTED = ["trace show", "bench policy"]


def run(*words, stdin=None):
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def only_document(result):
    """The one JSON document that stdout consists of."""
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cli") / "checkpoint", "mixtral")


@pytest.fixture(scope="module")
def store(checkpoint):
    result = run("pack", checkpoint, checkpoint.parent / "store")
    assert result.exit_code == 0, result.output
    return checkpoint.parent / "store"


def test_help_names_every_command_and_imports_no_torch():
    code = (
        "import sys, time; started = time.perf_counter()\n"
        "from zipmoe.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys()\n"
        "print('heavy', sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert "heavy []" in done.stdout
    for command in (*COMMANDS, *(nested.split()[0] for nested in NESTED)):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS + NESTED)
def test_help_of_a_command_gives_an_example_and_explains_every_option(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    if command != "demo":
        assert any(line.strip().startswith(f"zipmoe {command} ") for line in lines)
    options = [line for line in lines if line.startswith("  -")]
    assert options
    at = {line: number for number, line in enumerate(lines)}
    for option in options:
        name, _, help_text = option.strip().partition("  ")
        below = lines[at[option] + 1] if at[option] + 1 < len(lines) else ""
        assert help_text.strip() or below.startswith("   "), name


def test_version_is_the_package_s():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, "zipmoe 0.1.0\n")


@pytest.mark.parametrize(
    "words",
    [
        ["pack"],
        ["pack", "a", "b", "--codec", "gzip"],
        ["pack", "a", "b", "--jobs", "0"],
        ["generate", "store"],
        ["generate", "store", "--prompt", "x", "--memory", "lots"],
        ["generate", "store", "--prompt", "x", "--memory", "0GB"],
        ["generate", "store", "--prompt", "x", "--temperature", "-1"],
        ["generate", "store", "--prompt", "x", "--compute", "magic"],
        ["plan"],
        ["plan", "store", "--memory", "lots"],
        ["plan", "store", "--codec", "gzip"],
        ["chat"],
        ["nonsense"],
        ["verify", "store", "--force"],
    ],
)
def test_a_wrong_command_line_leaves_with_2_and_says_what_is_wrong(words):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_pack_reports_as_promised(checkpoint, tmp_path):
    result = run("pack", checkpoint, tmp_path / "store", "--json", "--codec", "rank3", "--jobs", 1)
    assert result.exit_code == 0
    document = only_document(result)
    assert document.keys() >= {
        "source_bytes",
        "store_bytes",
        "ratio",
        "bits_per_weight",
        "experts",
        "tensors",
        "seconds",
        "peak_rss_bytes",
    }
    assert document["experts"] == 8
    assert document["ratio"] == document["store_bytes"] / document["source_bytes"]
    assert result.stderr == ""  # no bar where nobody looks


def test_pack_says_in_one_line_what_it_made(checkpoint, tmp_path):
    result = run("pack", checkpoint, tmp_path / "store")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert "of the checkpoint's" in result.stdout
    assert result.stderr == ""


def test_pack_refuses_a_folder_that_holds_something_else_as_the_user_s_error(checkpoint, tmp_path):
    (tmp_path / "precious").write_text("kept")
    result = run("pack", checkpoint, tmp_path, "--json")
    assert result.exit_code == 1
    assert only_document(result)["error"]["type"] == "MismatchError"
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("command", ["verify", "inspect", "unpack", "generate", "chat"])
def test_a_folder_that_is_no_store_is_the_user_s_error_in_one_sentence(command, tmp_path):
    more = {"unpack": [tmp_path / "new"], "generate": ["--prompt", "x"]}
    (tmp_path / "empty").mkdir()
    result = run(command, tmp_path / "empty", *more.get(command, []))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("zipmoe: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_unpack_restores_the_checkpoint(checkpoint, store, tmp_path):
    result = run("unpack", store, tmp_path / "back", "--json")
    assert result.exit_code == 0
    assert only_document(result)["tensors"] > 0
    for path in checkpoint.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_unpack_overwrites_nothing(store, tmp_path):
    (tmp_path / "precious").write_text("kept")
    result = run("unpack", store, tmp_path)
    assert result.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_inspect_shows_kinds_codecs_and_what_is_raw(store):
    document = only_document(run("inspect", store, "--json"))
    assert {kind["kind"] for kind in document["kinds"]} == {"gate", "up", "down", "dense"}
    shown = run("inspect", store).stdout
    for word in ["MixtralForCausalLM", "rank223", "gate", "down", "a vector", "format 1.0"]:
        assert word in shown


def test_verify_of_a_sound_store_finds_nothing(store):
    assert run("verify", store).exit_code == 0
    assert only_document(run("verify", store, "--json"))["errors"] == []


def test_verify_of_a_damaged_store_leaves_with_3_and_names_the_place(store, tmp_path):
    damaged = tmp_path / "store"
    damaged.mkdir()
    for path in store.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    shard = damaged / "experts-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[8192] ^= 1
    shard.write_bytes(data)
    result = run("verify", damaged)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "experts-00001.safetensors" in result.stderr
    assert "expert 0" in result.stderr
    result = run("verify", damaged, "--json")
    assert result.exit_code == 3
    error = only_document(result)["errors"][0]
    assert (error["file"], error["layer"], error["expert"]) == ("experts-00001.safetensors", 0, 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BudgetError("too little", floor_bytes=1), 1),
        (SpaceError("full"), 1),
        (FetchError("read failed", path="x", errno=5), 1),
        (CorruptError("bad byte", file="x", offset=7), 3),
        (MismatchError("another store's shard"), 3),
        (PermissionError(13, "Permission denied", "x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_every_error_is_one_sentence_and_its_code(error, code, as_json, capsys):
    terminal = _terminal.Terminal(as_json=as_json)
    with pytest.raises(SystemExit) as left, _terminal.reporting(terminal):
        raise error
    assert left.value.code == code
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    if as_json:
        assert json.loads(out)["error"]["type"] in {type(error).__name__, "OSError", "Interrupted"}
    else:
        assert out == ""


def test_a_fault_of_zipmoe_s_own_is_not_dressed_up():
    with pytest.raises(ZeroDivisionError), _terminal.reporting(_terminal.Terminal(as_json=True)):
        raise ZeroDivisionError


def test_there_is_a_bar_only_on_a_terminal(monkeypatch, capsys):
    terminal = _terminal.Terminal(as_json=True)
    with terminal.progress("Packing") as progress:
        assert progress is None
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with terminal.progress("Packing") as progress:
        progress(1_000_000, 2_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Packing" in err


def test_ctrl_c_stops_a_pack_with_130_and_the_pack_goes_on_later(tmp_path):
    checkpoint = build(tmp_path / "checkpoint", "mixtral", hidden_size=512, vocab_size=8000)
    command = [sys.executable, "-m", "zipmoe", "pack", str(checkpoint), str(tmp_path / "store")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "store").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    if running.returncode != 0:  # it may have been done already
        assert running.returncode == 130
        assert said == "zipmoe: interrupted\n"
        assert not (tmp_path / "store" / "zipmoe.json").exists()
    assert run("pack", checkpoint, tmp_path / "store").exit_code == 0
    assert run("verify", tmp_path / "store").exit_code == 0


def test_the_generated_documents_are_current():
    root = Path(__file__).resolve().parent.parent
    subprocess.run(
        [sys.executable, root / "tools" / "generate_docs.py", "--check"],
        check=True,
        env=os.environ | {"COLUMNS": "200"},
    )
