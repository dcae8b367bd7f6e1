"""Loading a store: through transformers, loudly or exactly, and without leaving anything behind."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import answers
from safetensors.torch import load_file, save_file
from small_store import write_store
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import zipmoe
from zipmoe._quantizer import ZipmoeConfig
from zipmoe.dense import DenseFile, DenseTensor


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("small"))


def python(code, *arguments):
    """Run code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_stock_transformers_refuses_a_store_instead_of_loading_noise(store):
    code = (
        "import sys, transformers\n"
        "try: transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except OSError as error: print('refused:', error)\n"
        "import zipmoe\n"
        "print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)\n"
    )
    done = python(code, store)
    assert done.stdout.splitlines()[0].startswith("refused: "), done.stderr
    assert "model.safetensors" in done.stdout
    assert done.stdout.splitlines()[-1] == "MixtralForCausalLM", done.stderr


def test_importing_zipmoe_is_enough_and_imports_neither_torch_nor_transformers(store):
    code = (
        "import sys, zipmoe\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, model.zipmoe.report.promised > 0)\n"
    )
    done = python(code, store)
    assert done.stdout.split() == ["MixtralForCausalLM", "True"], done.stderr


@pytest.mark.parametrize("own", [None, "active"])
def test_torch_s_threads_sleep_between_operators_unless_somebody_wants_them_awake(own):
    code = "import os, zipmoe; print(os.environ['OMP_WAIT_POLICY'])"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {} if own is None else {"OMP_WAIT_POLICY": own}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().strip() == (own or "passive")


def test_from_pretrained_and_load_give_stock_bits(store):
    stock = AutoModelForCausalLM.from_pretrained(store.parent / "checkpoint", dtype="auto")
    expected = answers(stock, new_tokens=6)
    with zipmoe.load(store, memory="64GB") as loaded:
        native = answers(loaded.model, new_tokens=6)
    model = AutoModelForCausalLM.from_pretrained(store)
    assert native.differences(answers(model, new_tokens=6)) == []
    with zipmoe.load(store, memory="64GB", compute="torch") as loaded:
        model, tokenizer = loaded
        assert expected.differences(answers(model, new_tokens=6)) == []
        assert tokenizer("ab").input_ids == [
            tokenizer("a").input_ids[0],
            tokenizer("b").input_ids[0],
        ]
        logits = model(
            torch.tensor([[1, 2, 3]])
        ).logits  # gradients enabled, as a user may leave it
        assert torch.equal(logits, stock(torch.tensor([[1, 2, 3]])).logits)


def test_the_same_tokens_come_out_with_every_policy(store):
    with zipmoe.load(store, memory="64GB") as loaded:
        assert loaded.runtime.cache.policy == "request"
        expected = answers(loaded.model, new_tokens=6)
    with pytest.raises(zipmoe.BudgetError) as caught:
        zipmoe.load(store, memory=10**6)
    little = caught.value.floor_bytes + 50_000_000  # the base is measured anew for each load
    for policy in ("request", "lru", "lfu", "fifo", "marking", "edgemoe"):
        with zipmoe.load(store, memory=little, policy=policy) as loaded:
            assert loaded.runtime.cache.policy == policy
            assert expected.differences(answers(loaded.model, new_tokens=6)) == []
    with pytest.raises(ValueError, match="roulette"):
        zipmoe.load(store, memory="64GB", policy="roulette")


def test_the_same_tokens_come_out_at_every_budget(store):
    with zipmoe.load(store, memory="64GB") as loaded:
        expected = answers(loaded.model, new_tokens=6)
        whole = loaded.memory.total
    with pytest.raises(zipmoe.BudgetError) as caught:
        zipmoe.load(store, memory=10**6)
    assert "floor" in str(caught.value)
    slack = 50_000_000  # the base is measured anew for each load
    for memory in (
        caught.value.floor_bytes + slack,
        (caught.value.floor_bytes + whole) // 2 + slack,
    ):
        with zipmoe.load(store, memory=memory) as loaded:
            assert loaded.memory.total <= memory
            assert expected.differences(answers(loaded.model, new_tokens=6)) == []


def test_a_pass_that_memory_was_not_counted_for_is_refused_before_it_computes(store):
    with pytest.raises(zipmoe.BudgetError) as caught:
        zipmoe.load(store, memory=10**6, context=32, batch=2)
    both = caught.value.floor_bytes
    with pytest.raises(zipmoe.BudgetError) as caught:
        zipmoe.load(store, memory=10**6, context=32)
    assert caught.value.floor_bytes < both
    little = both + 50_000_000  # the base is measured anew for each load
    one, two = (torch.zeros(sequences, 32, dtype=torch.long) for sequences in (1, 2))
    with zipmoe.load(store, memory=little, context=32, batch=2) as (model, _), torch.no_grad():
        model.zipmoe.report = replace(model.zipmoe.report, promised=model.zipmoe.report.total)
        together = model(two).logits
        with pytest.raises(zipmoe.BudgetError, match="2 sequences of 2000 tokens"):
            model(torch.zeros(2, 2000, dtype=torch.long))
    with zipmoe.load(store, memory=little, context=32) as (model, _), torch.no_grad():
        model.zipmoe.report = replace(model.zipmoe.report, promised=model.zipmoe.report.total)
        state = model(one, use_cache=True)
        assert torch.equal(state.logits, together[:1])
        before = model.zipmoe.cache.counters()
        with pytest.raises(zipmoe.BudgetError, match="2 sequences of 32 tokens") as refused:
            model(two)
        assert refused.value.floor_bytes > caught.value.floor_bytes
        with pytest.raises(zipmoe.BudgetError, match="33 tokens"):
            model(one[:, :1], past_key_values=state.past_key_values)
        assert model.zipmoe.cache.counters() == before
        assert torch.equal(model(one).logits, together[:1])
    with pytest.raises(ValueError, match="batch"):
        zipmoe.load(store, batch=0)


