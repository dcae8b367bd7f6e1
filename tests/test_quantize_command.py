"""`zipmoe quantize` from a tiny store to a lossy one: what is allowed, said, and resumed."""

import json
import shutil
from collections import Counter

import pytest
from small_store import write_store
from typer.testing import CliRunner

from zipmoe import quantize
from zipmoe._errors import MismatchError, QuantizationError
from zipmoe.cli import app
from zipmoe.quality import QualityLoss
from zipmoe.quantize import QuantizeOptions, choose_widths, write_chosen
from zipmoe.store import open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("quantize"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("What the quick brown fox jumps over is a lazy dog. " * 20)
    return path


def run(*words):
    return CliRunner().invoke(app, ["quantize", *map(str, words)], catch_exceptions=False)


def test_the_store_says_what_was_lost_and_it_is_within_what_was_allowed(store, text, tmp_path):
    out = tmp_path / "out"
    done = run(store, out, "--max-loss", 0.01, "--calibration", text, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["reached"] <= report["bound"] <= 0.01 == report["target"]
    assert report["perplexity"] <= 1.01 * report["lossless_perplexity"]
    assert report["stored_expert_bytes"] < report["expert_bytes"]
    with open_store(out) as opened:
        lossy = opened.manifest.lossy
    assert lossy.counts() == report["experts"]
    assert lossy.loss.reached == report["reached"]
    assert lossy.loss.target == 0.01
    assert lossy.loss.metric == "perplexity"
    assert lossy.loss.calibration_sha256 == report["calibration_sha256"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text"}
    again = run(store, out, "--max-loss", 0.01, "--calibration", text)
    assert again.exit_code == 1
    assert "finished store" in again.output


def test_more_is_lowered_where_more_may_be_lost(store, text, tmp_path, monkeypatch):
    costs = {"lossless": 0.0, "int8": 0.001, "int4": 0.01, "int2": 0.1}

    def loss(self, widths):
        cost = sum(costs[width] for width in widths.values())
        return QualityLoss(cost, cost)

    monkeypatch.setattr(quantize.Measuring, "loss", loss)
    found = {}
    for most in (0.008, 0.1, 0.5, 2.0):
        choice = choose_widths(store, tmp_path / "out", QuantizeOptions(most, text=text))
        found[most] = Counter(bits for layer in choice.bits for bits in layer)
    assert found == {
        0.008: {16: 8, 8: 8},
        0.1: {8: 7, 4: 9},
        0.5: {4: 13, 2: 3},
        2.0: {2: 16},
    }


def test_what_was_stopped_goes_on(store, text, tmp_path, monkeypatch):
    options = QuantizeOptions(0.05, text=text)
    whole = choose_widths(store, tmp_path / "whole", options)
    measured = quantize.Measuring._measure
    runs = []

    def stopped(self, widths):
        runs.append(widths)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return measured(self, widths)

    monkeypatch.setattr(quantize.Measuring, "_measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        choose_widths(store, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    steps = []
    found = choose_widths(
        store, tmp_path / "out", options, progress=lambda done, total: steps.append((done, total))
    )
    assert found.found == whole.found
    fresh = [widths for number, widths in enumerate(runs) if number != 3]
    assert len(fresh) == len({str(sorted(widths.items())) for widths in fresh})
    assert steps == sorted(steps)
    assert steps[-1][0] <= steps[-1][1]
    write_chosen(store, tmp_path / "out", options, found)
    assert not (tmp_path / ".out.measured").exists()


def test_tasks_decide_where_accuracy_is_asked_for(store, text, tmp_path):
    task = tmp_path / "task"
    lines = [json.dumps({"prompt": f"{n} and", "answer": "x"}) for n in range(4)]
    task.write_text("\n".join(lines))
    words = ["--max-loss", 0.5, "--metric", "accuracy", "--calibration", text]
    done = run(store, tmp_path / "out", *words, "--task", task, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["accuracy"] >= report["lossless_accuracy"] - 0.5
    task.write_text(json.dumps({"prompt": "long " * 400, "answer": "x"}))
    refused = run(store, tmp_path / "other", *words, "--task", task)
    assert refused.exit_code == 1
    assert "longer than 1024 tokens" in refused.output
    without = run(store, tmp_path / "other", *words)
    assert without.exit_code == 1
    assert "file of tasks" in without.output


def test_rows_share_a_scale_where_that_is_asked_for(store, text, tmp_path):
    out = tmp_path / "out"
    words = ["--max-loss", 5, "--calibration", text, "--scales", "row"]
    done = run(store, out, *words, "--importance", "exhaustive")
    assert done.exit_code == 0, done.output
    assert "lossy" in done.stdout
    with open_store(out) as opened:
        assert opened.manifest.lossy.scale_group == 0


def test_a_loss_that_no_expert_keeps_to_is_refused(store, text, tmp_path, monkeypatch):
    def loss(self, widths):
        cost = float(set(widths.values()) != {"lossless"})
        return QualityLoss(cost, cost)

    monkeypatch.setattr(quantize.Measuring, "loss", loss)
    with pytest.raises(QuantizationError, match="not one expert"):
        choose_widths(store, tmp_path / "out", QuantizeOptions(0.0, text=text))


def test_a_lossy_store_is_not_quantized_again(store, text, tmp_path):
    options = QuantizeOptions(0.05, text=text)
    first = tmp_path / "first"
    write_chosen(store, first, options, choose_widths(store, first, options))
    with pytest.raises(MismatchError, match="lossy already"):
        choose_widths(first, tmp_path / "second", options)
    shutil.rmtree(first)
