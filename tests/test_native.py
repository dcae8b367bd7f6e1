"""compute="native": the same bits in any company, and no less exact than stock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import families, write_checkpoint
from family_sweep import stock_model
from invariance import alone, dependencies, prompts
from transformers import AutoModelForCausalLM, DynamicCache

import zipmoe
from zipmoe import _core, demo, kv
from zipmoe.gated import GatedBlock
from zipmoe.linear import PackedWeight

ALL = {family.name: family for family in families()}
# Plain, shared expert, latent attention, biases and sinks, soft-cap and GELU, ungated is recurrent.
KINDS = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "gemma4", "qwen3_moe"]


def packed(name: str, folder: Path, **options: object) -> Path:
    if not (folder / name).exists():
        write_checkpoint(ALL[name], folder / name, 0)
    store = folder / f"{name}-store{len(list(folder.iterdir()))}"
    zipmoe.pack_checkpoint(folder / name, store, **options)
    return store


@pytest.mark.parametrize("name", KINDS)
def test_bits_depend_on_nothing_but_a_tokens_own_past(name: str, tmp_path: Path) -> None:
    with zipmoe.load(packed(name, tmp_path), memory="64GB") as loaded:
        assert dependencies(loaded.model) == []
        assert "attention" not in loaded.runtime.engaged()["fell_back"]


def at_the_floor(store: Path) -> zipmoe.Loaded:
    """Load with the least memory; what this process holds itself may grow meanwhile."""
    memory = 1
    for _ in range(5):
        try:
            return zipmoe.load(store, memory=memory)
        except zipmoe.BudgetError as error:
            memory = error.floor_bytes
    raise AssertionError("the floor keeps rising")


def test_codecs_threads_and_budgets_give_the_same_bits(tmp_path: Path) -> None:
    stores = [
        packed("qwen2_moe", tmp_path, codec=codec) for codec in ("rank223", "rank4", "zstd", "raw")
    ]
    expected = None
    for store in stores:
        for threads in (1, 2):
            _core.set_num_threads(threads)
            try:
                with zipmoe.load(store, memory="64GB") as loaded:
                    assert loaded.runtime.source.engine.threads == threads
                    logits = alone(loaded.model, prompts(loaded.model, 1)[0])
            finally:
                _core.set_num_threads(0)
            expected = logits if expected is None else expected
            assert torch.equal(logits, expected)
    with at_the_floor(stores[0]) as loaded:
        assert torch.equal(alone(loaded.model, prompts(loaded.model, 1)[0]), expected)


@pytest.mark.parametrize("name", KINDS)
def test_errors_are_no_larger_than_those_of_stock(name: str, tmp_path: Path) -> None:
    store = packed(name, tmp_path)
    exact = stock_model(ALL[name], tmp_path / name, torch.float32)
    stock = stock_model(ALL[name], tmp_path / name)
    with zipmoe.load(store, memory="64GB") as loaded, torch.no_grad():
        ids = prompts(loaded.model, 17)
        reference = exact(ids).logits
        ours = (loaded.model(ids).logits - reference).abs().mean()
        theirs = (stock(ids).logits - reference).abs().mean()
    # A router of a tiny random model often finds two experts nearly alike, and any rounding
    # decides: what is left is noise around 1. The soak test below compares a model that speaks.
    assert ours <= 1.5 * theirs


def test_one_flipped_bit_of_a_dense_weight_is_seen(tmp_path: Path) -> None:
    store = packed("mixtral", tmp_path)
    with zipmoe.load(store, memory="64GB") as loaded:
        expected = alone(loaded.model, prompts(loaded.model, 1)[0])
    path = next((tmp_path / "mixtral").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)
    with zipmoe.load(packed("mixtral", tmp_path), memory="64GB") as loaded:
        assert not torch.equal(alone(loaded.model, prompts(loaded.model, 1)[0]), expected)


def test_weights_stay_packed_and_tied_ones_are_shared(tmp_path: Path) -> None:
    with zipmoe.load(packed("qwen2_moe", tmp_path), memory="64GB") as loaded:
        model, dense = loaded
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert linears
        assert all(isinstance(m.weight, PackedWeight) for m in linears)
        assert isinstance(model.get_input_embeddings().weight, PackedWeight)
        assert any(isinstance(m, GatedBlock) for m in model.modules())
        assert loaded.runtime.dense.decoded == []
        weight = linears[0].weight
        whole = weight.float()
        assert torch.equal(weight[0], whole[0].bfloat16())
        assert loaded.runtime.dense.decoded != []
        del dense


def test_a_cache_that_grows_in_place_holds_what_any_other_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, growing = DynamicCache(), DynamicCache()
    for step in (300, 1, 1, 200, 1, 90):
        new = torch.randn(2, 2, 3, step, 8, generator=generator)
        kv.grow_in_place(growing)
        for cache in (plain, growing):
            cache.update(new[0], new[1], 0)
        assert growing.get_seq_length() == plain.get_seq_length()
        for ours, theirs in zip(growing.layers, plain.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        if step == 200:  # what generation may do to a cache between two steps
            for cache in (plain, growing):
                cache.crop(-5)
                cache.reorder_cache(torch.tensor([1, 0]))
    assert type(growing.layers[0]) is kv.GrowingLayer
    held = growing.layers[0].keys
    growing.update(*torch.randn(2, 2, 3, 1, 8, generator=generator), 0)
    assert growing.layers[0].keys.data_ptr() == held.data_ptr()


WATCHED = """
import sys, threading, time
from pathlib import Path
import torch, zipmoe

