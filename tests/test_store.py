"""The store's reader against an independent one, and against every way of breaking a rule."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import xxhash
from checkpoints import tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from zipmoe import _core
from zipmoe._errors import CorruptError, FormatError, MismatchError
from zipmoe.pack import pack_checkpoint
from zipmoe.store import open_store
from zipmoe.unpack import unpack_store
from zipmoe.verify import verify_store

CODECS = ["raw", "rank223", "rank3", "rank4", "zstd", "lz4hc"]


def bits(tensor):
    """Bytes of a torch tensor."""
    return tensor.contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes()


# The oracle


@pytest.mark.parametrize("codec", CODECS)
def test_the_oracle_restores_every_tensor_of_the_checkpoint(codec, tiny_checkpoint, tiny_store):
    restored = oracle.restore_tensors(tiny_store("qwen2_moe", codec))
    original = {k: bits(v) for k, v in tensors_of(tiny_checkpoint("qwen2_moe")).items()}
    assert restored == original


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_the_oracle_undoes_the_recipes_of_every_layout(family, tiny_checkpoint, tiny_store):
    restored = oracle.restore_tensors(tiny_store(family))
    assert restored == {k: bits(v) for k, v in tensors_of(tiny_checkpoint(family)).items()}


@pytest.mark.parametrize("codec", CODECS)
def test_reader_and_oracle_agree_on_every_matrix(codec, tiny_store):
    folder = tiny_store("qwen2_moe", codec)
    _, experts, dense = oracle.read_store(folder)
    with open_store(folder) as store:
        for layer, expert, shard, rows in store.expert_records():
            for row, matrix in zip(rows, store.layers[layer].matrices, strict=True):
                ours = store.read_matrix(shard, row)
                assert np.array_equal(ours, experts.pop((layer, expert, matrix.role)))
        for tensor in store.dense_tensors():
            ours = store.read_dense(tensor.name)
            theirs, dtype = dense.pop(tensor.name)
            assert (ours.tobytes(), tensor.dtype) == (theirs.tobytes(), dtype)
    assert not experts
    assert not dense


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    codec=st.sampled_from(CODECS[1:]),
    rows=st.integers(0, 70),
    columns=st.integers(0, 300),
    geometry=st.sampled_from([(0, 0), (4, 64), (8, 128), (128, 64), (4, 2048), (12, 192)]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_oracle_decodes_every_shape_geometry_and_distribution(
    codec, rows, columns, geometry, spread, seed
):
    rng = np.random.default_rng(seed)
    exponents = np.clip(np.round(rng.standard_normal((rows, columns)) * spread + 120), 0, 255)
    noise = rng.integers(0, 256, (rows, columns))
    words = ((noise & 128) << 8 | exponents.astype(int) << 7 | (noise & 127)).astype(np.uint16)
    coded = _core.encode(codec, words, row_group=geometry[0], k_tile=geometry[1], allow_raw=False)
    if geometry != (0, 0):
        assert (coded.row_group, coded.k_tile) == geometry
    extents = [extent.tobytes() for extent in coded.extents]
    used = coded.row_group, coded.k_tile
    assert np.array_equal(oracle.decode_matrix(codec, extents, rows, columns, used), words)


def test_the_oracle_decodes_all_bf16_patterns():
    words = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for codec in CODECS[1:]:
        coded = _core.encode(codec, words, allow_raw=False)
        extents = [extent.tobytes() for extent in coded.extents]
        used = coded.row_group, coded.k_tile
        assert np.array_equal(oracle.decode_matrix(codec, extents, 256, 256, used), words)


# What the reader gives


def test_the_expert_table_has_one_row_per_matrix_in_order(tiny_store):
    with open_store(tiny_store("mixtral")) as store:
        paths, table = store.expert_table()
    assert [Path(path).name for path in paths] == ["experts-00001.safetensors"]
    assert table.dtype == np.uint64
    assert table[:, :3].tolist() == [
        [layer, expert, matrix] for layer in range(2) for expert in range(4) for matrix in range(3)
    ]
    assert (table[:, 10] % 4096 == 0).all()
    assert set(table[:, 5].tolist()) == {2}
    assert table[0, 6:8].tolist() == [160, 64]


def test_the_cache_decodes_what_the_store_holds(tiny_store):
    folder = tiny_store("qwen2_moe")
    _, experts, _ = oracle.read_store(folder)
    with open_store(folder) as store:
        paths, table = store.expert_table()
        floor = _core.ExpertCache.floor_bytes(table)
        cache = _core.ExpertCache(paths, table, capacity_bytes=floor)
        try:
            for number, layer in enumerate(store.layers):
                for expert in range(layer.experts):
                    for at, matrix in enumerate(layer.matrices):
                        out = np.empty((matrix.rows, matrix.columns), np.uint16)
                        cache.decode(number, expert, at, out)
                        assert np.array_equal(out, experts[number, expert, matrix.role])
        finally:
            cache.close()


def test_other_dtypes_are_raw_and_exact(tiny_checkpoint, tiny_store):
    folder = tiny_store("mixtral", dtype="float32")
    original = tensors_of(tiny_checkpoint("mixtral", dtype="float32"))
    with open_store(folder) as store:
        assert {tensor.codec for tensor in store.dense_tensors()} == {"raw"}
        name = "model.embed_tokens.weight"
        assert store.read_dense(name).dtype == np.float32
        assert store.read_dense(name).tobytes() == bits(original[name])
        assert store.expert_dtypes(0) == ("F32", "F32", "F32")
        assert store.manifest.model["dtype"] == "float32"
    assert oracle.restore_tensors(folder) == {k: bits(v) for k, v in original.items()}


def test_any_safetensors_reader_lists_the_shards(tiny_store):
    with safe_open(tiny_store("mixtral") / "experts-00001.safetensors", "np") as file:
        names = list(file.keys())
        assert file.get_slice("model.layers.1.mlp.experts.3").get_dtype() == "U8"
    assert len(names) == 9
    assert "zipmoe.index" in names


# One broken store per rule. `reseal` makes every checksum right again, as an attacker would.


def reseal(folder, change=None, only=None):
    """Recompute checksums of shards and the manifest after `change(manifest)`."""
    manifest = json.loads((folder / "zipmoe.json").read_text())
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        data = bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        start, stop = (8 + length + at for at in header["zipmoe.index"]["data_offsets"])
        sealed = xxhash.xxh3_64_intdigest(data[start : stop - 8])
        data[stop - 8 : stop] = sealed.to_bytes(8, "little")
        path.write_bytes(data)
        shard["header_xxh3"] = f"{xxhash.xxh3_64_intdigest(data[: 8 + length]):016x}"
        shard["index_xxh3"] = f"{sealed:016x}"
        shard["bytes"] = len(data)
    if change:
        change(manifest)
    write_manifest(folder, manifest)


def write_manifest(folder, manifest):
    manifest.pop("xxh3")
    body = json.dumps(manifest, indent=1).removesuffix("\n}")
    tail = f',\n "xxh3": "{xxhash.xxh3_64_hexdigest(body.encode())}"\n}}\n'
    (folder / "zipmoe.json").write_text(body + tail)


def entry_at(path, number):
    """Offset of an index entry in a shard."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return 8 + length + header["zipmoe.index"]["data_offsets"][0] + 64 + 128 * number


