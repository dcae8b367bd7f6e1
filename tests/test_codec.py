"""Every codec restores every bit of every matrix."""

from __future__ import annotations

import numpy as np
import pytest

from zipmoe import _core

CODECS = ["raw", "rank223", "rank3", "rank4", "zstd", "lz4hc"]


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("codec", CODECS)
def test_all_65536_patterns_come_back(codec, isa):
    weights = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    coded = _core.encode(codec, weights, isa=isa, allow_raw=False)
    out = np.empty_like(weights)
    _core.decode(codec, coded.extents, out, row_group=coded.row_group, k_tile=coded.k_tile, isa=isa)
    np.testing.assert_array_equal(out, weights)
