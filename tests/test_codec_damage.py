"""Bytes that are no coding of a matrix raise CorruptError, and nothing else happens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import weights as w

from zipmoe import _core
from zipmoe._errors import CorruptError

CODECS = ["raw", "rank223", "rank3", "rank4", "zstd", "lz4hc"]
RANKS = CODECS[1:4]
ISAS = [isa for isa in _core.available_isas() if isa != "avx512bf16"]  # products only
SHAPE = (37, 300)


def coded_matrix(codec):
    coded = _core.encode(codec, w.student_t(SHAPE), allow_raw=False)
    return coded, [extent.copy() for extent in coded.extents]


def decode(coded, extents, *, shape=SHAPE, isa="", row_group=None, k_tile=None):
    """Decode into the middle of a guarded array; the guard must stay, whatever is raised."""
    page = np.full((shape[0] + 2, shape[1] + 8), 0xAAAA, np.uint16)
    out = page[1:-1, 4:-4]
    try:
        _core.decode(
            coded.codec,
            tuple(extents),
            out,
            row_group=coded.row_group if row_group is None else row_group,
            k_tile=coded.k_tile if k_tile is None else k_tile,
            isa=isa,
        )
        return out.copy()
    finally:
        out[:] = 0xAAAA
        assert (page == 0xAAAA).all()


def refusal(coded, extents, **options):
    try:
        decode(coded, extents, **options)
    except CorruptError as error:
        return error
    return None


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
def test_wrong_lengths_are_refused(codec, isa):
    coded, extents = coded_matrix(codec)
    for plane, name in ((0, "sign-mantissa"), (1, "exponent")):
        size = extents[plane].size
        for length in {0, 1, max(size - 1, 0), size + 1} - {size}:
            changed = list(extents)
            changed[plane] = np.resize(extents[plane], length)
            with pytest.raises(CorruptError) as caught:
                decode(coded, changed, isa=isa)
            assert caught.value.plane == name
            assert name in str(caught.value)


@pytest.mark.parametrize("codec", CODECS)
def test_a_matrix_of_another_shape_is_refused(codec):
    coded, extents = coded_matrix(codec)
    for shape in ((33, 300), (37, 400), (0, 300), (400, 3000)):
        with pytest.raises(CorruptError):
            decode(coded, extents, shape=shape)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(2**31, 0), (2**31, 4), (2**21, 2**21)])
def test_a_matrix_beyond_the_limits_is_refused(codec, shape):
    _, extents = coded_matrix(codec)
    # All rows are one in memory: nothing may be written, so it does not matter.
    row = np.zeros((1, max(shape[1], 1)), np.uint16)
    out = np.lib.stride_tricks.as_strided(row, shape, (0, 2))
    with pytest.raises(CorruptError, match="limits"):
        _core.decode(codec, tuple(extents), out, row_group=4, k_tile=64)


@pytest.mark.parametrize("codec", CODECS[1:])
@pytest.mark.parametrize("pair", [(0, 0), (6, 64), (4, 96), (8, 2048), (4, 2**31), (2**31, 64)])
def test_a_pair_that_breaks_the_rules_is_refused(codec, pair):
    coded, extents = coded_matrix(codec)
    with pytest.raises(CorruptError, match="not allowed"):
        decode(coded, extents, row_group=pair[0], k_tile=pair[1])


def section_starts(codec, weights, blocks):
    """Starts of codes, tables, offsets and variable part, as docs/format.md section 7.2."""
    bits, table = {"rank223": (2, 16), "rank3": (3, 8), "rank4": (4, 16)}[codec]
    starts = [0]
    for length in (weights * bits // 8, table * blocks, 4 * (blocks + 1)):
        starts.append(-(-(starts[-1] + length) // 64) * 64)
    return starts


def damaged(extents, position, value):
    exponent = extents[1].copy()
    exponent[position] = value
    return [extents[0], exponent]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", RANKS)
def test_each_rule_of_the_rank_codecs_is_checked(codec, isa):
    coded, extents = coded_matrix(codec)
    blocks = 2  # row groups of 24 and 13 rows
    assert (coded.row_group, coded.k_tile) == (24, 320)
    _, tables, offsets, variable = section_starts(codec, 40 * 320, blocks)
    wounds = {
        "a gap": damaged(extents, offsets - 1, 1),
        "the guard": damaged(extents, -1, 1),
        "the first offset": damaged(extents, offsets, 1),
        "offsets out of order": damaged(extents, offsets + 7, 255),
        "the last offset": damaged(extents, offsets + 8, extents[1][offsets + 8] ^ 1),
        "an offset moved": damaged(extents, offsets + 4, extents[1][offsets + 4] ^ 1),
        "a table's last entry": damaged(
            extents, tables + {"rank223": 3, "rank3": 7, "rank4": 15}[codec], 99
        ),
        "escapes only": damaged(extents, slice(0, 64), 0xFF),
    }
    if codec == "rank223":
        n2 = int(extents[1][variable : variable + 2].view(np.uint16)[0])
        assert n2 % 64
        wounds |= {
            "level 2's table": damaged(extents, tables + 7, 99),
            "level 3's table": damaged(extents, tables + 15, 99),
            "n2": damaged(extents, variable, (n2 & 255) ^ 1),
            "n2 far off": damaged(extents, variable + 1, 255),
            "n3": damaged(extents, variable + 2, extents[1][variable + 2] ^ 1),
            "n3 above n2": damaged(extents, variable + 3, 255),
            "codes behind the last": damaged(extents, variable + 4 + n2 // 64 * 16 + 15, 0xC0),
        }
    assert decode(coded, extents, isa=isa) is not None
    for rule, broken in wounds.items():
        error = refusal(coded, broken, isa=isa)
        assert error is not None, f"{rule} was accepted"
        assert error.plane == "exponent"


@pytest.mark.parametrize("codec", ["zstd", "lz4hc"])
def test_each_rule_of_the_sharded_codecs_is_checked(codec):
    coded, extents = coded_matrix(codec)
    wounds = {
        "no shards": damaged(extents, slice(0, 4), 0),
        "too many shards": damaged(extents, 0, 65),
        "another number of shards": damaged(extents, 0, 2),
        "a reserved field": damaged(extents, 4, 1),
        "a length of plane": damaged(extents, 8, extents[1][8] ^ 64),
        "a ragged length of plane": damaged(extents, 8, extents[1][8] ^ 1),
        "a length of data": damaged(extents, 12, extents[1][12] ^ 1),
        "a huge length of data": damaged(extents, 15, 255),
        "the table's padding": damaged(extents, 63, 1),
        "the data": damaged(extents, slice(64, 96), 0xFF),
    }
    assert decode(coded, extents) is not None
    for rule, broken in wounds.items():
        error = refusal(coded, broken)
        assert error is not None, f"{rule} was accepted"
        assert error.plane == "exponent"


@pytest.mark.parametrize("codec", CODECS[1:])
def test_random_damage_is_refused_or_the_same_everywhere(codec):
    coded, extents = coded_matrix(codec)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        exponent = extents[1].copy()
        for position in rng.integers(0, exponent.size, rng.integers(1, 4)):
            exponent[position] = rng.integers(0, 256)
        results = []
        for isa in ISAS:
            try:
                results.append(decode(coded, [extents[0], exponent], isa=isa).tobytes())
            except CorruptError:
                results.append(None)
        assert len(set(results)) == 1
        refused += results[0] is None
    assert refused > 10


@pytest.mark.soak
def test_damage_never_leads_out_of_bounds(tmp_path, soak_record):
    """Build the core and tests/fuzz_codec.cpp with sanitizers and run it."""
    root, build = Path(__file__).resolve().parent.parent, tmp_path / "build"
    cmake = shutil.which("cmake") or Path(sys.executable).with_name("cmake")
    configure = [cmake, "-S", root, "-B", build, "-DZIPMOE_SANITIZE=ON"]
    configure += ["-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run([cmake, "--build", build, "--target", "fuzz_codec"], check=True)
    run = [build / "fuzz_codec", "300000", str(soak_record.seed)]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    counts = json.loads(done.stdout)
    assert counts["rounds"] == 300000
    assert min(counts["refused"], counts["accepted"]) > 50000
    soak_record("damaged matrices under AddressSanitizer", **counts)
