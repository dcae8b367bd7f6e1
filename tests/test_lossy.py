"""Lossy stores: what they hold, what they say, and that nothing of a store's promises is lost."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from itertools import pairwise
from pathlib import Path

import httpx2 as httpx
import numpy as np
import oracle
import pytest
import torch
from families import Answers
from family_sweep import compare
from killing import killed
from lossy_store import LOSS, mixed, write_lossy
from serving import serving
from small_store import write_store
from test_generate_damage import answer, outcome, unread
from test_store import reseal
from test_store_damage import count_cuts, count_flips, flip
from typer.testing import CliRunner

import zipmoe
from zipmoe import _core, _write
from zipmoe._errors import (
    CorruptError,
    LossyError,
    MismatchError,
    QuantizationError,
    StoreError,
    ZipmoeError,
)
from zipmoe._index import CODECS
from zipmoe._lossy import Loss, Lossy
from zipmoe.cli import app
from zipmoe.rates import TYPICAL
from zipmoe.requantize import requantize_store
from zipmoe.schedule import Tier
from zipmoe.store import open_store
from zipmoe.unpack import unpack_store
from zipmoe.verify import verify_store

ISA = _core.available_isas()[0]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("lossy"), hidden=128, inner=192)


@pytest.fixture(scope="module")
def lossy(original: Path) -> Path:
    return write_lossy(original, original.parent / "mixed")


@pytest.fixture
def damaged(lossy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(lossy, tmp_path / "copy")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What it holds


def test_each_expert_has_its_width_and_all_else_is_copied(original: Path, lossy: Path) -> None:
    _, experts, dense = oracle.read_store(lossy)
    _, before, dense_before = oracle.read_store(original)
    assert all(np.array_equal(dense[name][0], dense_before[name][0]) for name in dense_before)
    bits = mixed(original)
    with open_store(lossy) as store:
        assert store.manifest.lossy == Lossy(tuple(map(tuple, bits)), 64, LOSS)
        for layer, expert, shard, rows in store.expert_records():
            for row, matrix in zip(rows, store.layers[layer].matrices, strict=True):
                entry = shard.entries[row]
                ours = store.read_matrix(shard, row)
                assert np.array_equal(ours, experts[layer, expert, matrix.role])
                if bits[layer][expert] == 16:
                    assert np.array_equal(ours, before[layer, expert, matrix.role])
                else:
                    assert CODECS[entry["codec"]] == f"int{bits[layer][expert]}"
    for name, data in content(original).items():
        if name.startswith("dense") or name in {"source.json", "tokenizer.json"}:
            assert (lossy / name).read_bytes() == data
    assert not verify_store(lossy).errors


def test_rows_may_share_a_scale_each(original: Path, tmp_path: Path) -> None:
    requantize_store(original, tmp_path / "rows", mixed(original), scale_group=0)
    oracle.read_store(tmp_path / "rows")
    with open_store(tmp_path / "rows") as store:
        assert store.manifest.lossy.scale_group == 0


def test_weights_that_integers_cannot_stand_for_are_refused_by_their_place(
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path)
    checkpoint = shutil.copytree(tmp_path / "checkpoint", tmp_path / "infinite")
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = np.frombuffer(data[:8], "<u8")
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if "experts.5.w2" in key and "layers.1" in key)
    start = 8 + int(length) + header[name]["data_offsets"][0]
    data[start : start + 2] = b"\x80\x7f"
    path.write_bytes(data)
    zipmoe.pack_checkpoint(checkpoint, tmp_path / "bad")
    with pytest.raises(QuantizationError, match=r"down of layer 1, expert 5: row 0, column 0"):
        requantize_store(tmp_path / "bad", tmp_path / "out", [[4] * 8] * 2)
    requantize_store(tmp_path / "bad", tmp_path / "kept", [[4] * 8, [4] * 5 + [16] + [4] * 2])
    with pytest.raises(MismatchError, match="a number for each expert"):
        requantize_store(store, tmp_path / "out2", [[4] * 8])
    with pytest.raises(ValueError, match="3 bits"):
        requantize_store(store, tmp_path / "out2", [[4] * 8, [3] * 8])


# A store of the first version that has lossy ones, kept as it was

GOLDEN = Path(__file__).parent / "golden"
ROWS_OF_INT8 = "6dcc5b99d784758c8e037f58e66060212b60a36ac79c580fa1013d63404c73ae"


def test_the_golden_store_is_read_by_both_readers_and_made_again_from_the_lossless_one(
    tmp_path: Path,
) -> None:
    assert verify_store(GOLDEN / "1.1").errors == []
    _, experts, _ = oracle.read_store(GOLDEN / "1.1")
    with open_store(GOLDEN / "1.1") as store:
        for layer, expert, shard, rows in store.expert_records():
            for row, matrix in zip(rows, store.layers[layer].matrices, strict=True):
                assert np.array_equal(
                    store.read_matrix(shard, row), experts[layer, expert, matrix.role]
                )
    requantize_store(GOLDEN / "1.0", tmp_path / "again", [[4, 2]], loss=LOSS)
    name = "experts-00001.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (GOLDEN / "1.1" / name).read_bytes()
    requantize_store(GOLDEN / "1.0", tmp_path / "rows", [[8, 8]], scale_group=0)
    found = hashlib.sha256((tmp_path / "rows" / name).read_bytes()).hexdigest()
    assert found == ROWS_OF_INT8


# Interrupted and damaged


class Stop(Exception):  # noqa: N818 - no error
    pass


@pytest.mark.parametrize("calls", [0, 1, 7, 15])
def test_an_interrupted_write_continues_to_the_same_bytes(
    calls: int, original: Path, lossy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_write, "BATCH_BYTES", 1)
    left = calls

    def progress(_done: int, _total: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop

    with pytest.raises(Stop):
        requantize_store(
            original, tmp_path / "s", mixed(original), loss=LOSS, progress=progress, jobs=1
        )
    assert not (tmp_path / "s" / "zipmoe.json").exists()
    again: list[int] = []
    requantize_store(
        original,
        tmp_path / "s",
        mixed(original),
        loss=LOSS,
        progress=lambda done, _: again.append(done),
    )
    assert content(tmp_path / "s") == content(lossy)
    assert (again[0] > 0) == (calls > 0)  # the first step is what was there already
    with pytest.raises(MismatchError, match="other weights or bits"):
        requantize_store(original, tmp_path / "s", [[4] * 8] * 2, loss=LOSS)


def write_killed(original: Path, folder: Path, seconds: float) -> bool:
    def write() -> None:
        requantize_store(original, folder, mixed(original), loss=LOSS, jobs=2)

    return killed(write, seconds, batch_bytes=1)


def count_kills(original: Path, lossy: Path, folder: Path, rng: random.Random, kills: int) -> int:
    started = time.monotonic()
    assert not write_killed(original, folder, 60)
    needed = time.monotonic() - started
    count = 0
    for _ in range(kills):
        count += write_killed(original, folder, rng.uniform(0, needed))
        if rng.random() < 0.5:
            requantize_store(original, folder, mixed(original), loss=LOSS)
            assert content(folder) == content(lossy)
            shutil.rmtree(folder)
    requantize_store(original, folder, mixed(original), loss=LOSS)
    assert content(folder) == content(lossy)
    return count


def test_a_write_killed_at_random_moments_continues_to_the_same_bytes(
    original: Path, lossy: Path, tmp_path: Path
) -> None:
    assert count_kills(original, lossy, tmp_path / "s", random.Random(3), kills=6) >= 2


@pytest.mark.soak
def test_a_write_killed_fifty_times_continues_to_the_same_bytes(
    original: Path, lossy: Path, tmp_path: Path, soak_record: object
) -> None:
    rng, count = random.Random(soak_record.seed), 0
    while count < 50:
        count += count_kills(original, lossy, tmp_path / "s", rng, kills=10)
        shutil.rmtree(tmp_path / "s")
    soak_record("quantised stores killed by SIGKILL and continued to the same bytes", kills=count)


def test_flipped_bits_and_cut_files_are_refused_by_verify(damaged: Path) -> None:
    assert count_flips(damaged, random.Random(1), 40) == 40
    assert count_cuts(damaged, random.Random(2), 40) == 40


@pytest.mark.soak
def test_all_flipped_bits_and_cut_files_are_refused(damaged: Path, soak_record: object) -> None:
    rng = random.Random(soak_record.seed)
    found, cut = count_flips(damaged, rng, 200), count_cuts(damaged, rng, 200)
    soak_record("damage to a quantised store refused by verify", flips=found, truncations=cut)
    assert (found, cut) == (200, 200)


def test_a_flipped_bit_in_each_extent_is_named_and_no_token_comes_from_it(damaged: Path) -> None:
    bits = {8: 0, 4: 0, 2: 0}
    with open_store(damaged) as store:
        said = store.manifest.lossy.bits
        places = [
            (layer, expert, shard.info.name, shard.path, shard.entries[row]["extents"], row)
            for layer, expert, shard, rows in store.expert_records()
            for row in rows
        ]
        for layer, expert, name, path, extents, row in places:
            width = said[layer][expert]
            if width == 16 or bits[width] == 2:
                continue
            bits[width] += 1
            shard = next(s for s in store.expert_shards if s.info.name == name)
            for plane, called in ((0, "codes"), (1, "scales")):
                at = 8 * (int(extents[plane][0]) + int(extents[plane][1]) - 1)
                flip(Path(path), at)
                with pytest.raises(CorruptError) as caught:
                    store.read_matrix(shard, row)
                assert (caught.value.layer, caught.value.expert) == (layer, expert)
                assert caught.value.plane == called
                flip(Path(path), at)
    expected, seen = answer(damaged)
    layer, expert = next(x for x in sorted(seen) if said[x[0]][x[1]] != 16)
    at = next(p for p in places if p[:2] == (layer, expert))
    flip(Path(at[3]), 8 * int(at[4][1][0]))
    with pytest.raises(CorruptError) as caught:
        answer(damaged)
    assert caught.value.plane == "scales"
    assert unread(damaged, seen)
    assert outcome(damaged, expected)


# The same tokens


@torch.no_grad()
def generated(loaded: zipmoe.Loaded) -> list[int]:
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(4))
    out = loaded.model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return [int(token) for token in out[0]]


def test_the_same_tokens_at_every_memory_limit_and_number_of_threads(lossy: Path) -> None:
    with open_store(lossy) as opened:
        paths, table = opened.expert_table()
    floor = _core.ExpertCache.floor_bytes(table)
    room = _core.ExpertCache.needed_bytes(table, (0, 16, 0, 0))
    # Mixed widths: less than slots of the longest record for all.
    lengths = sum(int(n) for n in (-(-table[:, [11, 14]] // 4096) * 4096).ravel())
    assert room - lengths < (1 << 20) + 100_000  # what is no slot; one length for all adds 640 kB
    expected = None
    for threads in (1, 2):
        _core.set_num_threads(threads)
        try:
            with zipmoe.load(lossy, memory="64GB", context=64) as loaded:
                runtime = loaded.runtime
                for capacity in np.linspace(floor, room, 7).astype(int):
                    runtime.source.cache.close()
                    cache = _core.ExpertCache(paths, table, capacity_bytes=int(capacity))
                    runtime.source.cache = cache
                    runtime.lending.cache = cache
                    assert cache.allocated_bytes <= capacity
                    tokens = generated(loaded)
                    expected = expected or tokens
                    assert tokens == expected
                for most in (room, floor, (floor + room) // 2, room):
                    assert cache.limit(int(most)) <= most
                    assert generated(loaded) == expected
                    assert cache.allocated_bytes <= most
        finally:
            _core.set_num_threads(0)


def test_slots_are_as_long_as_the_experts_that_they_hold(lossy: Path) -> None:
    with open_store(lossy) as opened:
        paths, table = opened.expert_table()
    room = _core.ExpertCache.needed_bytes(table, (0, 16, 0, 0))
    cache = _core.ExpertCache(paths, table, capacity_bytes=room)
    out = {}
    for row in table:
        layer, expert, matrix = (int(number) for number in row[:3])
        target = np.zeros((int(row[6]), int(row[7])), np.uint16)
        cache.decode(layer, expert, matrix, target)
        out[layer, expert, matrix] = target
    counted = cache.counters()
    assert cache.slots == 16
    assert counted["evictions"] == 0
    with open_store(lossy) as store:
        for layer, expert, shard, rows in store.expert_records():
            for matrix, row in enumerate(rows):
                assert np.array_equal(out[layer, expert, matrix], store.read_matrix(shard, row))
    cache.close()


def test_there_is_no_tier_but_compressed(lossy: Path) -> None:
    for split in ("2,4,0,0", "0,4,4,0", "0,4,0,4"):
        with pytest.raises(ZipmoeError, match="stored as integers"):
            zipmoe.load(lossy, memory="8GB", context=64, tiers=split)


# The doors


def run(*words: object) -> object:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_every_command_says_lossy(lossy: Path, original: Path, tmp_path: Path) -> None:
    found = run("inspect", lossy)
    assert "lossy: not the published weights" in found.stdout
    assert "layer 1: 2 lossless, 2 int8, 2 int4, 2 int2" in found.stdout
    document = json.loads(run("inspect", lossy, "--json").stdout)
    assert document["lossy"]["experts"] == {"lossless": 4, "int8": 4, "int4": 4, "int2": 4}
    assert json.loads(run("inspect", original, "--json").stdout)["lossy"] is None

    verified = run("verify", lossy)
    assert verified.exit_code == 0
    assert "cannot be restored" in verified.stderr
    assert json.loads(run("verify", lossy, "--json").stdout)["lossy"]["reached"] == 0.013

    words = ("generate", lossy, "--prompt", "hello", "--max-tokens", 2)
    assert "lossy: not the published weights" in run(*words).stderr
    assert json.loads(run(*words, "--json").stdout)["lossy"]["target"] == 0.02
    unsaid = run("generate", original, "--prompt", "hello", "--max-tokens", 2, "--json")
    assert json.loads(unsaid.stdout)["lossy"] is None

    refused = run("unpack", lossy, tmp_path / "back")
    assert refused.exit_code == 1
    assert "12 of 16 experts" in refused.stderr
    assert not (tmp_path / "back").exists()


def test_a_loaded_model_says_lossy(lossy: Path, original: Path) -> None:
    with zipmoe.load(lossy, memory="8GB", context=64) as loaded:
        said = loaded.model.config.quantization_config.lossy
        assert said["experts"] == {"lossless": 4, "int8": 4, "int4": 4, "int2": 4}
        assert said["calibration_sha256"] == LOSS.calibration_sha256
    with zipmoe.load(original, memory="8GB", context=64) as loaded:
        assert loaded.model.config.quantization_config.lossy is None


def test_a_server_says_lossy_of_its_model(lossy: Path, original: Path) -> None:
    said = []
    for store in (lossy, original):
        with serving(store, context=100) as served:
            (model,) = httpx.get(f"{served.url}/v1/models").json()["data"]
        said.append(model["lossy"])
    assert said[0]["experts"] == {"lossless": 4, "int8": 4, "int4": 4, "int2": 4}
    assert said[1] is None


def test_a_lossy_store_is_planned_for(lossy: Path) -> None:
    planned = run("plan", lossy, "--memory", "4GB", "--context", 64)
    assert planned.exit_code == 0, planned.stderr
    with zipmoe.load(lossy, memory="8GB", context=64) as loaded:
        sizes = loaded.runtime.sizes
    assert sizes.tiers == (Tier.COMPRESSED,)
    assert TYPICAL.work_s(1000, "int4") <= TYPICAL.work_s(1000, "raw")


def test_unpack_writes_what_there_is_only_if_asked_for(
    lossy: Path, original: Path, tmp_path: Path
) -> None:
    with pytest.raises(LossyError, match="12 of 16 experts cannot be restored"):
        unpack_store(lossy, tmp_path / "back")
    report = unpack_store(lossy, tmp_path / "back", lossy=True)
    assert report.changed_tensors == 3 * 12
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["zipmoe_lossy"]["experts"]["int2"] == 4
    # Packed again it gives the weights of the lossy store, and goes on saying what they are.
    zipmoe.pack_checkpoint(tmp_path / "back", tmp_path / "again")
    _, again, _ = oracle.read_store(tmp_path / "again")
    _, experts, _ = oracle.read_store(lossy)
    assert all(np.array_equal(again[key], experts[key]) for key in experts)
    assert "zipmoe_lossy" in json.loads((tmp_path / "again" / "config.json").read_text())
    assert unpack_store(original, tmp_path / "plain", lossy=True).changed_tensors == 0


def test_a_lossy_store_is_not_compared_with_stock(lossy: Path) -> None:
    with pytest.raises(LossyError, match="not the published weights"):
        compare(Answers({}, {}, {}), lossy)


def test_packing_is_never_lossy(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'int4' is none of"):
        zipmoe.pack_checkpoint(original.parent / "checkpoint", tmp_path / "s", codec="int4")


def test_a_lossy_store_is_not_made_lossy_again(lossy: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="lossy already"):
        requantize_store(lossy, tmp_path / "s", mixed(lossy))


# The manifest

WRONG = {
    "unsaid": lambda m: (m.pop("lossy"), m.update(format_version="1.0")),
    "without its object": lambda m: m.pop("lossy"),
    "in the lossless version": lambda m: m.update(format_version="1.0"),
    "another width": lambda m: m["lossy"]["bits"][0].__setitem__(0, 4),
    "said lossless": lambda m: m["lossy"]["bits"][0].__setitem__(0, 16),
    "an expert less": lambda m: m["lossy"]["bits"][0].pop(),
    "a layer less": lambda m: m["lossy"]["bits"].pop(),
    "a width that is none": lambda m: m["lossy"]["bits"][0].__setitem__(0, 3),
    "a width as text": lambda m: m["lossy"]["bits"][0].__setitem__(0, "8"),
    "a key more": lambda m: m["lossy"].update(more=1),
    "a key less": lambda m: m["lossy"].pop("metric"),
    "a dense codec": lambda m: m["codec"].update(dense="int8"),
    "another metric": lambda m: m["lossy"].update(metric="taste"),
    "a loss as text": lambda m: m["lossy"].update(reached="0"),
    "no number": lambda m: m["lossy"].update(target=float("nan")),
    "no checksum": lambda m: m["lossy"].update(calibration_sha256="ab"),
    "another scale group": lambda m: m["lossy"].update(scale_group=32),
    "no object": lambda m: m.update(lossy=True),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_manifest_that_does_not_say_what_is_there_is_refused(case: str, damaged: Path) -> None:
    reseal(damaged, WRONG[case])
    with pytest.raises(StoreError):
        open_store(damaged)


def test_a_lossless_store_cannot_claim_to_be_lossy(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "copy")
    claim = {"lossy": Lossy(((8,) * 8, (8,) * 8), 64).dump(), "format_version": "1.1"}
    reseal(folder, lambda manifest: manifest.update(claim))
    with pytest.raises(MismatchError, match="16 bits where the manifest says 8"):
        open_store(folder)


def test_an_entry_of_integers_with_other_lengths_is_refused(damaged: Path) -> None:
    with open_store(damaged) as store:
        _, table = store.expert_table()
    rows = [row for row in table if CODECS[int(row[4])] == "int4"]
    for column in (11, 14):
        for change in (-64, 64):
            changed = table.copy()
            at = int(np.flatnonzero((table == rows[0]).all(axis=1))[0])
            changed[at, column] = int(changed[at, column]) + change
            with pytest.raises(CorruptError):
                _core.ExpertCache.floor_bytes(changed)


def test_a_loss_is_what_it_may_be() -> None:
    assert all(a > b for a, b in pairwise((16, 8, 4, 2)))
    for wrong in ({"metric": "x"}, {"target": 1}, {"reached": float("inf")}):
        with pytest.raises(ValueError, match="is"):
            Loss(**wrong)
    lossy = Lossy(((8, 2), (4, 16)), 64, Loss("accuracy", 0.02, 0.01))
    assert Lossy.parse(json.loads(json.dumps(lossy.dump()))) == lossy
    assert "1 lossless, 1 int8, 1 int4, 1 int2; accuracy loss 1.00%" in lossy.summary()
