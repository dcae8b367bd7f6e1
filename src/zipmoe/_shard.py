"""A store's shard: planned, written record by record, and opened again with every check.

Knows the container and the index, not what the bytes of an extent mean.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from zipmoe import _index
from zipmoe._disk import sync_folder, write_all
from zipmoe._errors import CorruptError, FetchError, MismatchError
from zipmoe._index import ENTRY, INDEX_NAME, PAGE, ceil_to
from zipmoe._manifest import FORMAT_VERSION, ShardInfo
from zipmoe._safetensors import (
    DTYPES,
    HeaderError,
    TensorPlace,
    parse_header,
    read_exactly,
    read_header_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = [
    "CodedMatrix",
    "MatrixPlan",
    "OpenShard",
    "RecordPlan",
    "ShardPlan",
    "ShardWriter",
    "as_matrix",
    "open_shard",
    "plan_shards",
]

MAX_SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 50_000_000  # well under the 100 MB that safetensors readers accept
METADATA = {"format": "zipmoe", "format_version": FORMAT_VERSION}
_ZEROS = bytes(PAGE)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a dense tensor of this shape (docs/format.md section 8)."""
    *leading, columns = shape or (1,)
    return math.prod(leading), columns


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """A matrix to be stored. `role` is that of the index: gate, up, down or dense."""

    role: str
    dtype: str
    rows: int
    columns: int

    @property
    def raw_bytes(self) -> int:
        """Its length as it is."""
        return self.rows * self.columns * DTYPES[self.dtype][1].itemsize


@dataclass(frozen=True, slots=True)
class RecordPlan:
    """A record to be written: one expert of one layer, or one dense tensor."""

    name: str
    matrices: tuple[MatrixPlan, ...]
    layer: int = _index.NOBODY
    expert: int = _index.NOBODY

    @property
    def raw_bytes(self) -> int:
        """Its weights as they are."""
        return sum(matrix.raw_bytes for matrix in self.matrices)

    @property
    def most_bytes(self) -> int:
        """The most it can take in a shard: raw, padded."""
        return sum(int(ceil_to(matrix.raw_bytes, PAGE)) for matrix in self.matrices)

    @property
    def header_bytes(self) -> int:
        """The most its entry can take in the header: three numbers of at most 13 digits."""
        return (
            len(json.dumps(self.name)) + len('{"dtype":"U8","shape":[],"data_offsets":[,]},:') + 39
        )


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A shard to be written, its data beginning at `data_start`."""

    name: str
    kind: str  # "experts" or "dense"
    records: tuple[RecordPlan, ...]
    data_start: int

    @property
    def most_bytes(self) -> int:
        """The most that the file can take."""
        matrices = sum(len(record.matrices) for record in self.records)
        index = 72 + matrices * ENTRY.itemsize
        return self.data_start + sum(record.most_bytes for record in self.records) + index


def plan_shards(kind: str, records: Sequence[RecordPlan]) -> list[ShardPlan]:
    """Cut records into shards so that none can pass 5 GB, unless one record does alone."""
    groups: list[list[RecordPlan]] = []
    room = header_room = 0
    for record in records:
        need = record.most_bytes + record.header_bytes + len(record.matrices) * ENTRY.itemsize
        if not groups or need > room or record.header_bytes > header_room:
            groups.append([])
            room, header_room = MAX_SHARD_BYTES - 2 * PAGE, MAX_HEADER_BYTES
        groups[-1].append(record)
        room -= need
        header_room -= record.header_bytes
    plans = []
    for number, group in enumerate(groups, 1):
        text = sum(record.header_bytes for record in group) + len(_header_text(group, [], 0)) + 120
        start = int(ceil_to(8 + text, PAGE))
        plans.append(ShardPlan(f"{kind}-{number:05d}.safetensors", kind, tuple(group), start))
    return plans


def _header_text(records: Sequence[RecordPlan], ends: Sequence[int], index_bytes: int) -> str:
    """JSON of a header; `ends[i]` is where record i ends in the data section."""
    content: dict[str, Any] = {"__metadata__": METADATA}
    start = 0
    for record, end in zip(records, ends, strict=False):
        content[record.name] = _tensor(start, end)
        start = end
    content[INDEX_NAME] = _tensor(start, start + index_bytes)
    return json.dumps(content, separators=(",", ":"))


def _tensor(start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """A matrix ready to be written: its coding and its two extents with their checksums."""

    codec: str
    row_group: int
    k_tile: int
    extents: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    sums: tuple[int, int]

    @staticmethod
    def of(
        codec: str,
        geometry: tuple[int, int],
        extents: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    ) -> CodedMatrix:
        """Compute the checksums, padding included."""
        sums = (_padded_sum(extents[0]), _padded_sum(extents[1]))
        return CodedMatrix(codec, *geometry, extents, sums)


def _padded_sum(extent: NDArray[np.uint8]) -> int:
    if not extent.size:
        return 0
    state = xxhash.xxh3_64(extent.data)
    state.update(_padding(extent.size))
    return state.intdigest()


def _padding(length: int) -> bytes:
    return _ZEROS[: -length % PAGE]


class ShardWriter:
    """Writes one shard from front to back. Header and index come last, so order is all it needs."""

    def __init__(self, folder: Path, plan: ShardPlan, done: Sequence[NDArray[Any]] = ()) -> None:
        """`done`: entries of the leading records that the file already holds."""
        self.plan = plan
        self._entries = list(done)
        self._fd = os.open(folder / plan.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = self._end_of(done[-1]) if done else plan.data_start
        there = os.fstat(self._fd).st_size
        if done and there < self._end:
            self.close()
            raise MismatchError(
                f"{folder / plan.name} has {there} bytes where the journal says {self._end}: "
                "it was changed since; delete the folder and pack again"
            )
        os.ftruncate(self._fd, self._end)
        if not done:
            sync_folder(folder)  # the journal may only speak of files that keep their name

    @staticmethod
    def _end_of(entries: NDArray[Any]) -> int:
        offset, length, _ = (int(value) for value in entries[-1]["extents"][1])
        return int(ceil_to(offset + length, PAGE))

    def append(self, matrices: Sequence[CodedMatrix]) -> NDArray[Any]:
        """Write the next record; returns its index entries."""
        ordinal = len(self._entries)
        plan = self.plan.records[ordinal]
        entries = np.zeros(len(matrices), ENTRY)
        buffers: list[Any] = []
        end = self._end
        for number, (matrix, shape) in enumerate(zip(matrices, plan.matrices, strict=True)):
            entry = entries[number]
            entry["record"], entry["matrix"] = ordinal, number
            entry["dtype"], entry["layout"] = DTYPES[shape.dtype][0], _index.LAYOUT
            entry["layer"], entry["expert"] = plan.layer, plan.expert
            entry["codec"] = _index.CODECS.index(matrix.codec)
            entry["rows"], entry["columns"] = shape.rows, shape.columns
            entry["row_group"], entry["k_tile"] = matrix.row_group, matrix.k_tile
            entry["role"] = _index.ROLES.index(shape.role)
            for plane, (extent, total) in enumerate(zip(matrix.extents, matrix.sums, strict=True)):
                entry["extents"][plane] = end, extent.size, total
                end += int(ceil_to(extent.size, PAGE))
                buffers += [extent.data, _padding(extent.size)]
        write_all(self._fd, buffers, self._end)
        self._end = end
        self._entries.append(entries)
        return entries

    def sync(self) -> None:
        """Wait until all that was appended is on the disk."""
        os.fdatasync(self._fd)

    def finish(self) -> ShardInfo:
        """Write index and header, and wait until they are on the disk."""
        entries = np.concatenate(self._entries) if self._entries else np.zeros(0, ENTRY)
        index = _index.dump(entries, len(self.plan.records))
        write_all(self._fd, [index], self._end)
        start = self.plan.data_start
        ends = [self._end_of(record) - start for record in self._entries]
        text = _header_text(self.plan.records, ends, len(index)).encode()
        if 8 + len(text) > start:
            raise AssertionError(f"{self.plan.name}: the header outgrew its reserve")
        header = (start - 8).to_bytes(8, "little") + text.ljust(start - 8)
        write_all(self._fd, [header], 0)
        os.fsync(self._fd)
        return ShardInfo(
            self.plan.name,
            self._end + len(index),
            self.plan.kind,
            xxhash.xxh3_64_intdigest(header),
            int.from_bytes(index[-8:], "little"),
        )

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard of a store, its header and index proven."""

    info: ShardInfo
    path: str
    fd: int
    records: tuple[TensorPlace, ...]
    entries: NDArray[Any]  # ENTRY
    data_start: int


