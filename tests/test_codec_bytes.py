"""What the codecs write: the same bytes from every path, few enough, or raw where that is less."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import weights as w
from hypothesis import given, settings
from hypothesis import strategies as st

from zipmoe import _core

CODECS = ["raw", "rank223", "rank3", "rank4", "zstd", "lz4hc"]
RANKS = CODECS[1:4]
ISAS = [isa for isa in _core.available_isas() if isa != "avx512bf16"]  # products only


def stored_bits(coded, matrix):
    """Bits per weight of the extents, each padded to a multiple of 4096 bytes."""
    return 8 * sum(-(-extent.size // 4096) * 4096 for extent in coded.extents) / matrix.size


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    shape=st.tuples(st.integers(0, 130), st.integers(0, 600)),
    kind=st.sampled_from(w.KINDS),
    seed=st.integers(0, 99),
)
def test_the_bytes_depend_neither_on_instruction_set_nor_on_threads(codec, shape, kind, seed):
    matrix = kind(shape, seed)
    expected = _core.encode(codec, matrix, isa="portable", allow_raw=False)
    for isa in ISAS:
        for threads in (1, 2, 5):
            coded = _core.encode(codec, matrix, isa=isa, threads=threads, allow_raw=False)
            for ours, theirs in zip(coded.extents, expected.extents, strict=True):
                np.testing.assert_array_equal(ours, theirs)


# Bounds of the project on the experts it is made for, padding included.
@pytest.mark.parametrize(
    ("kind", "shape", "codec", "most"),
    [
        (kind, shape, codec, most + extra)
        for kind, bounds in (
            (w.gaussian, {"rank223": 10.80, "rank3": 11.25}),
            (w.row_varying, {"rank223": 10.90, "rank3": 11.40}),
            (w.student_t, {"rank223": 10.90, "rank3": 11.40}),
        )
        for shape, extra in (((1408, 2048), 0), ((1536, 576), 0.10), ((3584, 4096), 0.10))
        for codec, most in bounds.items()
    ],
)
def test_sizes_keep_their_promise(kind, shape, codec, most):
    matrix = kind(shape)
    coded = _core.encode(codec, matrix)
    assert coded.codec == codec
    assert 10.5 < stored_bits(coded, matrix) <= most


@pytest.mark.soak
@pytest.mark.parametrize("codec", RANKS)
def test_sizes_of_the_largest_expert(codec, soak_record):
    bits = {}
    for kind in (w.gaussian, w.row_varying, w.student_t):
        matrix = kind((14336, 4096))
        bits[kind.__name__] = round(stored_bits(_core.encode(codec, matrix), matrix), 4)
    soak_record("bits per weight, 14336 x 4096", **bits)
    most = {"rank223": (10.90, 11.00), "rank3": (11.35, 11.50), "rank4": (12.1, 12.1)}[codec]
    assert bits["gaussian"] <= most[0]
    assert max(bits.values()) <= most[1]


def test_entropy_coders_are_near_their_known_sizes():
    matrix = w.gaussian((1408, 2048))
    assert stored_bits(_core.encode("zstd", matrix), matrix) < 10.75
    assert stored_bits(_core.encode("lz4hc", matrix[:128], shards=1), matrix[:128]) < 12.2


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", [w.random_bits, w.all_zero])
@pytest.mark.parametrize("shape", [(300, 256), (3, 5), (1, 1), (0, 9), (9, 0)])
def test_what_does_not_shrink_is_stored_raw(codec, kind, shape):
    matrix = kind(shape)
    coded = _core.encode(codec, matrix)
    forced = _core.encode(codec, matrix, allow_raw=False)
    assert forced.codec == codec
    pages = [
        sum(-(-extent.size // 4096) for extent in extents)
        for extents in (forced.extents, (matrix.reshape(-1).view(np.uint8),))
    ]
    assert coded.codec == (codec if pages[0] < pages[1] else "raw")
    if kind is w.random_bits:
        assert coded.codec == "raw"
    if coded.codec == "raw":
        assert (coded.row_group, coded.k_tile) == (0, 0)
        assert coded.extents[0].tobytes() == matrix.tobytes()
        assert coded.extents[1].size == 0


@pytest.mark.parametrize("codec", RANKS)
def test_padding_costs_no_escapes(codec):
    # One weight in a block of 256: all others are padding, coded as rank 0.
    coded = _core.encode(codec, np.array([[0x3F80]], np.uint16), allow_raw=False)
    extent = coded.extents[1]
    fixed = {"rank223": 64 * 3, "rank3": 128 + 64 * 2, "rank4": 128 + 64 * 2}[codec]
    variable = {"rank223": 4, "rank3": 0, "rank4": 0}[codec]
    assert extent.size == fixed + variable + 64
    assert extent[0] == 0
    assert not extent[fixed:].any()


def test_ranks_follow_count_then_value():
    # 64 weights: exponent 9 thirty times, 7 and 8 seventeen times each; then the smallest absent.
    exponents = np.repeat([9, 8, 7], [30, 17, 17]).astype(np.uint16)
    coded = _core.encode("rank3", (exponents << 7).reshape(1, 64), allow_raw=False)
    table = coded.extents[1][128:136]
    assert table.tolist() == [9, 7, 8, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("codec", ["zstd", "lz4hc"])
@pytest.mark.parametrize("shards", [1, 3, 7, 64])
def test_the_exponent_plane_is_cut_as_the_format_says(codec, shards):
    matrix = w.gaussian((10, 500))
    plane = 12 * 512
    extent = _core.encode(codec, matrix, shards=shards, allow_raw=False).extents[1]
    head = extent[: extent.size // 4 * 4].view(np.uint32)
    each = ceil(ceil(plane / shards) / 64) * 64
    lengths = [min(each, plane - at) for at in range(0, plane, each)]
    assert head[0] == len(lengths)
    assert head[2 : 2 + 2 * len(lengths) : 2].tolist() == lengths
