"""Products straight from packed weights: exact where they must be, bounded where they round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zipmoe import _core

ISAS = _core.available_isas()
CODECS = ("rank223", "rank3", "rank4", "raw")
# One per instruction set and number of threads: a pool takes longer to start than a small product.
ENGINES = {
    (isa, threads): _core.Engine(threads=threads, isa=isa) for isa in ISAS for threads in (1, 2)
}


def bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def wide(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


def packed(codec: str, words: np.ndarray, **geometry: int) -> _core.PackedMatrix:
    encoded = _core.encode(codec, words, allow_raw=False, **geometry)
    assert encoded.codec == codec
    return _core.PackedMatrix(
        encoded.codec,
        encoded.extents,
        rows=words.shape[0],
        columns=words.shape[1],
        row_group=encoded.row_group,
        k_tile=encoded.k_tile,
    )


def multiply(
    engine: _core.Engine,
    matrix: _core.PackedMatrix,
    x: np.ndarray,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """[columns, rows] of BF16 words; what must not be written is watched."""
    guard = np.full(len(x) * matrix.rows + 64, 0x7A7A, np.uint16)
    out = guard[: len(x) * matrix.rows].reshape(len(x), matrix.rows)
    engine.multiply(
        matrix,
        x.ctypes.data,
        x.shape[1],
        len(x),
        0 if bias is None else bias.ctypes.data,
        out.ctypes.data,
        matrix.rows,
    )
    assert (guard[out.size :] == 0x7A7A).all()
    return out


def gaussian(rng: np.random.Generator, *shape: int, scale: float = 0.02) -> np.ndarray:
    return bf16(scale * rng.standard_normal(shape))


def bound(words: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The bound of docs/kernels.md on the sum, and half a unit of BF16 for its rounding."""
    n = 2 * -(-words.shape[1] // 32) + 5
    magnitude = np.abs(wide(x).astype(np.float64)) @ np.abs(wide(words).astype(np.float64)).T
    exact = np.abs(wide(x).astype(np.float64) @ wide(words).astype(np.float64).T)
    unit = 2.0**-24
    summed = n * unit / (1 - n * unit) * magnitude + words.shape[1] * 2.0**-126
    return summed + 2.0**-8 * (exact + summed) + 2.0**-134


SHAPES = [(1, 1), (7, 100), (5, 64), (130, 576), (9, 4160), (33, 5000), (64, 2048), (3, 14336)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_the_same_from_every_codec_and_number_of_threads(
    shape: tuple[int, int], isa: str
) -> None:
    rng = np.random.default_rng(shape[0])
    words, x = gaussian(rng, *shape), gaussian(rng, 70, shape[1], scale=1.0)
    matrices = [packed(codec, words) for codec in CODECS]
    engine = ENGINES[isa, 1]
    assert engine.isa == isa
    whole = multiply(engine, matrices[0], x)
    exact = wide(x).astype(np.float64) @ wide(words).astype(np.float64).T
    assert (np.abs(wide(whole) - exact) <= bound(words, x)).all()
    for threads in (1, 2):
        for matrix in matrices:
            assert np.array_equal(multiply(ENGINES[isa, threads], matrix, x), whole)
    # Alone, and with any number of neighbours: every count up to 9, and some beyond.
    for count in (*range(1, 10), 16, 17, 23, 24, 25):
        for matrix in matrices:
            assert np.array_equal(multiply(engine, matrix, x[:count]), whole[:count])
            assert np.array_equal(multiply(engine, matrix, x[-count:]), whole[-count:])


@pytest.mark.parametrize("threads", [3, 5])
def test_each_piece_is_computed_once_however_many_threads_share_them(threads: int) -> None:
    """Fewer pieces than threads, as many, shares of unequal size, and pieces left for others."""
    rng = np.random.default_rng(threads)
    shared, alone = _core.Engine(threads=threads), _core.Engine(threads=1)
    for rows in (1, 31, 32, 33, 64, 96, 128, 160, 161, 1000, 4099):
        matrix, x = packed("rank3", gaussian(rng, rows, 600)), gaussian(rng, 1, 600)
        expected = multiply(alone, matrix, x)
        for _ in range(20):  # whoever comes first
            assert np.array_equal(multiply(shared, matrix, x), expected)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 700),
    count=st.integers(1, 30),
    group=st.sampled_from([(0, 0), (4, 64), (8, 128), (12, 576), (4, 2048), (32, 256)]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_geometry_gives_the_same_bits(
    rows: int, columns: int, count: int, group: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    words, x = gaussian(rng, rows, columns), gaussian(rng, count, columns, scale=1.0)
    for isa in ISAS:
        expected = multiply(ENGINES[isa, 1], packed("raw", words), x)
        for codec in CODECS[:-1]:
            matrix = packed(codec, words, row_group=group[0], k_tile=group[1])
            assert np.array_equal(multiply(ENGINES[isa, 2], matrix, x), expected)


def test_all_instruction_sets_but_bf16_agree_to_the_bit() -> None:
    rng = np.random.default_rng(3)
    words, x = gaussian(rng, 37, 2048), gaussian(rng, 7, 2048, scale=1.0)
    results = [
        multiply(ENGINES[isa, 1], packed("rank3", words), x) for isa in ISAS if isa != "avx512bf16"
    ]
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS[:-1])
@pytest.mark.parametrize("escapes", ["few", "many", "in bursts"])
def test_escapes_in_any_number_and_place_give_the_same_bits(
    codec: str, isa: str, escapes: str
) -> None:
    rng = np.random.default_rng(11)
    words, x = gaussian(rng, 12, 2048), gaussian(rng, 6, 2048, scale=1.0)
    rare = {"few": 0.002, "many": 1.0, "in bursts": 0.3}[escapes]
    hit = rng.random(words.shape) < rare
    if escapes == "in bursts":
        hit &= (np.arange(2048) // 96) % 5 == 0
    exponents = rng.integers(90, 150, words.shape, dtype=np.uint16)
    words[hit] = (words[hit] & 0x807F) | (exponents[hit] << 7)
    for count in (1, 2, 3, 6):
        expected = multiply(ENGINES[isa, 1], packed("raw", words), x[:count])
        assert np.array_equal(multiply(ENGINES[isa, 1], packed(codec, words), x[:count]), expected)


def test_one_flipped_bit_of_one_weight_is_seen() -> None:
    rng = np.random.default_rng(4)
    words, x = gaussian(rng, 8, 2048), gaussian(rng, 1, 2048, scale=1.0)
    changed = words.copy()
    changed[5, 1000] ^= 0x0080
    for isa in ISAS:
        before, after = (
            multiply(ENGINES[isa, 1], packed("rank223", w), x) for w in (words, changed)
        )
        assert list(np.flatnonzero(before != after)) == [5]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_not_finite_stays_in_its_row_and_padding_adds_nothing(codec: str, isa: str) -> None:
    rng = np.random.default_rng(5)
    words, x = gaussian(rng, 6, 70), gaussian(rng, 2, 70, scale=1.0)
    words[1, 3], words[2, 69], words[3, :] = 0x7F80, 0x7FC1, 0x7F80
    words[4, :] = 0x8000
    result = wide(multiply(ENGINES[isa, 1], packed(codec, words), x))
    assert np.isinf(result[:, 1]).all()
    assert np.isnan(result[:, 2]).all()
    assert not np.isfinite(result[:, 3]).any()
    assert (result[:, 4] == 0).all()
    assert np.isfinite(result[:, [0, 5]]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS[:-1])
def test_a_block_of_infinities_does_not_meet_its_padding(codec: str, isa: str) -> None:
    words = np.full((4, 70), 0x7F80, np.uint16)
    x = bf16(np.ones((5, 70)))
    for count in (1, 5):
        result = wide(multiply(ENGINES[isa, 1], packed(codec, words), x[:count]))
        assert np.isposinf(result).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_bias_is_added_before_the_only_rounding(isa: str) -> None:
    rng = np.random.default_rng(6)
    words, x, bias = gaussian(rng, 50, 64), gaussian(rng, 3, 64, scale=1.0), gaussian(rng, 50)
    result = wide(multiply(ENGINES[isa, 1], packed("rank3", words), x, bias))
    exact = wide(x).astype(np.float64) @ wide(words).astype(np.float64).T + wide(bias)
    assert (np.abs(result - exact) <= bound(words, x) + 2.0**-8 * np.abs(wide(bias))).all()


@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_an_embedding_are_decoded_alone(codec: str) -> None:
    rng = np.random.default_rng(7)
    words = rng.integers(0, 1 << 16, (301, 130), dtype=np.uint16)
    ids = rng.integers(0, 301, 50)
    matrix = packed(codec, words)
    for isa in ISAS:
        out = np.zeros((50, 130), np.uint16)
        ENGINES[isa, 2].decode_rows(matrix, ids.ctypes.data, 50, out.ctypes.data, 130)
        assert np.array_equal(out, words[ids])
    with pytest.raises(ValueError, match="row 301"):
        ENGINES[ISAS[0], 1].decode_rows(
            matrix, np.array([301]).ctypes.data, 1, out.ctypes.data, 130
        )


def silu(gate: np.ndarray) -> np.ndarray:
    return gate / (1 + np.exp(-gate))


@pytest.mark.parametrize("isa", ISAS)
def test_a_gated_block_rounds_once_between_its_products(isa: str) -> None:
    rng = np.random.default_rng(8)
    gate, up, down = gaussian(rng, 200, 96), gaussian(rng, 200, 96), gaussian(rng, 96, 200)
    matrices = [packed("rank3", gate), packed("raw", up), packed("rank223", down)]
    x = gaussian(rng, 9, 96, scale=1.0)
    engine = ENGINES[isa, 2]

    def run(columns: np.ndarray) -> np.ndarray:
        out = np.zeros((len(columns), 96), np.uint16)
        engine.gated(
            *matrices,
            _core.Gate.silu,
            columns.ctypes.data,
            96,
            len(columns),
            out.ctypes.data,
            96,
        )
        return out

    wide_x = wide(x).astype(np.float64)
    inner = silu(wide_x @ wide(gate).T.astype(np.float64)) * (wide_x @ wide(up).T)
    exact = wide(bf16(inner)).astype(np.float64) @ wide(down).T
    result = run(x)
    assert np.abs(wide(result) - exact).max() <= 0.01 * np.abs(exact).max()
    for i in range(9):
        assert np.array_equal(run(x[i : i + 1])[0], result[i])


def test_a_matrix_that_is_not_what_its_planes_say_is_refused() -> None:
    rng = np.random.default_rng(9)
    encoded = _core.encode("rank223", gaussian(rng, 64, 256))
    kwargs = {"row_group": encoded.row_group, "k_tile": encoded.k_tile}
    with pytest.raises(_core_error()):
        _core.PackedMatrix("rank223", encoded.extents, rows=60, columns=256, **kwargs)
    with pytest.raises(ValueError, match="zstd"):
        _core.PackedMatrix("zstd", encoded.extents, rows=64, columns=256, **kwargs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS[:-1])
def test_forged_codes_are_refused_while_multiplying(codec: str, isa: str) -> None:
    rng = np.random.default_rng(10)
    encoded = _core.encode(codec, gaussian(rng, 64, 256), allow_raw=False)
    x = gaussian(rng, 5, 256)
    refused = 0
    for _ in range(40):
        codes = encoded.extents[1].copy()
        codes[rng.integers(0, 64 * 256 // 8 * {"rank223": 2, "rank3": 3, "rank4": 4}[codec])] ^= 255
        try:
            matrix = _core.PackedMatrix(
                codec,
                (encoded.extents[0], codes),
                rows=64,
                columns=256,
                row_group=encoded.row_group,
                k_tile=encoded.k_tile,
            )
            multiply(ENGINES[isa, 2], matrix, x[: 1 + 4 * (refused % 2)])
        except _core_error() as error:
            refused += 1
            assert "block" in str(error)  # noqa: PT017
    assert refused > 10  # not all flips change how many escapes there are


def _core_error() -> type[Exception]:
    from zipmoe._errors import CorruptError  # noqa: PLC0415

    return CorruptError
