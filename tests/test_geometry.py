"""zipmoe's choice of blocks, as docs/format.md section 5 says."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zipmoe import _core


def ceil_to(n, unit):
    return ceil(n / unit) * unit


@settings(derandomize=True, max_examples=300)
@given(rows=st.integers(1, 200_000), columns=st.integers(1, 200_000))
def test_the_pair_follows_the_formula_and_the_rules(rows, columns):
    row_group, k_tile = _core.geometry(rows, columns)
    padded = ceil_to(columns, 64)
    tiles = ceil(padded / 2048)
    assert k_tile == ceil_to(ceil(padded / tiles), 64)
    assert row_group == min(4 * (8192 // (4 * k_tile)), ceil_to(rows, 4))
    assert row_group % 4 == 0
    assert k_tile % 64 == 0
    assert 0 < row_group * k_tile <= 8192


@pytest.mark.parametrize(
    ("shape", "pair"),
    [
        ((1408, 2048), (4, 2048)),
        ((2048, 1408), (4, 1408)),
        ((1536, 576), (12, 576)),
        ((576, 1536), (4, 1536)),
        ((14336, 4096), (4, 2048)),
        ((4096, 14336), (4, 2048)),
        ((5, 4100), (4, 1408)),
        ((3, 5), (4, 64)),
        ((1, 1), (4, 64)),
        ((500, 64), (128, 64)),
        ((0, 7), (4, 64)),
        ((7, 0), (4, 64)),
    ],
)
def test_known_shapes(shape, pair):
    assert _core.geometry(*shape) == pair


@pytest.mark.parametrize("shape", [(2**31, 1), (1, 2**31), (2**21, 2**21)])
def test_what_is_beyond_the_limits_is_refused(shape):
    with pytest.raises(ValueError, match="limits"):
        _core.geometry(*shape)


def test_negative_sides_are_refused():
    with pytest.raises(TypeError):
        _core.geometry(-1, 5)
