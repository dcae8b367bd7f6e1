"""Packing: exact, the same bytes whatever the threads and interruptions, loud about all else."""

import fcntl
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES
from killing import killed
from test_store import write_manifest

from zipmoe import _write
from zipmoe._errors import CheckpointError, CorruptError, MismatchError, SpaceError, StoreError
from zipmoe._journal import Journal
from zipmoe._shard import CodedMatrix, MatrixPlan, RecordPlan, _header_text, plan_shards
from zipmoe.pack import pack_checkpoint
from zipmoe.unpack import unpack_store
from zipmoe.verify import verify_store

KILLS = 50  # what soak does


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("codec", ["rank223", "zstd", "raw"])
def test_unpack_gives_the_files_back_byte_for_byte(
    family, codec, tiny_checkpoint, tiny_store, tmp_path
):
    folder = tiny_checkpoint(family, shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    report = unpack_store(tiny_store(family, codec, shard_size="100KB"), tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)
    assert report.files == len(list(folder.iterdir()))
    assert report.total_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_headers_with_spaces_and_odd_json_come_back_byte_for_byte(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "checkpoint")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), indent=3) + " \n\t "
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + length :])
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_bytes(config.replace("\n", "\r\n").encode() + b"\n\n")
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    (folder / "notes ä.txt").write_text("kept")
    pack_checkpoint(folder, tmp_path / "store")
    unpack_store(tmp_path / "store", tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)


def test_what_a_store_does_not_keep_is_listed(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "checkpoint")
    for name in (".gitattributes", "pytorch_model.bin", "consolidated.safetensors"):
        (folder / name).write_bytes(b"x")
    (folder / "original").mkdir()
    pack_checkpoint(folder, tmp_path / "store")
    report = unpack_store(tmp_path / "store", tmp_path / "back")
    assert report.left_out == [
        ".gitattributes", "consolidated.safetensors", "original", "pytorch_model.bin"
    ]  # fmt: skip


