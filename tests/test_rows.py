"""Rows of an embedding that stays on the drive: the same bits, or a typed error."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zipmoe
from zipmoe import _core
from zipmoe._errors import CorruptError, FetchError
from zipmoe.generate import generate
from zipmoe.rows import DriveRows
from zipmoe.store import PackedPlace, PackedRecord

CODECS = ["rank223", "rank3", "rank4", "raw"]


def gaussian(rng, rows, columns):
    values = rng.standard_normal((rows, columns)).astype(np.float32) * 0.02
    words = (values.view(np.uint32) >> 16).astype(np.uint16)
    words[rng.random((rows, columns)) < 0.01] = rng.integers(0, 1 << 16)  # escapes of all levels
    return words


def drive_rows(folder, codec, words):
    encoded = _core.encode(codec, words, allow_raw=codec == "raw")
    planes = tuple(np.array(extent) for extent in encoded.extents)
    starts = (4096, 4096 + planes[0].size + -planes[0].size % 4096)
    path = folder / "dense-00001.safetensors"
    with path.open("wb") as file:
        for start, plane in zip(starts, planes, strict=True):
            file.seek(start)
            file.write(plane.tobytes())
    shape = (*words.shape, encoded.row_group, encoded.k_tile)
    record = PackedRecord(encoded.codec, planes, *shape)
    return path, DriveRows(PackedPlace(str(path), "embed", starts), record)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 300), seed=st.integers(0, 1 << 30))
def test_rows_are_those_of_the_matrix(codec, rows, columns, seed, tmp_path_factory):
    rng = np.random.default_rng(seed)
    words = gaussian(rng, rows, columns)
    _, reader = drive_rows(tmp_path_factory.mktemp("rows"), codec, words)
    wanted = rng.integers(0, rows, 9)
    np.testing.assert_array_equal(reader.read(wanted), words[wanted])
    np.testing.assert_array_equal(reader.read(range(rows)), words)
    assert reader.read([]).shape == (0, columns)
    reader.close()


@pytest.mark.parametrize("codec", CODECS)
def test_wide_rows_of_several_tiles(codec, tmp_path):
    words = gaussian(np.random.default_rng(1), 23, 5000)
    _, reader = drive_rows(tmp_path, codec, words)
    np.testing.assert_array_equal(reader.read([22, 0, 5]), words[[22, 0, 5]])
    for outside in (-1, 23):
        with pytest.raises(IndexError, match="23 rows"):
            reader.read([0, outside])


@pytest.mark.parametrize("codec", ["rank223", "rank3", "raw"])
def test_what_changed_on_the_drive_since_loading_is_refused(codec, tmp_path):
    words = gaussian(np.random.default_rng(2), 40, 256)
    path, reader = drive_rows(tmp_path, codec, words)
    with path.open("r+b") as file:
        file.seek(4096 + 7)
        byte = file.read(1)[0]
        file.seek(4096 + 7)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CorruptError, match="not those verified") as caught:
        reader.read([0])
    error = caught.value
    assert (error.file, error.tensor, error.offset) == (path.name, "embed", 4096)
    np.testing.assert_array_equal(reader.read([39]), words[39:])  # others are as they were
    os.truncate(path, 4096)
    with pytest.raises(CorruptError, match="ends too early"):
        reader.read([39])
    reader.close()
    with pytest.raises((FetchError, OSError)):
        reader.read([39])


def answer(loaded):
    with loaded:
        tokens = generate(loaded, "rows", max_tokens=8).token_ids
        return tokens, loaded.runtime.engaged()["on_drive"]


def test_an_embedding_stays_on_the_drive_where_memory_is_short(small_store, at_floor):
    short, on_drive = answer(at_floor())
    plenty, nothing = answer(zipmoe.load(small_store, memory="4GB", context=64))
    assert short == plenty
    assert on_drive == "model.embed_tokens.weight"
    assert nothing == "nothing"
