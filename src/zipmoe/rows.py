"""Rows of a matrix that stays on the drive: an embedding, of which a token needs a single row.

Where memory is short it is better spent on experts. The record is read and verified once, when a
model is loaded; its tables stay, and a checksum of every row group, 4 rows as a rule. From then on
a row costs one read for each part of its group, verified again before it is decoded.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from zipmoe import _core
from zipmoe._errors import CorruptError
from zipmoe._index import ceil_to
from zipmoe.store import fill

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from zipmoe.store import PackedPlace, PackedRecord

__all__ = ["DriveRows"]

_ALIGNMENT = 64
_GUARD = 64


class _Part(NamedTuple):
    """A part of one plane: bytes begin to end."""

    plane: int
    begin: int
    end: int


class DriveRows:
    """Rows of one dense matrix of a store, read when they are asked for.

    A matrix of a rank codec or raw; safe to use from several threads; `close` gives the file back.
    """

    def __init__(self, place: PackedPlace, record: PackedRecord) -> None:
        self.codec, self.columns = record.codec, record.columns
        self._place, self._rows = place, record.rows
        self._is_raw = record.codec == "raw"
        self._group = 4 if self._is_raw else record.row_group
        self._tile = record.k_tile
        self._num_groups = -(-record.rows // self._group)
        self._tiles = 0 if self._is_raw else -(-record.columns // record.k_tile)
        self._width = int(ceil_to(record.columns, 64))  # of all tiles: only the last one is padded
        if not self._is_raw:
            self._read_tables(record.planes[1])
        groups = range(self._num_groups)
        sums = (self._sum(self._cut(record.planes, group)) for group in groups)
        self._sums = np.fromiter(sums, np.uint64, self._num_groups)
        self._fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    @staticmethod
    def resident_bytes(rows: int, columns: int) -> int:
        """Memory that is needed all the time, at most: a checksum and tables of each group."""
        return -(-rows // 4) * (8 + 20 * -(-columns // 2048))

    def read(self, rows: Iterable[int]) -> NDArray[np.uint16]:
        """BF16 bits of these rows [len(rows), columns].

        Raises
        ------
        IndexError
            There is no such row.
        CorruptError, FetchError
            What lies on the drive is not what was verified at loading, or could not be read.
        """
        wanted = [int(row) for row in rows]
        for row in wanted:
            if not 0 <= row < self._rows:
                raise IndexError(f"row {row} of a matrix of {self._rows} rows")
        out = np.empty((len(wanted), self.columns), np.uint16)
        groups = dict.fromkeys(row // self._group for row in wanted)
        for group in groups:  # all reads are under way before the first is waited for
            for part in self._parts(group):
                offset = self._place.offsets[part.plane] + part.begin
                os.posix_fadvise(self._fd, offset, part.end - part.begin, os.POSIX_FADV_WILLNEED)
        decoded = {group: self._decode(group) for group in groups}
        for at, row in enumerate(wanted):
            out[at] = decoded[row // self._group][row % self._group]
        return out

    def close(self) -> None:
        """Give the file back. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_tables(self, plane: NDArray[np.uint8]) -> None:
        """Keep the parts of plane 1 that are small: docs/format.md section 7.2."""
        blocks = self._num_groups * self._tiles
        layout = _core.rank_layout(
            self.codec, self._rows, self.columns, row_group=self._group, k_tile=self._tile
        )
        self._bits, table_bytes, tables_at, offsets_at, self._variable_at = layout
        tables = plane[tables_at : tables_at + table_bytes * blocks]
        self._tables = tables.reshape(self._num_groups, -1).copy()
        self._offsets = plane[offsets_at : offsets_at + 4 * (blocks + 1)].view("<u4").copy()

    def _first_weight(self, group: int) -> int:
        """Weights before a row group, padding included."""
        rows = min(group * self._group, int(ceil_to(self._rows, 4)))
        return rows * self._width

    def _real_rows(self, group: int) -> int:
        return min(self._group, self._rows - group * self._group)

    def _parts(self, group: int) -> list[_Part]:
        if self._is_raw:
            begin = group * self._group * self.columns * 2
            return [_Part(0, begin, begin + self._real_rows(group) * self.columns * 2)]
        first, end = self._first_weight(group), self._first_weight(group + 1)
        low, high = (int(self._offsets[g * self._tiles]) for g in (group, group + 1))
        return [
            _Part(0, first, end),
            _Part(1, first // 8 * self._bits, end // 8 * self._bits),
            _Part(1, self._variable_at + low, self._variable_at + high),
        ]

    def _cut(self, planes: tuple[NDArray[np.uint8], ...], group: int) -> list[NDArray[np.uint8]]:
        return [planes[part.plane][part.begin : part.end] for part in self._parts(group)]

    @staticmethod
    def _sum(parts: list[NDArray[np.uint8]]) -> int:
        state = xxhash.xxh3_64()
        for part in parts:
            state.update(part.data)
        return state.intdigest()

    def _decode(self, group: int) -> NDArray[np.uint16]:
        parts = [self._read_part(part) for part in self._parts(group)]
        if self._sum(parts) != int(self._sums[group]):
            raise self._corrupt(self._parts(group)[0], "the rows are not those verified at loading")
        rows = self._real_rows(group)
        if self._is_raw:
            return parts[0].view(np.uint16).reshape(rows, self.columns)
        out = np.empty((rows, self.columns), np.uint16)
        planes = (parts[0], self._small_plane(group, *parts[1:]))
        _core.decode(self.codec, planes, out, row_group=self._group, k_tile=self._tile)
        return out

    def _small_plane(
        self, group: int, codes: NDArray[np.uint8], variable: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Plane 1 of a matrix that has this row group only."""
        at = group * self._tiles
        offsets = self._offsets[at : at + self._tiles + 1] - self._offsets[at]
        sections = (codes, self._tables[group], offsets.view(np.uint8))
        gaps = [bytes(-section.size % _ALIGNMENT) for section in sections]
        pieces = [piece for pair in zip(sections, gaps, strict=True) for piece in pair]
        joined = b"".join([*map(bytes, pieces), variable.tobytes(), bytes(_GUARD)])
        return np.frombuffer(joined, np.uint8)

    def _read_part(self, part: _Part) -> NDArray[np.uint8]:
        out = np.empty(part.end - part.begin, np.uint8)
        offset = self._place.offsets[part.plane] + part.begin
        if not fill(self._fd, self._place.path, offset, out):
            raise self._corrupt(part, "the file ends too early")
        return out

    def _corrupt(self, part: _Part, why: str) -> CorruptError:
        return CorruptError(
            why,
            file=os.path.basename(self._place.path),  # noqa: PTH119  a name, as elsewhere
            tensor=self._place.tensor,
            plane=self._place.planes[part.plane],
            offset=self._place.offsets[part.plane] + part.begin,
        )