def test_a_model_cannot_be_saved_copied_or_pickled_by_mistake(store, tmp_path):
    with zipmoe.load(store, memory="64GB") as (model, _):
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path)
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(model)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(model)
        with pytest.raises(TypeError, match="cannot be pickled"):
            torch.save(model, tmp_path / "model.pt")
        model.set_experts_implementation("grouped_mm")
        with pytest.raises(AttributeError, match="read on demand"), torch.no_grad():
            model(torch.tensor([[1, 2]]))
        model.set_experts_implementation("eager")  # the family's own forward works too
        with torch.no_grad():
            model(torch.tensor([[1, 2]]))


def test_other_places_and_other_options_are_refused(store, tmp_path):
    for device in ("cuda", {"": 0}, "meta"):
        with pytest.raises((ValueError, RuntimeError)):
            AutoModelForCausalLM.from_pretrained(store, device_map=device)
    with pytest.raises(ValueError, match="unknown compute 'fast'; there is native, torch"):
        zipmoe.load(store, compute="fast")
    with pytest.raises(ValueError, match="context"):
        zipmoe.load(store, context=0)
    with pytest.raises(ValueError, match="amount of memory"):
        zipmoe.load(store, memory="much")
    with pytest.raises(ValueError, match="pack the checkpoint first"):
        AutoModelForCausalLM.from_pretrained(
            store.parent / "checkpoint", quantization_config=ZipmoeConfig()
        )
    for folder in (tmp_path, store.parent / "checkpoint"):
        with pytest.raises(zipmoe.FormatError, match="not a zipmoe store"):
            zipmoe.load(folder)


def test_a_weight_that_is_missing_is_an_error_and_not_noise(store, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in (store.parent / "checkpoint").iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            tensors.pop("model.layers.1.self_attn.q_proj.weight")
            save_file(tensors, checkpoint / path.name, {"format": "pt"})
        else:
            (checkpoint / path.name).write_bytes(path.read_bytes())
    zipmoe.pack_checkpoint(checkpoint, tmp_path / "store")
    with pytest.raises(zipmoe.MismatchError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        zipmoe.load(tmp_path / "store", memory="64GB")


def test_a_store_loaded_as_another_kind_of_model_is_refused(store):
    with pytest.raises((zipmoe.MismatchError, ValueError)):
        AutoModelForImageTextToText.from_pretrained(store)
    with pytest.raises(zipmoe.MismatchError, match="has no module"):
        transformers.AutoModel.from_pretrained(store)


def open_things():
    """Descriptors, threads, and what is left of dense files, of this process."""
    gc.collect()
    mapped = Path("/proc/self/maps").read_text().count("zipmoe-dense")
    links = Path(tempfile.gettempdir()).glob("zipmoe-*/dense.safetensors")
    ours = [link for link in links if str(link.readlink()).startswith(f"/proc/{os.getpid()}/")]
    files, tasks = (list(Path("/proc/self", kind).iterdir()) for kind in ("fd", "task"))
    return len(files), threading.active_count(), mapped, len(ours), len(tasks)


def test_closing_frees_threads_files_and_memory(store):
    zipmoe.load(store, memory="64GB").close()  # torch's own threads exist from here on
    before = open_things()
    loaded = zipmoe.load(store, memory="64GB")
    model = loaded.model
    assert open_things() != before
    loaded.close()
    loaded.close()
    with pytest.raises((ValueError, RuntimeError)), torch.no_grad():
        model(torch.tensor([[1, 2]]))
    assert open_things() == before


def test_a_model_that_nobody_holds_frees_its_cache(store):
    zipmoe.load(store, memory="64GB").close()
    before = open_things()
    model = zipmoe.load(store, memory="64GB").model
    cache = model.zipmoe.cache
    del model
    gc.collect()
    with pytest.raises(ValueError, match="closed"):
        cache.prefetch(0, [0])
    del cache
    assert open_things() == before


def test_a_load_that_fails_leaves_nothing_open(store):
    zipmoe.load(store, memory="64GB").close()
    before = open_things()
    with pytest.raises(zipmoe.BudgetError):
        zipmoe.load(store, memory=10**6)
    assert open_things() == before


def test_the_dense_file_keeps_phases_and_gives_back_what_is_not_used(tmp_path):
    del tmp_path
    rows = {"a": torch.arange(5000), "b": torch.arange(100000), "c": torch.arange(7)}
    tensors = [
        DenseTensor(name, "I64", tuple(t.shape), t.nbytes, phase)
        for (name, t), phase in zip(rows.items(), (8, 24, 48), strict=True)
    ]
    file = DenseFile(tensors, lambda name: rows[name].numpy())
    loaded = load_file(file.path)
    assert all(torch.equal(loaded[name], rows[name]) for name in rows)
    assert [loaded[name].data_ptr() % 64 for name in rows] == [8, 24, 48]
    kept = {name: loaded.pop(name) for name in ("a", "c")}
    freed = file.release_all_but((t.data_ptr(), t.nbytes) for t in kept.values())
    assert 700_000 < freed <= rows["b"].nbytes + 2 * 4096  # the header and padding go too
    assert all(torch.equal(kept[name], rows[name]) for name in kept)
    path = Path(file.path)
    file.close()
    file.close()
    assert not path.parent.exists()
    assert all(torch.equal(kept[name], rows[name]) for name in kept)


def test_importing_the_package_offers_what_it_lists():
    assert zipmoe.load.__module__ == "zipmoe.model"
    assert all(getattr(zipmoe, name) for name in zipmoe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        SimpleNamespace(x=zipmoe.nothing)
