"""Forecasts of runs: what they follow from, how they stand beside a run, and what they learn."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from measured_machine import as_if_measured
from speaking import build_speaking
from test_plan import MACHINE, model
from typer.testing import CliRunner

import zipmoe
from zipmoe import hardware
from zipmoe._synthetic_routing import Routing, synthetic_trace
from zipmoe.budget import MemoryReport
from zipmoe.cli import app
from zipmoe.forecast import Forecaster, engine_sizes, scaled_rates, work_s
from zipmoe.pack import pack_checkpoint
from zipmoe.plan import plan_cache
from zipmoe.routing import by_recency
from zipmoe.schedule import Tier

SIZES = replace(model(), layers=4)
ALL = SIZES.layers * SIZES.experts


def forecaster(slots, rates=MACHINE, sizes=SIZES):
    return Forecaster(sizes, rates, slots=slots, policy="request")


def test_a_run_that_finds_everything_in_memory_takes_what_its_products_take():
    warm = forecaster(ALL).run(64, 32, is_cold=False)
    assert warm.tpot_s == pytest.approx(work_s(SIZES, MACHINE), rel=0.01)
    assert warm.hit_rate > 0.97  # a few experts no earlier token had chosen
    cold = forecaster(ALL).run(64, 32)
    assert cold.ttft_s > 2 * warm.ttft_s
    assert cold.is_cold
    assert not warm.is_cold


def test_fewer_slots_read_more_and_take_longer():
    runs = [forecaster(slots).run(64, 64, is_cold=False) for slots in (20, 60, 120, ALL)]
    for less, more in pairwise(runs):
        assert less.hit_rate < more.hit_rate
        assert less.bytes_per_token > more.bytes_per_token
        assert less.tpot_s > more.tpot_s
        assert less.ttft_s > 0.99 * more.ttft_s
    wanted = SIZES.layers * SIZES.top_k * SIZES.missing_bytes(Tier.ABSENT)
    for run in runs:
        assert run.bytes_per_token == pytest.approx((1 - run.hit_rate) * wanted)


def test_longer_prompts_take_longer_and_long_contexts_slow_down_tokens():
    short, long = (forecaster(60).run(tokens, 16) for tokens in (64, 2048))
    assert long.ttft_s > 2 * short.ttft_s
    sizes = replace(SIZES, state_bytes=100_000.0)
    assert forecaster(60, sizes=sizes).run(2048, 16).tpot_s > long.tpot_s


def test_the_replay_of_recorded_routing_agrees_with_the_planner():
    trace = synthetic_trace(Routing(60, 4, 4, 8, prompt_tokens=64, decode_tokens=64), seed=2)
    found = forecaster(120).replay(trace, 64)
    cache = 120 * SIZES.missing_bytes(Tier.ABSENT)
    memory = MemoryReport(promised=cache, base=0, dense=0, kv=0, scratch=0, cache=cache)
    planned = plan_cache(engine_sizes(SIZES), MACHINE, by_recency(trace), memory)
    assert found.hit_rate == pytest.approx(planned.hit_rate, abs=0.1)
    assert found.tpot_s == pytest.approx(planned.tpot.seconds, rel=0.1)


def test_what_runs_have_shown_scales_the_rates_and_nothing_else(tmp_path, monkeypatch):
    as_if_measured(monkeypatch, tmp_path / "cache", tmp_path)
    measured = hardware.known_profile(tmp_path)
    rates = scaled_rates(measured, SIZES, "mine")
    hardware.remember_work("mine", 0.5, 10)
    learned = scaled_rates(measured, SIZES, "mine")
    assert work_s(SIZES, learned) == pytest.approx(0.5)
    assert (learned.read_bytes_s, learned.flops) == (rates.read_bytes_s, rates.flops)
    assert scaled_rates(measured, SIZES, "another's") == rates
    hardware.remember_work("mine", 1.0, 30)
    assert hardware.known_work("mine") == pytest.approx((0.5 * 10 + 1.0 * 30) / 40)
    for _ in range(20):
        hardware.remember_work("mine", 2.0, 100)
    assert hardware.known_work("mine") == pytest.approx(2.0, rel=0.01)  # old runs fade
    assert hardware.known_profile(tmp_path) == measured


def test_what_cannot_be_kept_is_not_and_damage_is_as_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    hardware.remember_work("mine", 0.5, 10)
    assert hardware.known_work("mine") is None
    as_if_measured(monkeypatch, tmp_path / "cache", tmp_path)
    for damage in ({"seconds": "much"}, {}, 7, {"seconds": -1, "tokens": 5}):
        hardware._write({hardware._work_key("mine"): damage})
        assert hardware.known_work("mine") is None
        hardware.remember_work("mine", 0.5, 10)
        assert hardware.known_work("mine") == 0.5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    pack_checkpoint(build_speaking(folder / "checkpoint"), folder / "store")
    return folder / "store"


def run(*words, stdin=None):
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


ROOMY = ["--memory", "32GB", "--context", "200"]


def test_generate_says_the_forecast_beside_what_it_took(store, tmp_path, monkeypatch):
    as_if_measured(monkeypatch, tmp_path / "cache", store)
    words = ["generate", store, "--prompt", "hello", "--max-tokens", 12, *ROOMY]
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    forecast = document["forecast"]
    assert forecast.keys() == {"ttft_s", "tpot_s", "hit_rate", "bytes_per_token", "is_cold"}
    assert forecast["is_cold"]
    assert all(forecast[name] >= 0 for name in ("ttft_s", "tpot_s", "hit_rate"))
    assert 0 <= document["hit_rate"] <= 1
    assert document["bytes_per_token"] >= 0
    assert 0 <= document["wait_s"] <= document["tpot_s"]
    assert result.stderr.count("forecast (actual): ") == 1
    with zipmoe.load(store, memory="32GB", context=200) as loaded:
        learned = hardware.known_work(loaded.runtime.identity)
    assert learned == pytest.approx(document["tpot_s"] - document["wait_s"])
    again = json.loads(run(*words, "--json").stdout)["forecast"]
    assert again["tpot_s"] == pytest.approx(learned, rel=0.2)
    assert "earlier runs" in run("plan", store, *ROOMY).stdout


def test_chat_says_it_after_each_answer(store, tmp_path, monkeypatch):
    as_if_measured(monkeypatch, tmp_path / "cache", store)
    result = run("chat", store, "--max-tokens", 4, *ROOMY, stdin="hello\nhello\n/exit\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("forecast (actual): ") == 2


def test_without_a_profile_there_is_no_forecast_but_a_hint_once(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run("chat", store, "--max-tokens", 2, *ROOMY, stdin="hello\nhello\n/exit\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("zipmoe profile") == 1
    words = ["generate", store, "--prompt", "hello", "--max-tokens", 2, "--json", *ROOMY]
    assert json.loads(run(*words).stdout)["forecast"] is None
    with_torch = run(*words, "--compute", "torch")
    assert json.loads(with_torch.stdout)["forecast"] is None
    assert "zipmoe profile" not in with_torch.stderr
    assert not (tmp_path / "zipmoe").exists()  # nothing is learned without a profile