def running(task):
    try:
        return (task / "stat").read_text().rsplit(")", 1)[1].split()[0] == "R"
    except OSError:  # it has just ended
        return False

def sample():
    own = threading.get_native_id()
    while not stop.is_set():
        tasks = [t for t in Path("/proc/self/task").iterdir() if int(t.name) != own]
        # Who wakes another may still be going to sleep: only those count that run at both looks.
        first = [task for task in tasks if running(task)]
        time.sleep(0.001)
        seen.append(sum(map(running, first)))
        time.sleep(0.001)

with zipmoe.load(sys.argv[1], memory="64GB") as loaded:
    ids = torch.arange(3, 26)[None]
    loaded.model.generate(ids, max_new_tokens=60, do_sample=False)  # every expert is in memory then
    stop, seen = threading.Event(), []
    watcher = threading.Thread(target=sample)
    watcher.start()
    for _ in range(10):  # one alone may be over after ten looks
        loaded.model.generate(ids, max_new_tokens=60, do_sample=False)
    stop.set()
    watcher.join()
print(len(seen), max(seen), sorted(seen)[len(seen) * 99 // 100])
"""


def test_never_more_threads_run_than_there_are_cores(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, packed("qwen2_moe", tmp_path)],
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        check=True,
    )
    samples, _, most = map(int, done.stdout.split())
    assert samples > 10
    assert 1 <= most <= len(os.sched_getaffinity(0))


@pytest.mark.soak
def test_errors_of_the_demo_model_are_no_larger_than_those_of_stock(soak_record):
    checkpoint = demo.build_checkpoint(demo.cache_folder()).folder
    store = demo.cache_folder() / "store"
    if not (store / "zipmoe.json").is_file():
        zipmoe.pack_checkpoint(checkpoint, store)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    # The other two models count as the base of this process.
    with zipmoe.load(store, memory="40GB") as loaded, torch.no_grad():
        text = Path("docs/format.md").read_text() + Path("docs/architecture.md").read_text()
        ids = torch.tensor(loaded.tokenizer(text).input_ids[:2000]).view(4, 500)
        errors = {"native": 0.0, "stock": 0.0}
        for row in ids:
            reference = exact(row[None]).logits
            for name, model in (("native", loaded.model), ("stock", stock)):
                errors[name] += (model(row[None]).logits - reference).abs().mean().item() / 4
    soak_record("mean absolute logit error against FP32", tokens=2000, **errors)
    assert errors["native"] <= errors["stock"]