def open_shard(folder: Path, info: ShardInfo) -> OpenShard:
    """Open a shard and check its header and index against their checksums and each other."""
    path = str(folder / info.name)
    fd = -1
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return _open(fd, path, info)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if isinstance(error, HeaderError):
            raise CorruptError(str(error), file=info.name) from error
        if isinstance(error, OSError):
            reason = f"cannot read {path}: {error.strerror}"
            raise FetchError(reason, path=path, errno=error.errno or 0) from error
        raise


def _open(fd: int, path: str, info: ShardInfo) -> OpenShard:
    text = read_header_text(fd, info.num_bytes)
    start = 8 + len(text)
    whole = (start - 8).to_bytes(8, "little") + text
    if xxhash.xxh3_64_intdigest(whole) != info.header_xxh3:
        raise CorruptError("the header does not have its checksum", file=info.name, offset=0)
    header = parse_header(text, info.num_bytes)
    if start % PAGE or header.metadata != METADATA:
        raise CorruptError("the header is not that of a store's shard", file=info.name, offset=0)
    for place in header.tensors:
        if place.dtype != "U8" or len(place.shape) != 1:
            raise CorruptError("a record is not plain bytes", file=info.name, tensor=place.name)
    if not header.tensors or header.tensors[-1].name != INDEX_NAME:
        raise CorruptError("the last tensor is not the index", file=info.name)
    *records, index = header.tensors
    for place in records:
        if place.num_bytes % PAGE or place.num_bytes > _index.MAX_RECORD_BYTES:
            raise CorruptError("a record has a wrong length", file=info.name, tensor=place.name)
    if index.num_bytes > _index.MAX_INDEX_BYTES:
        raise CorruptError("the index is over the limit", file=info.name, tensor=INDEX_NAME)
    data = read_exactly(fd, index.num_bytes, index.start)
    entries = _index.parse(data, checksum=info.index_xxh3, num_records=len(records), file=info.name)
    _index.check(entries, records, file=info.name)
    return OpenShard(info, path, fd, tuple(records), entries, start)