def test_the_report_counts_what_is_in_the_store(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("mixtral")
    calls = []
    report = pack_checkpoint(
        folder, tmp_path / "s", progress=lambda done, total: calls.append((done, total))
    )
    listed = [p for p in (tmp_path / "s").iterdir() if p.name != "zipmoe.json"]
    assert report.store_bytes == sum(path.stat().st_size for path in listed)
    assert report.source_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert report.ratio == report.store_bytes / report.source_bytes
    assert (report.experts, report.tensors) == (8, 41)
    assert 12 < report.bits_per_weight < 16
    reasons = dict(report.raw)
    assert reasons["model.norm.weight"] == "a vector"
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "it would not shrink"
    total = calls[-1][1]
    assert calls[-1] == (total, total)


def test_the_store_does_not_depend_on_the_number_of_threads(tiny_checkpoint, tmp_path, monkeypatch):
    folder = tiny_checkpoint("qwen2_moe")
    pack_checkpoint(folder, tmp_path / "one", jobs=1)
    pack_checkpoint(folder, tmp_path / "many", jobs=7)
    monkeypatch.setattr(_write, "IN_FLIGHT_BYTES", 1)  # every record alone, with all threads
    pack_checkpoint(folder, tmp_path / "alone", jobs=3)
    assert content(tmp_path / "one") == content(tmp_path / "many") == content(tmp_path / "alone")


# Interruptions


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def stop_after(calls):
    left = [calls]

    def progress(_done, _total):
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return progress


@pytest.mark.parametrize("calls", [0, 1, 5, 11, 12, 13, 14, 30])
def test_an_interrupted_pack_continues_to_the_same_bytes(
    calls, tiny_checkpoint, tiny_store, tmp_path, monkeypatch
):
    monkeypatch.setattr(_write, "BATCH_BYTES", 100_000)  # note two records at a time
    folder = tiny_checkpoint("qwen2_moe")
    with pytest.raises(Stop):
        pack_checkpoint(folder, tmp_path / "s", progress=stop_after(calls))
    assert not (tmp_path / "s" / "zipmoe.json").exists()
    again = []
    pack_checkpoint(folder, tmp_path / "s", progress=lambda done, _: again.append(done))
    assert content(tmp_path / "s") == content(tiny_store("qwen2_moe"))
    if calls > 11:
        assert again[0] > 0  # the first step is what was already there


def pack_killed(folder, store, seconds):
    """Pack, and be killed after `seconds`; whether it was still going on."""
    return killed(lambda: pack_checkpoint(folder, store, jobs=2), seconds, batch_bytes=100_000)


def kill_at_random(folder, expected, tmp_path, rng, kills):
    """Kill packs at random moments, some of them again and again; returns states seen."""
    started = time.monotonic()
    assert not pack_killed(folder, tmp_path / "timed", 60)
    needed = time.monotonic() - started
    assert content(tmp_path / "timed") == expected
    states = Counter()
    store = tmp_path / "store"
    for _ in range(kills):
        running = pack_killed(folder, store, rng.uniform(0, needed))
        states["killed" if running else "finished"] += 1
        if (store / ".zipmoe-journal").exists():
            lines = (store / ".zipmoe-journal").read_bytes().count(b"\n")
            states["with records"] += lines > 1
        if rng.random() < 0.5:
            pack_checkpoint(folder, store)
            assert content(store) == expected
            shutil.rmtree(store)
    if store.exists():
        pack_checkpoint(folder, store)
        assert content(store) == expected
    return states


def test_a_pack_killed_at_random_moments_continues_to_the_same_bytes(
    tiny_checkpoint, tiny_store, tmp_path
):
    expected = content(tiny_store("qwen2_moe"))
    states = kill_at_random(
        tiny_checkpoint("qwen2_moe"), expected, tmp_path, random.Random(3), kills=6
    )
    assert states["killed"] >= 2


@pytest.mark.soak
def test_a_pack_killed_fifty_times_continues_to_the_same_bytes(
    tiny_checkpoint, tiny_store, tmp_path, soak_record
):
    options = {"num_hidden_layers": 6, "num_experts": 24, "shard_size": "2MB"}
    expected = content(tiny_store("qwen2_moe", **options))
    folder = tiny_checkpoint("qwen2_moe", **options)
    rng = random.Random(soak_record.seed)
    states = Counter()
    while states["killed"] < KILLS:
        states += kill_at_random(folder, expected, tmp_path, rng, kills=10)
        shutil.rmtree(tmp_path / "timed")
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
    soak_record(
        "packs killed by SIGKILL and continued to the same bytes",
        kills=states["killed"],
        with_records_to_continue_from=states["with records"],
        identical=states["killed"],
    )


def test_a_pack_killed_before_its_journal_was_removed_is_finished(tiny_checkpoint, store_copy):
    folder = store_copy("qwen2_moe")
    (folder / ".zipmoe-journal").write_text("anything")
    pack_checkpoint(tiny_checkpoint("qwen2_moe"), folder)
    assert not (folder / ".zipmoe-journal").exists()


def test_a_torn_journal_is_believed_up_to_the_tear(
    tiny_checkpoint, tiny_store, tmp_path, monkeypatch
):
    monkeypatch.setattr(_write, "BATCH_BYTES", 1)
    folder, store = tiny_checkpoint("qwen2_moe"), tmp_path / "s"
    with pytest.raises(Stop):
        pack_checkpoint(folder, store, progress=stop_after(9))
    journal = store / ".zipmoe-journal"
    whole = journal.read_bytes()
    middle = whole.index(b'"entries"', len(whole) // 2) + 200  # in a line that is complete
    damaged = bytearray(whole)
    damaged[middle] ^= 1
    for number, lines in enumerate((whole[:-7], whole[: len(whole) // 2], damaged)):
        journal.write_bytes(lines)
        again = shutil.copytree(store, tmp_path / f"s{number}")
        with (again / "experts-00001.safetensors").open("ab") as shard:
            shard.write(bytes(1_000_000))  # what a later line may have spoken of
        pack_checkpoint(folder, again)
        assert content(again) == content(tiny_store("qwen2_moe"))


def test_an_unfinished_pack_whose_shard_was_cut_or_lost_is_refused(
    tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(_write, "BATCH_BYTES", 1)
    store = tmp_path / "s"
    with pytest.raises(Stop):
        pack_checkpoint(tiny_checkpoint("qwen2_moe"), store, progress=stop_after(9))
    os.truncate(store / "experts-00001.safetensors", 100_000)
    with pytest.raises(MismatchError, match="100000 bytes where the journal says"):
        pack_checkpoint(tiny_checkpoint("qwen2_moe"), store)
    (store / "experts-00001.safetensors").unlink()
    with pytest.raises(MismatchError, match="0 bytes where the journal says"):
        pack_checkpoint(tiny_checkpoint("qwen2_moe"), store)


@pytest.mark.parametrize(
    ("family", "plane"), [("qwen2_moe", 0), ("qwen2_moe", 1), ("mixtral", 0), ("gpt_oss", 0)]
)
def test_a_coding_that_does_not_decode_to_its_weights_is_never_written(
    family, plane, tiny_checkpoint, tmp_path, monkeypatch
):
    """Where matrices lie whole in memory, and where they are parts of fused or turned ones."""
    encode = CodedMatrix.of

    def wrong(codec, geometry, extents):
        if codec != "raw" and next(encoded) == 7:
            extents = tuple(extent.copy() for extent in extents)
            extents[plane][extents[plane].size // 2] ^= 1
        return encode(codec, geometry, extents)

    encoded = itertools.count()
    monkeypatch.setattr(CodedMatrix, "of", wrong)
    with pytest.raises(CorruptError, match="does not decode to them"):
        pack_checkpoint(tiny_checkpoint(family), tmp_path / "s", jobs=1)
    assert not (tmp_path / "s" / "zipmoe.json").exists()
    monkeypatch.undo()
    pack_checkpoint(tiny_checkpoint(family), tmp_path / "s")  # what was written before was right
    assert not verify_store(tmp_path / "s").errors


def test_a_store_that_cannot_be_written_is_a_typed_error(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot write"):
        pack_checkpoint(tiny_checkpoint("mixtral"), tmp_path / "file" / "store")


def test_the_unfinished_pack_of_another_checkpoint_or_codec_is_refused(tiny_checkpoint, tmp_path):
    store = tmp_path / "s"
    with pytest.raises(Stop):
        pack_checkpoint(tiny_checkpoint("qwen2_moe"), store, progress=stop_after(3))
    for folder, codec in (("mixtral", "rank223"), ("qwen2_moe", "rank3")):
        with pytest.raises(MismatchError, match="delete the folder"):
            pack_checkpoint(tiny_checkpoint(folder), store, codec=codec)


def test_two_packs_into_one_folder_are_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "s").mkdir()
    with (
        Journal.open(tmp_path / "s", {"some": "plan"}),
        pytest.raises(StoreError, match="another zipmoe is packing"),
    ):
        pack_checkpoint(tiny_checkpoint("mixtral"), tmp_path / "s")


def test_a_journal_removed_while_it_is_being_locked_is_not_mistaken_for_a_lock(
    tmp_path, monkeypatch
):
    path, lock, calls = tmp_path / ".zipmoe-journal", fcntl.flock, []

    def finished_meanwhile(fd, flags):
        if not calls:
            path.unlink()  # what the holder does last
        calls.append(fd)
        lock(fd, flags)

    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    with Journal.open(tmp_path, {"some": "plan"}):
        assert len(calls) == 2
        assert path.exists()


def test_a_checkpoint_that_changes_while_it_is_packed_is_refused(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "checkpoint")
    os.utime(folder / "config.json", ns=(1, 1))

    def touch(_done, _total):
        os.utime(folder / "config.json", ns=(1, 2))

    with pytest.raises(CheckpointError, match="changed while it was packed"):
        pack_checkpoint(folder, tmp_path / "s", progress=touch)
    assert not (tmp_path / "s" / "zipmoe.json").exists()


# Destinations


def test_a_finished_store_is_accepted_again_only_for_its_own_checkpoint(
    tiny_checkpoint, store_copy
):
    folder = store_copy("mixtral")
    before = content(folder)
    report = pack_checkpoint(tiny_checkpoint("mixtral"), folder)
    assert report.experts == 8
    assert content(folder) == before
    for other in ({"seed": 1}, {"dtype": "float32"}):
        with pytest.raises(MismatchError, match="another checkpoint"):
            pack_checkpoint(tiny_checkpoint("mixtral", **other), folder)
    with pytest.raises(MismatchError, match="codecs"):
        pack_checkpoint(tiny_checkpoint("mixtral"), folder, codec="zstd")
    assert content(folder) == before


def test_a_folder_that_holds_something_else_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    with pytest.raises(MismatchError, match=r"thesis\.txt"):
        pack_checkpoint(tiny_checkpoint("mixtral"), tmp_path / "s")
    with pytest.raises(MismatchError, match="is a file"):
        pack_checkpoint(tiny_checkpoint("mixtral"), tmp_path / "s" / "thesis.txt")
    folder = tiny_checkpoint("mixtral")
    with pytest.raises(MismatchError, match="inside the checkpoint"):
        pack_checkpoint(folder, folder / "store")


def test_too_little_free_disk_is_said_before_anything_is_written(
    tiny_checkpoint, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(SpaceError, match="100,000 are free"):
        pack_checkpoint(tiny_checkpoint("mixtral"), tmp_path / "s")
    assert {p.name for p in (tmp_path / "s").iterdir()} <= {".zipmoe-journal"}


def test_room_for_the_store_is_enough_room(tiny_checkpoint, tmp_path, monkeypatch):
    """The bound if nothing shrinks is not asked for; what the first expert promises is."""
    wide = tiny_checkpoint("mixtral", hidden_size=128, intermediate_size=512)
    usage, source = shutil.disk_usage(tmp_path), sum(p.stat().st_size for p in wide.iterdir())
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=int(0.9 * source) + (1 << 20))
    )
    report = pack_checkpoint(wide, tmp_path / "s")
    assert report.store_bytes < 0.9 * source
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=report.store_bytes // 2)
    )
    with pytest.raises(SpaceError, match="about"):
        pack_checkpoint(wide, tmp_path / "other")


def test_a_disk_that_fills_up_stops_the_pack_and_it_continues(
    tiny_checkpoint, tiny_store, tmp_path, monkeypatch
):
    monkeypatch.setattr(_write, "BATCH_BYTES", 50_000)
    folder = tiny_checkpoint("mixtral")  # before files are limited
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(SpaceError, match="continues where it stopped"):
            pack_checkpoint(folder, tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    pack_checkpoint(folder, tmp_path / "s")
    assert content(tmp_path / "s") == content(tiny_store("mixtral"))


def test_unpack_overwrites_nothing_and_says_when_the_disk_is_full(
    tiny_store, tmp_path, monkeypatch
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(MismatchError, match="overwrites nothing"):
        unpack_store(tiny_store("mixtral"), tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SpaceError, match="are free"):
        unpack_store(tiny_store("mixtral"), tmp_path / "new")


def test_unpack_refuses_what_does_not_hash_to_the_original(store_copy, tmp_path):
    folder = store_copy("mixtral")
    source = json.loads((folder / "source.json").read_text())
    key = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    source["tensors"][key] = "0" * 64
    reseal_source(folder, source)
    with pytest.raises(StoreError, match=key):
        unpack_store(folder, tmp_path / "out")


def add_empty_tensor(source):
    """Name one tensor more than the store holds."""
    (file,) = [file for file in source["files"] if "header" in file]
    end = file["bytes"] - 8 - len(file["header"])
    more = f', "ghost": {{"dtype": "U8", "shape": [0], "data_offsets": [{end}, {end}]}}}}'
    before = len(file["header"])
    file["header"] = file["header"].rstrip().removesuffix("}") + more
    file["bytes"] += len(file["header"]) - before
    source["tensors"]["ghost"] = hashlib.sha256(b"").hexdigest()


SOURCES = {
    "path trick": lambda s: s["files"][0].update(name="../evil"),
    "recipe short": lambda s: s["recipes"][0]["parts"][0].update(rows=[0, 8, 1], into=[0, 8, 1]),
    "recipe outside": lambda s: s["recipes"][0]["parts"][0].update(columns=[64, 128, 1]),
    "recipe twice": lambda s: s["recipes"][0].update(parts=2 * s["recipes"][0]["parts"]),
    "recipe missing": lambda s: s["recipes"].pop(),
    "tensor missing": lambda s: s["tensors"].popitem(),
    "step of zero": lambda s: s["recipes"][0]["parts"][0].update(rows=[0, 160, 0]),
    "tensor from nowhere": add_empty_tensor,
    "no headers": lambda s: s.update(files=[]),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_malicious_source_json_is_refused_before_anything_is_written(case, store_copy, tmp_path):
    folder = store_copy("mixtral")
    source = json.loads((folder / "source.json").read_text())
    SOURCES[case](source)
    reseal_source(folder, source)
    assert len(verify_store(folder).errors) == 1
    with pytest.raises(StoreError, match="source"):
        unpack_store(folder, tmp_path / "out")
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def reseal_source(folder, source):
    """Write source.json and make the manifest fit it."""
    data = json.dumps(source).encode()
    manifest = json.loads((folder / "zipmoe.json").read_text())
    (entry,) = [file for file in manifest["files"] if file["name"] == "source.json"]
    manifest["store_bytes"] += len(data) - entry["bytes"]
    entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "source.json").write_bytes(data)
    write_manifest(folder, manifest)


# Shards


def test_shards_stay_under_five_gigabytes_unless_one_record_does_not():
    def record(number, rows):
        return RecordPlan(f"r{number}", (MatrixPlan("dense", "BF16", rows, 1 << 20),))

    sizes = [1000, 1000, 300, 300, 3000, 10, 10]  # times 2 MiB
    plans = plan_shards("dense", [record(n, rows) for n, rows in enumerate(sizes)])
    assert [len(plan.records) for plan in plans] == [3, 1, 1, 2]
    assert [plan.name for plan in plans][:2] == [
        "dense-00001.safetensors",
        "dense-00002.safetensors",
    ]
    assert all(plan.most_bytes <= 5_000_000_000 or len(plan.records) == 1 for plan in plans)
    assert all(plan.data_start % 4096 == 0 for plan in plans)


def test_the_reserved_header_is_enough_for_strange_names():
    names = ["a", 'quote"', "tab\t", "ü" * 50, "\U0001f600", "b" * 300]
    records = [RecordPlan(name, (MatrixPlan("dense", "U8", 1, 10**9),)) for name in names]
    (plan,) = plan_shards("dense", records[:4])
    text = _header_text(records[:4], [10**12 * n for n in range(1, 5)], 10**12)
    assert len(text) + 8 <= plan.data_start


@pytest.mark.soak
def test_a_fused_tensor_of_two_gigabytes_is_packed_in_bounded_memory(tmp_path, soak_record):
    shape = {"experts": 128, "inner": 2048, "hidden": 2048}
    store_bytes, peak_bytes, largest = pack_sparse_granite(tmp_path, **shape)
    limit = (1 << 30) + 2 * largest
    soak_record(
        "peak memory of packing a fused tensor",
        tensor_bytes=128 * 2 * 2048 * 2048 * 2,
        peak_rss_bytes=peak_bytes,
        limit_bytes=limit,
        store_bytes=store_bytes,
    )
    assert peak_bytes <= limit


def pack_sparse_granite(tmp_path, *, experts, inner, hidden):
    """Pack a one-layer granitemoe of zeros, a file with holes, in a process of its own."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {
        "model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"],
        "hidden_size": hidden, "intermediate_size": inner, "num_local_experts": experts,
        "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 128, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": [128, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [128, hidden],
        layer + "input_layernorm.weight": [hidden],
        layer + "post_attention_layernorm.weight": [hidden],
        layer + "block_sparse_moe.router.layer.weight": [experts, hidden],
        layer + "block_sparse_moe.input_linear.weight": [experts, 2 * inner, hidden],
        layer + "block_sparse_moe.output_linear.weight": [experts, hidden, inner],
    }
    shapes |= {f"{layer}self_attn.{p}_proj.weight": [hidden, hidden] for p in "qkvo"}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    code = (
        "import sys; from zipmoe.pack import pack_checkpoint; "
        "r = pack_checkpoint(sys.argv[1], sys.argv[2]); print(r.store_bytes, r.peak_rss_bytes)"
    )
    words = [sys.executable, "-c", code, str(folder), str(tmp_path / "store")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    store_bytes, peak_bytes = map(int, done.stdout.split())
    return store_bytes, peak_bytes, 2 * 3 * inner * hidden
