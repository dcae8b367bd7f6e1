"""Flipped bits and cut files: every one is found, and named."""

import os
import random
from itertools import pairwise

import pytest

from zipmoe._errors import CorruptError, FormatError, StoreError
from zipmoe.store import open_store
from zipmoe.unpack import unpack_store
from zipmoe.verify import verify_store

FLIPS = CUTS = 200  # what soak does


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def refused(folder, name):
    """Whether verify refuses; if so, that it names the file."""
    try:
        errors = verify_store(folder).errors
    except FormatError:
        return name == "zipmoe.json"
    return bool(errors) and any(getattr(e, "file", None) in (name, None) for e in errors)


def chosen(files, rng, number):
    """One of the files: small ones get their share, or all damage would fall into the weights."""
    return rng.choice(files) if number % 2 else weighted(files, rng)


def count_flips(folder, rng, flips):
    """Flip one bit at a time, over all files by their size; returns how many are refused."""
    files = sorted(folder.iterdir())
    found = 0
    for number in range(flips):
        path = chosen(files, rng, number)
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        found += refused(folder, path.name)
        flip(path, bit)
    assert not verify_store(folder).errors
    return found


def count_cuts(folder, rng, cuts, is_refused=refused):
    """Cut one file at a time; returns how many are refused, by verify or by what is given."""
    files = sorted(folder.iterdir())
    found = 0
    for number in range(cuts):
        path = chosen(files, rng, number)
        whole = path.read_bytes()
        os.truncate(path, rng.randrange(len(whole)))
        found += is_refused(folder, path.name)
        path.write_bytes(whole)
    assert not verify_store(folder).errors
    return found


def weighted(files, rng):
    return rng.choices(files, [path.stat().st_size for path in files])[0]


def test_flipped_bits_and_cut_files_are_refused_by_verify(store_copy):
    folder = store_copy("qwen2_moe")
    assert count_flips(folder, random.Random(1), 40) == 40
    assert count_cuts(folder, random.Random(2), 40) == 40


@pytest.mark.soak
def test_all_flipped_bits_and_cut_files_are_refused_by_verify(store_copy, soak_record):
    folder = store_copy("qwen2_moe")
    rng = random.Random(soak_record.seed)
    found = count_flips(folder, rng, FLIPS)
    soak_record("bit flips refused by verify", flips=FLIPS, refused=found)
    cut = count_cuts(folder, rng, CUTS)
    soak_record("truncations refused by verify", truncations=CUTS, refused=cut)
    assert (found, cut) == (FLIPS, CUTS)


def test_a_flipped_bit_in_a_record_is_named_and_nothing_is_given_out(store_copy):
    folder = store_copy("qwen2_moe")
    with open_store(folder) as store:
        _, _, shard, rows = list(store.expert_records())[7]  # layer 1, expert 1
        offset = int(shard.entries[rows[2]]["extents"][1][0])
        flip(folder / shard.info.name, 8 * offset + 3)
        with pytest.raises(CorruptError) as caught:
            store.read_matrix(shard, rows[2])
        store.read_matrix(shard, rows[1])  # the others still work
    error = caught.value
    assert (error.layer, error.expert, error.plane) == (1, 1, "exponent")
    assert (error.file, error.offset) == ("experts-00001.safetensors", offset)
    assert error.tensor == "model.layers.1.mlp.experts.1.down"
    (found,) = verify_store(folder).errors
    assert str(found) == str(error)


def test_a_flipped_bit_in_a_dense_tensor_is_named(store_copy):
    folder = store_copy("qwen2_moe")
    with open_store(folder) as store:
        shard = next(s for s in store.shards if s.info.kind == "dense")
        name = shard.records[3].name
        offset = int(shard.entries[3]["extents"][0][0])
        flip(folder / shard.info.name, 8 * offset)
        with pytest.raises(CorruptError, match=f"tensor {name}, plane sign-mantissa"):
            store.read_dense(name)


def test_damage_after_the_store_was_opened_is_found_when_it_is_read(store_copy):
    folder = store_copy("qwen2_moe")
    path = folder / "experts-00001.safetensors"
    with open_store(folder) as store:
        os.truncate(path, 8192)
        _, _, shard, rows = list(store.expert_records())[-1]
        with pytest.raises(CorruptError, match="ends too early"):
            store.read_matrix(shard, rows[0])


def test_unpack_of_a_damaged_store_names_the_place_and_leaves_no_named_file(store_copy, tmp_path):
    folder = store_copy("qwen2_moe")
    path = folder / "experts-00001.safetensors"
    flip(path, 8 * (path.stat().st_size // 2))
    with pytest.raises(StoreError, match="experts-00001"):
        unpack_store(folder, tmp_path / "out")
    assert all(p.name.startswith(".zipmoe-") for p in (tmp_path / "out").iterdir())


def test_verify_lists_all_bad_places_and_reads_every_byte_once(store_copy):
    folder = store_copy("qwen2_moe")
    path = folder / "experts-00001.safetensors"
    for at in (8192, 40_960, 90_112):
        flip(path, 8 * at)
    (folder / "config.json").write_text("{}")
    calls = []
    report = verify_store(folder, lambda done, total: calls.append((done, total)))
    assert {error.file for error in report.errors} == {"config.json", path.name}
    assert len(report.errors) == 4
    store_bytes = calls[0][1]
    assert calls[-1] == (store_bytes, store_bytes)
    assert all(a[0] <= b[0] for a, b in pairwise(calls))


def test_a_sound_store_verifies_and_every_byte_is_counted(tiny_store):
    report = verify_store(tiny_store("gpt_oss"))
    folder = tiny_store("gpt_oss")
    listed = sum(p.stat().st_size for p in folder.iterdir() if p.name != "zipmoe.json")
    assert report.errors == []
    assert report.checked_bytes == listed
    assert report.files == len(list(folder.iterdir()))
