"""`zipmoe plan`: it counts what a load counts, wherever the model is, and says what it rests on."""

import json
import math
import os
import subprocess
import sys

import pytest
from checkpoints import build
from hub_server import serve
from measured_machine import as_if_measured
from small_store import write_store
from typer.testing import CliRunner

import zipmoe
from zipmoe import _core, hardware
from zipmoe._planning import make_plan, open_target
from zipmoe._quantizer import LoadOptions
from zipmoe._skeleton import cache_slots
from zipmoe._sketch import sketch_store
from zipmoe._synthetic_routing import Routing, synthetic_trace
from zipmoe.checkpoint import open_checkpoint
from zipmoe.cli import app
from zipmoe.model import skeleton_of
from zipmoe.pack import pack_checkpoint
from zipmoe.routing import save_trace
from zipmoe.store import open_store

GB = 10**9
SHARES = ("dense", "kv", "scratch", "cache")  # all but base, which is measured


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("small"), hidden=256, inner=384)


@pytest.fixture
def machine(store, tmp_path, monkeypatch):
    as_if_measured(monkeypatch, tmp_path / "cache", store)


def run(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def counted(folder, **options):
    with open_store(folder) as opened:
        return skeleton_of(folder, opened, LoadOptions(**options))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "jamba"])
@pytest.mark.parametrize("compute", ["native", "torch"])
def test_a_plan_counts_what_a_load_counts(family, compute, family_store):
    folder = family_store(family)
    skeleton = counted(folder, context=64, compute=compute, batch=2)
    with zipmoe.load(folder, memory="32GB", context=64, compute=compute, batch=2) as loaded:
        needs = loaded.runtime._needs
        for share in ("dense", "kv", "scratch", "cache_floor", "cache_all", "loading"):
            assert getattr(skeleton.needs, share) == getattr(needs, share), share
        assert skeleton.sizes == loaded.runtime.sizes
        slots = cache_slots(skeleton.table, loaded.memory.cache)
        assert (
            slots
            == loaded.runtime.cache.slots
            == len(skeleton.table) // len({*skeleton.table[:, 2].tolist()})
        )
    assert skeleton.needs.base >= 500_000_000


def test_slots_are_those_of_the_cache(store):
    skeleton = counted(store, context=64)
    for more in (1, 100_000, 567_890, 1_234_567, 5_000_000):
        capacity = skeleton.needs.cache_floor + more
        cache = _core.ExpertCache(skeleton.paths, skeleton.table, capacity_bytes=capacity)
        assert cache_slots(skeleton.table, capacity) == cache.slots
        cache.close()


@pytest.mark.parametrize("codec", ["rank223", "rank3", "rank4", "zstd", "lz4hc", "raw"])
@pytest.mark.parametrize("scale", [(256, 384), (320, 608)])
def test_a_checkpoint_is_counted_within_two_percent_of_its_store(codec, scale, tmp_path):
    hidden, inner = scale
    checkpoint = write_store(tmp_path / "made", hidden=hidden, inner=inner).parent / "checkpoint"
    pack_checkpoint(checkpoint, tmp_path / "store", codec=codec)
    sketch = sketch_store(open_checkpoint(checkpoint), codec)
    packed = counted(tmp_path / "store", context=64)
    planned = skeleton_of(checkpoint, sketch, LoadOptions(context=64))
    for share in ("dense", "cache_all"):
        found, actual = getattr(planned.needs, share), getattr(packed.needs, share)
        assert math.isclose(found, actual, rel_tol=0.02), share
    for share in ("kv", "scratch"):
        assert getattr(planned.needs, share) == getattr(packed.needs, share)
    resident = [
        one.sizes.resident_bytes(tier) for tier in planned.sizes.tiers for one in (planned, packed)
    ]
    for found, actual in zip(resident[::2], resident[1::2], strict=True):
        assert math.isclose(found, actual, rel_tol=0.02)
    assert planned.sizes.codec == packed.sizes.codec
    assert planned.sizes.dense_weights == packed.sizes.dense_weights
    with open_store(tmp_path / "store") as opened:
        shards = sum(shard.num_bytes for shard in opened.manifest.shards)
    assert math.isclose(sketch.store_bytes, shards, rel_tol=0.02)


SAY = """
import json, sys
from pathlib import Path
from zipmoe._planning import open_target
found = open_target(sys.argv[1], context=64, codec="rank223")
print(json.dumps([found.kind, found.store_bytes, found.skeleton.needs.dense]))
"""


@pytest.mark.parametrize("shard_size", ["1MB", "100MB"])
def test_of_a_hub_id_only_headers_are_read(shard_size, tmp_path):
    repo = build(
        tmp_path / "repo", "mixtral", hidden_size=512, vocab_size=2000, shard_size=shard_size
    )
    whole = sum(path.stat().st_size for path in repo.glob("*.safetensors"))
    shards = len(list(repo.glob("*.safetensors")))
    with serve({"org/model": repo}) as hub:
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", SAY, "org/model"],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert sum(hub.sent.values()) < whole / 4
        weights = {name: sent for name, sent in hub.sent.items() if name.endswith(".safetensors")}
        assert len(weights) == shards
        assert all(sent <= 100_001 for sent in weights.values())  # the client's first request
    kind, store_bytes, dense = json.loads(done.stdout)
    local = open_target(str(repo), context=64, codec="rank223")
    assert (kind, store_bytes, dense) == ("hub", local.store_bytes, local.skeleton.needs.dense)
    downloaded = [p for p in (tmp_path / "cache").rglob("*.safetensors") if p.is_file()]
    assert downloaded == []


