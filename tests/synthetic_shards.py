"""Small expert shards made with numpy and the core's own encoders: what the cache's tests read."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from zipmoe import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
HEADER = 2 * PAGE  # stands for the safetensors header
TAIL = 1000  # stands for the index: a shard's length is no multiple of anything
CODEC_IDS = {"raw": 0, "rank223": 1, "rank3": 2, "rank4": 3, "zstd": 4, "lz4hc": 5}
COLUMNS = [
    *("layer", "expert", "matrix", "shard", "codec", "element_bytes", "rows", "columns"),
    *("row_group", "k_tile", "offset0", "length0", "xxh3_0", "offset1", "length1", "xxh3_1"),
]


@contextmanager
def skipping_without_io_uring() -> Iterator[None]:
    """Skip the test where a cache cannot have that reader: containers often forbid io_uring."""
    try:
        yield
    except ValueError as error:
        if "io_uring does not work here" not in str(error):
            raise
        pytest.skip(str(error))


@dataclass
class Shards:
    """Files, the table that describes them, and what they hold."""

    paths: list[str]
    table: np.ndarray
    weights: dict[tuple[int, int, int], np.ndarray] = field(repr=False)

    def row(self, layer: int, expert: int, matrix: int) -> np.ndarray:
        """The table's row, a view: writing to it changes the table."""
        key = (self.table[:, :3] == (layer, expert, matrix)).all(axis=1)
        return self.table[np.flatnonzero(key)[0]]

    def record(self, layer: int, expert: int) -> tuple[str, int, int]:
        """File, offset and length of a record."""
        rows = self.table[(self.table[:, :2] == (layer, expert)).all(axis=1)]
        first, last = rows[0], rows[-1]
        end = int(last[13]) + _padded(int(last[14]))
        return self.paths[int(first[3])], int(first[10]), end - int(first[10])

    def planes(self, layer: int, expert: int) -> tuple[int, int]:
        """Length of each plane of a record, all matrices together, padding included."""
        rows = self.table[(self.table[:, :2] == (layer, expert)).all(axis=1)]
        first, second = (sum(_padded(int(row[column])) for row in rows) for column in (11, 14))
        return first, second

    def record_bytes(self) -> int:
        """Length of the largest record."""
        return max(self.record(int(r[0]), int(r[1]))[2] for r in self.table)

    def capacity(self, slots: int) -> int:
        """A capacity that fits exactly this many slots."""
        two = _core.ExpertCache.floor_bytes(self.table)
        return two + (slots - 2) * (self.record_bytes() + PAGE // 8)

    def open(self, *, slots: int = 4, reader: str = "", **options: object) -> _core.ExpertCache:
        """A cache over them; with `tiers`, of these. Skips the test where there is no io_uring."""
        capacity = 1 << 30 if "tiers" in options else self.capacity(slots)
        options = {"capacity_bytes": capacity, **options}
        with skipping_without_io_uring():
            return _core.ExpertCache(self.paths, self.table, reader=reader, **options)

    def check(self, cache: _core.ExpertCache, layer: int, expert: int, matrix: int) -> None:
        """Decode one matrix and compare it with what was packed."""
        wanted = self.weights[layer, expert, matrix]
        out = np.full_like(wanted, 1)
        cache.decode(layer, expert, matrix, out)
        np.testing.assert_array_equal(out, wanted)

    def check_expert(self, cache: _core.ExpertCache, layer: int, expert: int) -> None:
        """Decode a whole expert and compare."""
        for key in sorted(self.weights):
            if key[:2] == (layer, expert):
                self.check(cache, *key)


def _padded(length: int) -> int:
    return -(-length // PAGE) * PAGE


def gaussian(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """BF16 bits of Gaussian weights."""
    values = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def make_shards(
    folder: Path,
    *,
    layers: int = 2,
    experts: int = 6,
    shapes: tuple[tuple[int, int], ...] = ((24, 200), (24, 200), (200, 24)),
    codec: str = "rank3",
    dtype: type = np.uint16,
    seed: int = 0,
) -> Shards:
    """One shard per layer. A dtype other than uint16 (BF16) is stored raw."""
    rng = np.random.default_rng(seed)
    shards = Shards([], np.empty((0, 16), np.uint64), {})
    rows = []
    for layer in range(layers):
        path = folder / f"experts-{layer + 1:05}.safetensors"
        with path.open("wb") as file:
            file.write(bytes(HEADER))
            for expert in range(experts):
                for matrix, shape in enumerate(shapes):
                    weights = gaussian(rng, *shape)
                    if dtype is not np.uint16:
                        weights = rng.integers(0, 127, shape).astype(dtype)
                    shards.weights[layer, expert, matrix] = weights
                    place = [layer, expert, matrix, layer]
                    rows.append(place + _write_matrix(file, weights, codec))
            file.write(bytes(TAIL))
        shards.paths.append(str(path))
    shards.table = np.array(rows, np.uint64)
    return shards


def _write_matrix(file, weights: np.ndarray, codec: str) -> list[int]:
    if weights.dtype == np.uint16 and codec != "raw":
        coded = _core.encode(codec, weights, allow_raw=False)
        extents = [extent.tobytes() for extent in coded.extents]
        geometry = [coded.row_group, coded.k_tile]
    else:
        codec, extents, geometry = "raw", [weights.tobytes(), b""], [0, 0]
    numbers = [CODEC_IDS[codec], weights.itemsize, *weights.shape, *geometry]
    for extent in extents:
        padded = extent.ljust(_padded(len(extent)), b"\0")
        numbers += [file.tell(), len(extent), _core.xxh3(padded) if padded else 0]
        file.write(padded)
    return numbers


def flip_bit(path: str, offset: int, bit: int = 0) -> None:
    """Damage one bit of a file."""
    with Path(path).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))