def patch(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


FIELDS = {  # offset in an entry, new bytes, error, what it says
    "record out of order": (0, struct.pack("<I", 7), CorruptError, "record"),
    "matrix out of order": (4, struct.pack("<H", 2), CorruptError, "matrices"),
    "unknown dtype": (6, b"\x63", CorruptError, "dtype"),
    "flags set": (7, b"\x01", CorruptError, "reserved"),
    "layer over the limit": (8, struct.pack("<I", 70_000), CorruptError, "layer"),
    "expert half dense": (12, struct.pack("<I", 0xFFFFFFFF), CorruptError, "neither"),
    "unknown codec": (16, struct.pack("<H", 99), FormatError, "codec id 99"),
    "unknown layout": (18, struct.pack("<H", 2), CorruptError, "layout"),
    "rows over the limit": (20, struct.pack("<I", 1 << 31), CorruptError, "rows or columns"),
    "other rows": (20, struct.pack("<I", 1), CorruptError, "extent 0"),
    "row group of 3": (28, struct.pack("<I", 3), CorruptError, "geometry"),
    "row group of 0": (28, struct.pack("<I", 0), CorruptError, "geometry"),
    "tile of 65": (32, struct.pack("<I", 65), CorruptError, "geometry"),
    "block of over 8192": (28, struct.pack("<I", 132), CorruptError, "geometry"),
    "role of dense": (36, struct.pack("<I", 3), CorruptError, "role"),
    "unknown role": (36, struct.pack("<I", 4), CorruptError, "role"),
    "other role": (36, struct.pack("<I", 1), MismatchError, "another shape"),
    "reserved set": (40, b"\x01", CorruptError, "reserved"),
    "extent moved": (48, struct.pack("<Q", 8192), CorruptError, "extent 0"),
    "extent 1 moved": (72, struct.pack("<Q", 0), CorruptError, "extent 1"),
    "extent 0 longer": (56, struct.pack("<Q", 20480), CorruptError, "extent 0"),
    "extent 1 a page longer": (80, struct.pack("<Q", 9000), CorruptError, "extent 0|fill"),
    "extent 1 huge": (80, struct.pack("<Q", 1 << 63), CorruptError, "limit"),
    "extent 2 set": (96, b"\x01", CorruptError, "reserved"),
    "last reserved set": (127, b"\x01", CorruptError, "reserved"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_an_index_entry_that_breaks_a_rule_is_refused(case, store_copy):
    offset, data, error, said = FIELDS[case]
    folder = store_copy("mixtral")
    path = folder / "experts-00001.safetensors"
    patch(path, entry_at(path, 0) + offset, data)
    with pytest.raises(CorruptError, match="index does not have its checksum"):
        open_store(folder)
    reseal(folder)
    with pytest.raises(error, match=said):
        open_store(folder)


def test_padding_that_is_not_zero_is_found_by_verify(store_copy):
    folder = store_copy("mixtral")
    path = folder / "experts-00001.safetensors"
    patch(path, entry_at(path, 0) + 80, struct.pack("<Q", 64))  # the rest becomes padding
    reseal(folder)
    errors = verify_store(folder).errors
    assert len(errors) == 1
    assert "padding is not zero" in str(errors[0])
    assert (errors[0].layer, errors[0].expert, errors[0].plane) == (0, 0, "exponent")
    with open_store(folder) as store, pytest.raises(CorruptError, match="expert 0"):
        store.read_matrix(store.expert_shards[0], 0)


MANIFEST = {
    "other version": (lambda m: m.update(format_version="0.1"), FormatError, "version '0.1'"),
    "other format": (lambda m: m.update(format="zip"), FormatError, "not the manifest"),
    "path trick": (lambda m: m["files"][0].update(name="../x"), CorruptError, "plain file name"),
    "hidden file": (lambda m: m["files"][0].update(name=".x"), CorruptError, "plain file name"),
    "two of a name": (lambda m: m["files"].append(m["files"][0]), CorruptError, "listed twice"),
    "negative size": (lambda m: m["files"][0].update(bytes=-1), CorruptError, "count"),
    "size as text": (lambda m: m["files"][0].update(bytes="1"), CorruptError, "count"),
    "other size": (lambda m: m["files"][0].update(bytes=1), CorruptError, "should have 1"),
    "missing file": (lambda m: m["files"][0].update(name="x.json"), CorruptError, "missing"),
    "other sum": (lambda m: m.update(store_bytes=1), CorruptError, "sum"),
    "no layers": (lambda m: m.pop("layers"), CorruptError, "malformed"),
    "fewer layers": (lambda m: m["layers"].pop(), MismatchError, "nothing"),
    "more experts": (lambda m: m["layers"][1].update(experts=5), MismatchError, "no shard"),
    "renamed module": (lambda m: m["layers"][0].update(module="x"), MismatchError, "x.0"),
    "experts over the limit": (
        lambda m: m["layers"][0].update(experts=1 << 20), CorruptError, "too many"
    ),
    "unknown role": (
        lambda m: m["layers"][0]["matrices"][0].update(role="x"), CorruptError, "none of"
    ),
    "unknown codec": (lambda m: m["codec"].update(experts="x"), CorruptError, "none of"),
    "shard dropped": (lambda m: m["shards"].pop(0), CorruptError, "sum"),
    "short checksum": (
        lambda m: m["shards"][0].update(index_xxh3="00"), CorruptError, "16 digits"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFEST)
def test_a_manifest_that_breaks_a_rule_is_refused(case, store_copy):
    change, error, said = MANIFEST[case]
    folder = store_copy("mixtral")
    reseal(folder, change)
    with pytest.raises(error, match=said):
        open_store(folder)


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), length, data


def shorten(tensor):
    tensor["shape"][0] -= 8
    tensor["data_offsets"][0] += 8


HEADERS = {
    "gap": (lambda h: shorten(h["zipmoe.index"]), "one after the other"),
    "past the end": (lambda h: h.pop("zipmoe.index"), "the tensors end"),
    "other dtype": (lambda h: h["model.layers.0.mlp.experts.0"].update(dtype="I8"), "plain bytes"),
    "unknown dtype": (lambda h: h["zipmoe.index"].update(dtype="U9"), "unknown dtype"),
    "no metadata": (lambda h: h.pop("__metadata__"), "not that of a store"),
    "negative": (lambda h: h["zipmoe.index"].update(shape=[-1]), "impossible"),
    "huge": (lambda h: h["zipmoe.index"].update(shape=[1 << 61]), "data_offsets say"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_shard_header_that_breaks_a_rule_is_refused(case, store_copy):
    change, said = HEADERS[case]
    folder = store_copy("mixtral")
    path = folder / "experts-00001.safetensors"
    header, length, data = header_of(path)
    change(header)
    text = json.dumps(header).encode().ljust(length)[:length]
    path.write_bytes(data[:8] + text + data[8 + length :])
    checksum = f"{xxhash.xxh3_64_intdigest(data[:8] + text):016x}"
    manifest = json.loads((folder / "zipmoe.json").read_text())
    manifest["shards"][-1]["header_xxh3"] = checksum
    write_manifest(folder, manifest)
    with pytest.raises(CorruptError, match=said):
        open_store(folder)


def test_a_header_changed_without_a_change_of_meaning_is_refused(store_copy):
    folder = store_copy("mixtral")
    path = folder / "experts-00001.safetensors"
    _, length, data = header_of(path)
    assert data[7 + length] == ord(" ")
    patch(path, 7 + length, b"\t")  # still the same JSON
    with pytest.raises(CorruptError, match="header does not have its checksum"):
        open_store(folder)
    assert len(verify_store(folder).errors) == 1


def test_a_header_length_over_limit_or_file_is_refused_before_it_is_used(store_copy):
    folder = store_copy("mixtral")
    path = folder / "experts-00001.safetensors"
    for length, said in ((1 << 63, "limit"), (90_000_000, "does not fit")):
        patch(path, 0, struct.pack("<Q", length))
        with pytest.raises(CorruptError, match=said):
            open_store(folder)


def swap_experts(folder, layer=0, one=1, other=2):
    """Exchange two experts' bytes in the shard; returns the shard's path."""
    path = folder / "experts-00001.safetensors"
    header, length, data = header_of(path)
    data = bytearray(data)
    spans = []
    for expert in (one, other):
        first, last = header[f"model.layers.{layer}.mlp.experts.{expert}"]["data_offsets"]
        spans.append(slice(8 + length + first, 8 + length + last))
    assert spans[0].stop - spans[0].start == spans[1].stop - spans[1].start
    data[spans[0]], data[spans[1]] = data[spans[1]], data[spans[0]]
    path.write_bytes(data)
    return path


def test_two_experts_swapped_are_refused(store_copy):
    folder = store_copy("mixtral", codec="raw")
    path = swap_experts(folder)
    errors = verify_store(folder).errors
    assert {(error.layer, error.expert) for error in errors} == {(0, 1), (0, 2)}
    assert all(error.file == path.name and error.offset % 4096 == 0 for error in errors)
    with open_store(folder) as store:
        _, _, shard, rows = list(store.expert_records())[1]
        with pytest.raises(CorruptError, match=r"wrong checksum.*expert 1, plane sign-mantissa"):
            store.read_matrix(shard, rows[0])


def swap_experts_and_entries(folder):
    """Exchange experts 1 and 2 of the first layer and their checksums in the index, made anew.

    Returns the index's checksum before and after, as the manifest writes it.
    """
    path = swap_experts(folder)
    at = entry_at(path, 3), entry_at(path, 6)
    data = bytearray(path.read_bytes())
    for row in range(3):  # exchange the checksums, the offsets stay
        for extent in (48, 72):
            one, other = (
                slice(a + 128 * row + extent + 16, a + 128 * row + extent + 24) for a in at
            )
            data[one], data[other] = data[other], data[one]
    start = entry_at(path, 0) - 64
    before = int.from_bytes(data[-8:], "little")
    data[-8:] = xxhash.xxh3_64_intdigest(data[start:-8]).to_bytes(8, "little")
    path.write_bytes(data)
    return f"{before:016x}", f"{int.from_bytes(data[-8:], 'little'):016x}"


def test_two_experts_swapped_with_their_index_entries_are_refused(store_copy):
    folder = store_copy("mixtral", codec="raw")
    swap_experts_and_entries(folder)
    with pytest.raises(CorruptError, match="index does not have its checksum"):
        open_store(folder)


def test_a_shard_of_another_store_is_refused(store_copy, tiny_store):
    folder = store_copy("mixtral", codec="raw")
    other = tiny_store("mixtral", codec="raw", seed=1)
    name = "experts-00001.safetensors"
    assert (other / name).stat().st_size == (folder / name).stat().st_size
    shutil.copy(other / name, folder / name)
    with pytest.raises(CorruptError, match="checksum"):
        open_store(folder)


def test_a_stranger_in_the_folder_is_refused_and_a_readme_is_not(store_copy):
    folder = store_copy("mixtral")
    (folder / "README.md").write_text("a model card")
    (folder / ".gitattributes").write_text("from the hub")
    open_store(folder).close()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(MismatchError, match="does not belong"):
        open_store(folder)


def test_a_link_in_place_of_a_file_is_refused(store_copy, tmp_path):
    folder = store_copy("mixtral")
    shutil.move(folder / "source.json", tmp_path / "elsewhere.json")
    (folder / "source.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CorruptError, match="not a regular file"):
        open_store(folder)


def test_a_folder_without_a_manifest_is_no_store_or_an_unfinished_one(store_copy, tmp_path):
    with pytest.raises(FormatError, match="not a zipmoe store"):
        open_store(tmp_path)
    folder = store_copy("mixtral")
    (folder / "zipmoe.json").unlink()
    (folder / ".zipmoe-journal").write_text("")
    with pytest.raises(FormatError, match="unfinished pack"):
        open_store(folder)


def test_closing_frees_the_files_and_a_refused_store_leaves_none_open(store_copy):
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    folder = store_copy("mixtral")
    store = open_store(folder)
    assert open_files() > before
    store.close()
    store.close()
    assert open_files() == before
    reseal(folder, lambda m: m["layers"].pop())
    with pytest.raises(MismatchError):
        open_store(folder)
    assert open_files() == before


# A store written by the first version, kept as it was

GOLDEN = Path(__file__).parent / "golden" / "1.0"


def test_the_golden_store_is_read_by_both_readers_and_unpacks_to_its_checksums(tmp_path):
    assert verify_store(GOLDEN).errors == []
    sums = json.loads((GOLDEN / "source.json").read_text())["tensors"]
    restored = oracle.restore_tensors(GOLDEN)
    assert {key: hashlib.sha256(data).hexdigest() for key, data in restored.items()} == sums
    unpack_store(GOLDEN, tmp_path / "back")


def test_packing_the_golden_checkpoint_gives_the_golden_shards(tmp_path):
    unpack_store(GOLDEN, tmp_path / "back")
    pack_checkpoint(tmp_path / "back", tmp_path / "again")
    for shard in GOLDEN.glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()