def test_the_command_says_the_same_as_a_load(store, machine):
    result = run(store, "--memory", "32GB", "--context", 64, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    with zipmoe.load(store, memory="32GB", context=64) as loaded:
        memory = loaded.memory.as_dict()
        assert {k: document["memory"][k] for k in SHARES} == {k: memory[k] for k in SHARES}
        assert document["slots"] == loaded.runtime.cache.slots == document["experts"]
    assert document["target"]["kind"] == "store"
    assert document["target"]["sizes"] == "measured"
    assert document["hit_rate"] == 1
    assert document["read_bytes"] == 0
    assert document["better"] is None
    assert document["replayed"] is None
    assert document["split"] == {"full": 0, "compressed": 8, "sign_mantissa": 0, "exponents": 0}
    for one in (document["tpot"], *document["ttft"]):
        assert 0 < one["low"] < one["seconds"] < one["high"]
    assert [one["prompt_tokens"] for one in document["ttft"]] == [64, 512]
    assert document["popularity"] == "recency in synthetic routing"
    assert document["work"] == "estimated"
    said = run(store, "--memory", "32GB", "--context", 64).stdout
    for word in ("base", "KV", "floor", "because   all 8", "synthetic", "estimated", "TTFT 512"):
        assert word.lower() in said.lower()


def test_the_floor_that_is_named_is_the_floor_of_a_load(store, machine):
    result = run(store, "--memory", "10MB", "--context", 64, "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "BudgetError"
    assert "floor" in error["message"]
    with pytest.raises(zipmoe.BudgetError) as caught:
        zipmoe.load(store, memory=10**7, context=64)
    floor = counted(store, context=64).needs.floor
    assert abs(floor - caught.value.floor_bytes) < 50_000_000  # the base is measured anew


def partly(store, memory=None, **options):
    """A plan at a budget that holds about half of the experts."""
    target = open_target(str(store), context=64, codec="rank223")
    needs = target.skeleton.needs
    memory = memory or needs.floor + (needs.cache_all - needs.cache_floor) // 2
    return make_plan(target, hardware.profile, memory=memory, **options)


def test_recorded_routing_is_planned_with_and_replayed(store, machine, tmp_path):
    trace = synthetic_trace(Routing(8, 2, 2, 6, prompt_tokens=12, decode_tokens=30), seed=3)
    save_trace(trace, tmp_path / "trace.npz")
    synthetic, recorded = partly(store), partly(store, trace=tmp_path / "trace.npz")
    assert synthetic.replayed is None
    assert 2 < synthetic.slots < 16
    assert recorded.replayed.policy == "request"
    assert recorded.replayed.requests == 3  # the other half
    assert 0 < recorded.replayed.hit_rate < 1
    assert abs(recorded.replayed.hit_rate - recorded.cache.hit_rate) < 0.2
    assert recorded.replayed.read_bytes > 0
    assert recorded.popularity.endswith(f"({tmp_path / 'trace.npz'})")
    assert 0 < recorded.cache.hit_rate < 1


def test_another_model_s_trace_is_refused(store, machine, tmp_path):
    trace = synthetic_trace(Routing(9, 2, 2, 2, prompt_tokens=4, decode_tokens=4), seed=3)
    save_trace(trace, tmp_path / "trace.npz")
    result = run(store, "--memory", "32GB", "--trace", tmp_path / "trace.npz", "--json")
    assert result.exit_code == 1
    assert "another model" in json.loads(result.stdout)["error"]["message"]


def test_a_split_that_the_engine_cannot_hold_is_said_and_not_planned_with(tmp_path, monkeypatch):
    folder = write_store(tmp_path / "made", hidden=256, inner=384).parent
    pack_checkpoint(folder / "checkpoint", tmp_path / "zstd", codec="zstd")
    as_if_measured(monkeypatch, tmp_path / "cache", tmp_path / "zstd")
    found = partly(tmp_path / "zstd")
    assert found.cache.split.pools[0] == found.cache.split.pools[2] == 0
    assert found.better is not None  # decoding zstd takes longer than reading it
    assert "full" in found.better.split
    assert 0.01 < found.better.gain < 1
    assert found.better.tpot_s < found.cache.tpot.seconds
    said = run(tmp_path / "zstd", "--memory", str(found.memory.promised), "--context", 64).stdout
    assert "less per token" in said


@pytest.mark.parametrize(
    ("target", "word"), [("nowhere", "does not exist"), ("a b", "does not exist"), ("{empty}", "")]
)
def test_what_is_no_model_is_refused_in_one_sentence(target, word, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(target.format(empty=tmp_path / "empty"))
    assert result.exit_code == 1
    assert result.stderr.startswith("zipmoe: ")
    assert word in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_machine_that_was_never_measured_is_measured_first(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def profile(folder, **_):
        asked.append(folder)
        as_if_measured(monkeypatch, tmp_path, store)
        return hardware.known_profile(store)

    monkeypatch.setattr(hardware, "profile", profile)
    assert run(store, "--memory", "32GB", "--context", 64).exit_code == 0
    assert asked == [store]
