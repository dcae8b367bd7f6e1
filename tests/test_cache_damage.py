"""No byte is ever decoded from a record that is not what its checksums promise."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from synthetic_shards import flip_bit, make_shards

from zipmoe import _core
from zipmoe._errors import CorruptError

READERS = ["io_uring", "pread"]
PLANES = ["sign-mantissa", "exponent"]


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path, layers=2, experts=3)


@pytest.mark.parametrize("plane", [0, 1])
@pytest.mark.parametrize("matrix", [0, 1, 2])
@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_names_its_place_and_nothing_is_decoded(shards, reader, matrix, plane):
    cache = shards.open(slots=2, reader=reader, policy="lru")
    path = shards.paths[1]
    row = shards.row(1, 2, matrix)
    offset, length = int(row[10 + 3 * plane]), int(row[11 + 3 * plane])
    padded = -(-length // 4096) * 4096
    assert length % 4096, "the last place must be padding"
    for place, bit in ((0, 0), (length - 1, 7), (padded - 1, 3)):
        flip_bit(path, offset + place, bit)
        for asked in (0, 1, 2):  # any matrix of the record, the sound ones too
            out = np.full_like(shards.weights[1, 2, asked], 123)
            with pytest.raises(CorruptError, match=f"matrix {matrix} ") as error:
                cache.decode(1, 2, asked, out)
            found = error.value
            assert (found.file, found.layer, found.expert) == (path, 1, 2)
            assert (found.plane, found.offset) == (PLANES[plane], offset)
            assert (out == 123).all()
        shards.check_expert(cache, 1, 1)
        flip_bit(path, offset + place, bit)
        for expert in (2, 0, 1):  # the last two push the first out again
            shards.check_expert(cache, 1, expert)
    assert cache.counters()["read_errors"] == 3 * 3 * 2  # each read was tried twice
    cache.close()


def test_damage_to_a_prefetched_expert_surfaces_when_it_is_used(shards):
    flip_bit(shards.paths[0], shards.record(0, 1)[1])
    cache = shards.open(slots=3)
    cache.prefetch(0, [0, 1, 2])
    shards.check_expert(cache, 0, 2)
    with pytest.raises(CorruptError) as error:
        cache.decode(0, 1, 0, np.zeros_like(shards.weights[0, 1, 0]))
    assert (error.value.layer, error.value.expert) == (0, 1)
    shards.check_expert(cache, 0, 0)
    cache.close()


def test_a_failed_prefetch_is_tried_again_when_listed_again(shards):
    path, offset, _ = shards.record(0, 1)
    flip_bit(path, offset)
    cache = shards.open(slots=2)
    cache.prefetch(0, [1])
    deadline = time.monotonic() + 30
    while cache.counters()["read_errors"] < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    flip_bit(path, offset)
    cache.prefetch(0, [1])
    shards.check_expert(cache, 0, 1)
    assert cache.counters()["read_errors"] == 2
    cache.close()


def test_swapped_records_are_corrupt(tmp_path):
    shards = make_shards(tmp_path, layers=1, experts=3, codec="raw")
    path, first, length = shards.record(0, 0)
    _, second, same = shards.record(0, 1)
    assert length == same
    content = bytearray(Path(path).read_bytes())
    content[first : first + length], content[second : second + length] = (
        content[second : second + length],
        content[first : first + length],
    )
    Path(path).write_bytes(content)
    cache = shards.open(slots=2)
    for expert in (0, 1):
        with pytest.raises(CorruptError, match="checksum") as error:
            cache.decode(0, expert, 0, np.zeros_like(shards.weights[0, expert, 0]))
        assert error.value.expert == expert
    shards.check_expert(cache, 0, 2)
    cache.close()


def test_swapped_records_with_forged_checksums_change_the_weights(tmp_path):
    # Proves that the checksums are what refused them, and nothing else would have.
    shards = make_shards(tmp_path, layers=1, experts=2, codec="raw")
    forged = shards.table.copy()
    forged[:3, 10:], forged[3:, 10:] = shards.table[3:, 10:], shards.table[:3, 10:]
    cache = _core.ExpertCache(shards.paths, forged, capacity_bytes=1 << 30)
    for matrix in range(3):
        out = np.zeros_like(shards.weights[0, 0, matrix])
        cache.decode(0, 0, matrix, out)
        np.testing.assert_array_equal(out, shards.weights[0, 1, matrix])
        assert (out != shards.weights[0, 0, matrix]).any()
    cache.close()


def test_a_wrong_checksum_in_the_table_is_corrupt_too(shards):
    shards.row(0, 0, 1)[12] ^= np.uint64(1)  # expert 0's matrix 1, sign-mantissa
    shards.row(0, 1, 2)[15] ^= np.uint64(1 << 63)  # expert 1's matrix 2, exponent
    cache = shards.open(slots=2)
    for expert, plane in ((0, "sign-mantissa"), (1, "exponent")):
        with pytest.raises(CorruptError) as error:
            cache.decode(0, expert, 0, np.zeros_like(shards.weights[0, expert, 0]))
        assert (error.value.expert, error.value.plane) == (expert, plane)
    shards.check_expert(cache, 0, 2)
    cache.close()


def test_a_record_outside_its_file_is_refused_at_once(shards):
    path, offset, length = shards.record(1, 2)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: offset + length - 1])
    with pytest.raises(CorruptError, match="truncated") as error:
        shards.open()
    assert (error.value.file, error.value.layer, error.value.expert) == (path, 1, 2)


def test_verified_bytes_that_are_no_valid_coding_are_corrupt(shards):
    # The checksum is right and the content is not: a writer's fault, found by the decoder.
    row = shards.row(0, 1, 0)
    path, offset, length = shards.paths[0], int(row[13]), int(row[14])
    with Path(path).open("r+b") as file:
        file.seek(offset)
        padded = bytes([255]) * length + bytes(-length % 4096)
        file.write(padded)
    row[15] = _core.xxh3(padded)
    cache = shards.open(slots=2)
    with pytest.raises(CorruptError, match=r"matrix 0 \(gate\)") as error:
        cache.decode(0, 1, 0, np.zeros_like(shards.weights[0, 1, 0]))
    found = error.value
    assert (found.file, found.layer, found.expert) == (path, 0, 1)
    assert (found.plane, found.offset) == ("exponent", offset)
    shards.check(cache, 0, 1, 1)
    shards.check_expert(cache, 0, 2)
    cache.close()
