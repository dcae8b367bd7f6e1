"""Every codec restores every bit of every matrix, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import weights as w
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from zipmoe import _core

CODECS = ["raw", "rank223", "rank3", "rank4", "zstd", "lz4hc"]
ISAS = [isa for isa in _core.available_isas() if isa != "avx512bf16"]  # products only
# Nothing, one, less than a chunk, ragged in both directions, several ragged tiles, whole blocks.
SHAPES = [(0, 5), (5, 0), (1, 1), (3, 5), (4, 64), (67, 129), (5, 4100), (24, 576), (9, 2048)]


def round_trip(codec, matrix, *, decode_isa="", out=None, **options):
    coded = _core.encode(codec, matrix, **options)
    out = np.full(matrix.shape, 0x5555, np.uint16) if out is None else out
    pair = {"row_group": coded.row_group, "k_tile": coded.k_tile}
    _core.decode(coded.codec, coded.extents, out, **pair, isa=decode_isa)
    np.testing.assert_array_equal(out, matrix)
    return coded


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
def test_all_65536_patterns_come_back(codec, isa):
    patterns = np.arange(65536, dtype=np.uint16)
    shuffled = np.random.default_rng(0).permutation(patterns)
    for matrix in (patterns.reshape(256, 256), shuffled.reshape(32, 2048)):
        coded = round_trip(codec, matrix, decode_isa=isa, isa=isa, allow_raw=False)
        assert coded.codec == codec


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes_and_data_come_back(codec, isa, shape):
    for kind in w.KINDS:
        round_trip(codec, kind(shape), decode_isa=isa, isa=isa, allow_raw=False)


@st.composite
def pairs(draw):
    tile = 64 * draw(st.integers(1, 32))
    return 4 * draw(st.integers(1, 8192 // 4 // tile)), tile


@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    codec=st.sampled_from(CODECS[1:]),
    isas=st.tuples(st.sampled_from(ISAS), st.sampled_from(ISAS)),
    shape=st.tuples(st.integers(1, 150), st.integers(1, 700)),
    pair=pairs(),
    kind=st.sampled_from(w.KINDS),
    seed=st.integers(0, 99),
    threads=st.integers(1, 4),
    shards=st.integers(1, 64),
)
def test_any_geometry_comes_back(codec, isas, shape, pair, kind, seed, threads, shards):
    encode_isa, decode_isa = isas
    options = {"row_group": pair[0], "k_tile": pair[1], "threads": threads, "shards": shards}
    coded = round_trip(
        codec, kind(shape, seed), decode_isa=decode_isa, isa=encode_isa, allow_raw=False, **options
    )
    assert (coded.row_group, coded.k_tile) == pair


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
def test_threads_decode_the_same(codec, isa):
    matrix = w.gaussian((301, 1000))
    coded = _core.encode(codec, matrix, allow_raw=False)
    for threads in (2, 3, 7, 1000):
        out = np.zeros_like(matrix)
        pair = {"row_group": coded.row_group, "k_tile": coded.k_tile}
        _core.decode(codec, coded.extents, out, **pair, threads=threads, isa=isa)
        np.testing.assert_array_equal(out, matrix)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("offset", [0, 1, 32])
def test_rows_of_the_target_may_be_strided_and_its_surroundings_stay(codec, isa, offset):
    # Large enough for stores past the caches, which need aligned rows: one case of three has them.
    matrix = w.gaussian((600, 1024))
    page = np.full(4096 + 610 * 1152 * 2, 0xAA, np.uint8)
    page = page[-page.ctypes.data % 64 :][: 610 * 1152 * 2].view(np.uint16).reshape(610, 1152)
    view = page[5:605, offset : offset + 1024]
    round_trip(codec, matrix, decode_isa=isa, out=view)
    view[:] = 0xAAAA
    assert (page == 0xAAAA).all()


@pytest.mark.parametrize("codec", CODECS)
def test_any_strides_of_the_source_give_the_same_bytes(codec):
    matrix = w.gaussian((300, 200))
    wide = np.zeros((600, 400), np.uint16)
    wide[::2, ::2] = matrix
    views = [
        np.asfortranarray(matrix),
        wide[::2, ::2],
        np.ascontiguousarray(matrix[::-1, ::-1])[::-1, ::-1],
        np.ascontiguousarray(matrix[:, ::-1])[:, ::-1],
        np.ascontiguousarray(matrix[::-1])[::-1],
    ]
    expected = _core.encode(codec, matrix)
    for view in views:
        for threads in (1, 3):
            coded = round_trip(codec, view, threads=threads)
            for ours, theirs in zip(coded.extents, expected.extents, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_a_read_only_source_is_fine():
    matrix = w.gaussian((8, 64))
    matrix.flags.writeable = False
    round_trip("rank3", matrix)


def test_extents_outlive_what_they_came_from():
    extents = _core.encode("rank4", w.gaussian((256, 256))).extents
    kept = [extent.copy() for extent in extents]
    for seed in range(20):
        _core.encode("rank4", w.random_bits((256, 256), seed))
    for extent, copy in zip(extents, kept, strict=True):
        np.testing.assert_array_equal(extent, copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "rank5"}, "codec 'rank5'"),
        ({"isa": "sse"}, "'sse'"),
        ({"row_group": 6, "k_tile": 64}, "row group 6"),
        ({"row_group": 4, "k_tile": 96}, "k-tile 96"),
        ({"row_group": 8, "k_tile": 2048}, "8192"),
        ({"row_group": 4}, "k-tile 0"),
        ({"codec": "zstd", "shards": 0}, "shards"),
        ({"codec": "zstd", "shards": 65}, "shards"),
    ],
)
def test_wrong_options_are_refused_by_name(change, message):
    options = {"codec": "rank223", "weights": w.gaussian((8, 64))} | change
    with pytest.raises(ValueError, match=message):
        _core.encode(options.pop("codec"), options.pop("weights"), **options)


def test_a_target_with_strided_columns_is_refused():
    coded = _core.encode("rank3", w.gaussian((64, 64)))
    with pytest.raises(ValueError, match="contiguous"):
        _core.decode(
            "rank3", coded.extents, np.zeros((64, 128), np.uint16)[:, ::2], row_group=64, k_tile=64
        )


def test_a_read_only_target_is_refused():
    coded = _core.encode("rank3", w.gaussian((64, 64)))
    out = np.zeros((64, 64), np.uint16)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        _core.decode("rank3", coded.extents, out, row_group=64, k_tile=64)


def test_xxh3_is_that_of_the_library():
    data = w.random_bits((300, 1000)).view(np.uint8).reshape(-1)
    for length in (0, 1, 3, 8, 16, 17, 128, 129, 240, 241, 1024, 4096, 99_999, 600_000):
        for start in (0, 1):
            part = data[start : start + length]
            assert _core.xxh3(part) == xxhash.xxh3_64_intdigest(part)
            assert _core.xxh3(part.tobytes()) == _core.xxh3(memoryview(part))
    with pytest.raises(ValueError, match="contiguous"):
        _core.xxh3(data[::2])
