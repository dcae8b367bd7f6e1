"""int8, int4, int2: what is encoded, decoded and multiplied is what docs/format.md says."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import weights as w
from hypothesis import given, settings
from hypothesis import strategies as st

from zipmoe import _core
from zipmoe._errors import CorruptError

ISAS = _core.available_isas()
CODECS = ("int8", "int4", "int2")
MOST = {"int8": 127, "int4": 7, "int2": 3}
SHAPES = [(0, 5), (5, 0), (1, 1), (3, 5), (4, 64), (67, 129), (5, 4100), (24, 576), (9, 2048)]
ENGINES = {
    (isa, threads): _core.Engine(threads=threads, isa=isa) for isa in ISAS for threads in (1, 2)
}


def wide(words):
    return (words.astype(np.uint32) << 16).view(np.float32)


def encoded(codec, words, **options):
    coded = _core.encode(codec, words, **options)
    assert coded.codec == codec  # never raw instead
    return coded, [extent.copy() for extent in coded.extents]


def decoded(coded, extents, shape, threads=1):
    out = np.full(shape, 0x5555, np.uint16)
    pair = {"row_group": coded.row_group, "k_tile": coded.k_tile}
    _core.decode(coded.codec, tuple(extents), out, **pair, threads=threads)
    return out


def packed(coded, extents, shape):
    return _core.PackedMatrix(
        coded.codec,
        tuple(extents),
        rows=shape[0],
        columns=shape[1],
        row_group=coded.row_group,
        k_tile=coded.k_tile,
    )


def product(engine, matrix, x, bias=None):
    out = np.full((len(x), matrix.rows), 0x7A7A, np.uint16)
    more = 0 if bias is None else bias.ctypes.data
    engine.multiply(matrix, x.ctypes.data, x.shape[1], len(x), more, out.ctypes.data, matrix.rows)
    return out


def by_the_document(coded, extents, shape):
    planes = [extent.tobytes() for extent in extents]
    return oracle.decode_matrix(coded.codec, planes, *shape, (coded.row_group, coded.k_tile))


@pytest.mark.parametrize("scale_group", [64, 0])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_oracle_reads_what_the_core_writes(codec, shape, scale_group):
    for kind in (w.gaussian, w.row_varying, w.student_t, w.all_equal, w.all_zero):
        words = kind(shape)
        coded, extents = encoded(codec, words, scale_group=scale_group)
        out = decoded(coded, extents, shape, threads=3)
        assert np.array_equal(out, by_the_document(coded, extents, shape))
        again, others = encoded(codec, words, scale_group=scale_group, threads=4)
        assert (again.row_group, again.k_tile) == (coded.row_group, coded.k_tile)
        assert all(map(np.array_equal, extents, others))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    shape=st.tuples(st.integers(1, 90), st.integers(1, 700)),
    tile=st.integers(1, 32),
    group=st.integers(1, 512),
    scale_group=st.sampled_from((64, 0)),
    seed=st.integers(0, 99),
)
def test_every_group_is_within_half_a_step(codec, shape, tile, group, scale_group, seed):
    pair = {"k_tile": 64 * tile, "row_group": 4 * min(group, 8192 // 256 // tile)}
    words = w.row_varying(shape, seed)
    coded, extents = encoded(codec, words, scale_group=scale_group, **pair)
    assert np.array_equal(decoded(coded, extents, shape), by_the_document(coded, extents, shape))
    if codec != "int8":  # their scale is chosen for the sum of all errors
        return
    size = scale_group or shape[1]
    error = np.abs(wide(words) - wide(by_the_document(coded, extents, shape)))
    for first in range(0, shape[1], size):
        most = np.abs(wide(words[:, first : first + size])).max(axis=1, keepdims=True)
        # Half a step, a scale rounded to BF16, and the weight too.
        bound = most * (0.5 / 127 + 2.0**-8) + 1e-38
        assert (error[:, first : first + size] <= bound).all()


@pytest.mark.parametrize("codec", ["int4", "int2"])
def test_the_searched_scale_is_better_than_the_largest_magnitude(codec):
    words = w.student_t((64, 512))
    coded, extents = encoded(codec, words)
    found = ((wide(decoded(coded, extents, words.shape)) - wide(words)) ** 2).sum()
    step = np.abs(wide(words)).reshape(64, -1, 64).max(axis=2, keepdims=True) / MOST[codec]
    exact = wide(words).reshape(64, -1, 64) / step
    plain = np.round(exact) if codec == "int4" else 2 * np.floor(exact / 2) + 1
    plain = np.clip(plain, -MOST[codec], MOST[codec]) * step
    assert found < 0.9 * ((plain.reshape(64, 512) - wide(words)) ** 2).sum()


@pytest.mark.parametrize("codec", CODECS)
def test_no_weight_is_too_small_or_too_large(codec):
    for word in (0x0001, 0x0080, 0x0100, 0x7F7F, 0x7F00, 0x8001, 0xFF7F):
        words = np.full((4, 64), word, np.uint16)
        words[:, 1::2] ^= 0x8000
        coded, extents = encoded(codec, words)
        values = wide(decoded(coded, extents, words.shape))
        assert np.isfinite(values).all()
        assert (np.abs(values - wide(words)) <= np.abs(wide(words)) * 0.02 + 2.0**-126).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("word", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_what_is_not_finite_is_refused_by_its_place(codec, word):
    words = w.gaussian((20, 200))
    words[13, 77] = word
    with pytest.raises(ValueError, match="row 13, column 77"):
        _core.encode(codec, words, threads=2)


def test_a_scale_group_that_the_format_does_not_know_is_refused():
    with pytest.raises(ValueError, match="64 weights"):
        _core.encode("int4", w.gaussian((4, 64)), scale_group=32)


@pytest.mark.parametrize("codec", CODECS)
def test_damage_that_can_be_seen_is_refused(codec):
    shape = (37, 300)
    coded, extents = encoded(codec, w.student_t(shape))
    for plane, name in ((0, "codes"), (1, "scales")):
        for length in (0, 1, extents[plane].size - 1, extents[plane].size + 2):
            changed = list(extents)
            changed[plane] = np.resize(extents[plane], length)
            for use in (decoded, packed):
                with pytest.raises(CorruptError) as caught:
                    use(coded, changed, shape)
                assert caught.value.plane == name
    if codec == "int8":
        changed = extents[0].copy()
        changed[77] = 0x80
        with pytest.raises(CorruptError, match="byte 77 is -128"):
            decoded(coded, [changed, extents[1]], shape)
    for scale in (0x7F80, 0x8000, 0xBF80, 0x7FC0):
        changed = extents[1].copy()
        changed.view(np.uint16)[5] = scale
        with pytest.raises(CorruptError, match="scale 5"):
            decoded(coded, [extents[0], changed], shape)


def bound(integers, scales, x, scale_group):
    """The bound of docs/kernels.md on a sum of groups, and half a unit of BF16 for its rounding."""
    columns = integers.shape[1]
    n = -(-columns // 64) + 8 if scale_group else 2 * -(-columns // 32) + 5
    n += 1  # products of the reference round too
    magnitude = np.abs(wide(x).astype(np.float64)) @ np.abs(integers * scales).T
    exact = np.abs(wide(x).astype(np.float64) @ (integers * scales).T)
    unit = 2.0**-24
    flushed = columns * 2.0**-126 * (1 + np.abs(scales).max())
    summed = n * unit / (1 - n * unit) * magnitude + flushed
    return summed + 2.0**-8 * (exact + summed) + 2.0**-134


def exact_parts(coded, extents, shape, scale_group):
    """Integers and scales of every weight, in float64."""
    rows, columns = shape
    blocks = oracle.blocks_of(rows, columns, coded.row_group, coded.k_tile)
    integers = np.zeros(shape)
    scales = np.zeros(shape)
    by_block = oracle.integers_of(coded.codec, extents[0].tobytes(), blocks)
    read = wide(extents[1].view(np.uint16)).astype(np.float64)
    at = 0
    for block, (top, left, height, width) in zip(by_block, blocks, strict=True):
        inside = (slice(top, min(top + height, rows)), slice(left, min(left + width, columns)))
        own = np.repeat(read[top : top + height, None], width, axis=1)
        if scale_group:
            part = read[at : at + height * width // 64].reshape(height // 4, width // 64, 4)
            at += height * width // 64
            own = np.repeat(part.transpose(0, 2, 1).reshape(height, -1), 64, axis=1)
        integers[inside] = block[: rows - top, : columns - left]
        scales[inside] = own[: rows - top, : columns - left]
    return integers, scales


@pytest.mark.parametrize("scale_group", [64, 0])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 100), (130, 576), (9, 4160), (33, 5000), (3, 14336)], ids=str
)
def test_a_product_is_the_same_alone_and_in_any_batch(codec, shape, scale_group):
    words, x = w.student_t(shape), w.gaussian((70, shape[1]), 1)
    coded, extents = encoded(codec, words, scale_group=scale_group)
    matrix = packed(coded, extents, shape)
    integers, scales = exact_parts(coded, extents, shape, scale_group)
    exact = wide(x).astype(np.float64) @ (integers * scales).T
    by_isa = {}
    for isa in ISAS:
        whole = product(ENGINES[isa, 1], matrix, x)
        assert (np.abs(wide(whole) - exact) <= bound(integers, scales, x, scale_group)).all()
        assert np.array_equal(product(ENGINES[isa, 2], matrix, x), whole)
        for count in (*range(1, 10), 23, 24, 25):
            assert np.array_equal(product(ENGINES[isa, 1], matrix, x[:count]), whole[:count])
            assert np.array_equal(product(ENGINES[isa, 1], matrix, x[-count:]), whole[-count:])
        by_isa[isa] = whole
    agreeing = [whole for isa, whole in by_isa.items() if isa != "avx512bf16"]
    assert all(np.array_equal(whole, agreeing[0]) for whole in agreeing)


@pytest.mark.parametrize("scale_group", [64, 0])
@pytest.mark.parametrize("codec", CODECS)
def test_sums_agree_beyond_what_bf16_shows(codec, scale_group):
    """Less its rounded value, a sum shows eight bits more: a bias is added in FP32."""
    words, x = w.student_t((400, 1408)), w.gaussian((5, 1408), 1)
    matrix = packed(*encoded(codec, words, scale_group=scale_group), words.shape)
    rest = {}
    for isa in ISAS:
        bias = product(ENGINES[isa, 1], matrix, x[:1])[0] ^ 0x8000
        rest[isa] = product(ENGINES[isa, 1], matrix, x[:1], bias)[0]
        together = product(ENGINES[isa, 2], matrix, x, bias)
        assert np.array_equal(together[0], rest[isa])
    agreeing = [found for isa, found in rest.items() if isa != "avx512bf16"]
    assert all(np.array_equal(found, agreeing[0]) for found in agreeing)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    rows=st.integers(1, 40),
    columns=st.integers(1, 700),
    count=st.integers(1, 30),
    group=st.sampled_from([(4, 64), (8, 128), (12, 576), (4, 2048), (32, 256)]),
    scale_group=st.sampled_from((64, 0)),
    seed=st.integers(0, 99),
)
def test_blocks_and_tiles_leave_no_trace(codec, rows, columns, count, group, scale_group, seed):
    words, x = w.row_varying((rows, columns), seed), w.gaussian((count, columns), seed)
    results = []
    for pair in ((0, 0), group):
        options = {"row_group": pair[0], "k_tile": pair[1], "scale_group": scale_group}
        coded, extents = encoded(codec, words, **options)
        results.append(packed(coded, extents, words.shape))
    for isa in ISAS:
        first, second = (product(ENGINES[isa, 2], matrix, x) for matrix in results)
        assert np.array_equal(first, second)


@pytest.mark.parametrize("isa", ISAS)
def test_512_columns_and_more_give_the_bits_of_one(isa):
    words, x = w.student_t((40, 320)), w.gaussian((600, 320), 1)
    for codec in CODECS:
        coded, extents = encoded(codec, words)
        matrix = packed(coded, extents, words.shape)
        whole = product(ENGINES[isa, 2], matrix, x)
        for at in (0, 5, 511, 512, 599):
            assert np.array_equal(product(ENGINES[isa, 1], matrix, x[at : at + 1])[0], whole[at])


def test_rows_of_integers_are_not_given_out_one_by_one():
    words = w.gaussian((8, 64))
    matrix = packed(*encoded("int4", words), words.shape)
    ids, out = np.array([1]), np.zeros((1, 64), np.uint16)
    with pytest.raises(ValueError, match="one by one"):
        ENGINES[ISAS[0], 1].decode_rows(matrix, ids.ctypes.data, 1, out.ctypes.data, 64)
