"""The index of a store's shard: bytes ↔ entries, with every rule of docs/format.md that binds them.

Pure: no file. `check` proves that entries describe exactly the records of their shard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from zipmoe._errors import CorruptError, FormatError
from zipmoe._safetensors import DTYPES, TensorPlace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["CODECS", "ENTRY", "INDEX_NAME", "NOBODY", "ceil_to", "check", "dump", "parse"]

INDEX_NAME = "zipmoe.index"
MAGIC = b"ZIPMOEIX"
VERSION = (0, 1)
PAGE = 4096
NOBODY = 0xFFFFFFFF  # layer and expert of a dense record
LOSSLESS = ("raw", "rank223", "rank3", "rank4", "zstd", "lz4hc")
INTEGER_BITS = {"int8": 8, "int4": 4, "int2": 2}  # lossy
CODECS = (*LOSSLESS, *INTEGER_BITS)  # by id
LAYOUT = 1
ROLES = ("gate", "up", "down", "dense")
MAX_INDEX_BYTES = 1 << 30
MAX_EXPERTS = 65_536
MAX_WEIGHTS = 1 << 40
MAX_RECORD_BYTES = 64 << 30

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u2", 2),
        ("entry_bytes", "<u4"),
        ("count", "<u8"),
        ("records", "<u8"),
        ("reserved", "<u8", 4),
    ]
)
ENTRY = np.dtype(
    [
        ("record", "<u4"),
        ("matrix", "<u2"),
        ("dtype", "u1"),
        ("flags", "u1"),
        ("layer", "<u4"),
        ("expert", "<u4"),
        ("codec", "<u2"),
        ("layout", "<u2"),
        ("rows", "<u4"),
        ("columns", "<u4"),
        ("row_group", "<u4"),
        ("k_tile", "<u4"),
        ("role", "<u4"),
        ("reserved0", "<u8"),
        ("extents", "<u8", (3, 3)),  # offset, length, xxh3
        ("reserved1", "<u8"),
    ]
)
assert HEADER.itemsize == 64
assert ENTRY.itemsize == 128

CODE_BITS = np.full(65_536, 8, np.uint64)  # of extent 0 for each weight, by codec id
IS_INTEGER = np.zeros(65_536, bool)
for _codec, _bits in INTEGER_BITS.items():
    CODE_BITS[CODECS.index(_codec)] = _bits
    IS_INTEGER[CODECS.index(_codec)] = True

ITEM_BYTES = np.zeros(256, np.uint64)  # by dtype id; 0 where there is no such dtype
for _number, _carrier in DTYPES.values():
    ITEM_BYTES[_number] = _carrier.itemsize


def ceil_to(value: Any, unit: int) -> Any:
    """Round up to a multiple of `unit` (numbers or arrays)."""
    return (value + (unit - 1)) // unit * unit


def dump(entries: NDArray[Any], num_records: int) -> bytes:
    """Give the bytes of an index."""
    header = np.zeros((), HEADER)
    header["magic"], header["version"] = MAGIC, VERSION
    header["entry_bytes"], header["count"] = ENTRY.itemsize, len(entries)
    header["records"] = num_records
    body = header.tobytes() + entries.tobytes()
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def parse(data: bytes, *, checksum: int, num_records: int, file: str) -> NDArray[Any]:
    """Read the entries of an index whose trailer must be `checksum` (from the manifest)."""
    if len(data) < HEADER.itemsize + 8:
        raise CorruptError("the index is too short", file=file, tensor=INDEX_NAME)
    trailer = int.from_bytes(data[-8:], "little")
    if xxhash.xxh3_64_intdigest(data[:-8]) != trailer or trailer != checksum:
        raise CorruptError("the index does not have its checksum", file=file, tensor=INDEX_NAME)
    header = np.frombuffer(data, HEADER, 1)[0]
    if header["magic"] != MAGIC or tuple(header["version"]) != VERSION:
        raise FormatError(f"{file}: an index of another format or version")
    entries = np.frombuffer(data[HEADER.itemsize : -8], np.uint8)
    if (
        header["entry_bytes"] != ENTRY.itemsize
        or int(header["count"]) * ENTRY.itemsize != len(entries)
        or header["records"] != num_records
        or header["reserved"].any()
    ):
        raise CorruptError("the index has a wrong header", file=file, tensor=INDEX_NAME)
    return entries.view(ENTRY)


def check(entries: NDArray[Any], records: Sequence[TensorPlace], *, file: str) -> None:
    """Refuse entries that do not describe exactly `records`, the shard's tensors in order."""
    names = [record.name for record in records]
    verdict = _Verdict(entries, names, file)
    verdict.need(entries["record"] < len(records), "the record does not exist")
    first = np.ones(len(entries), bool)
    first[1:] = entries["record"][1:] != entries["record"][:-1]
    ordinals = entries["record"][first]
    if len(ordinals) != len(records) or (ordinals != np.arange(len(records))).any():
        raise CorruptError("the index does not list every record in order", file=file)
    since = np.arange(len(entries)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    verdict.need(entries["matrix"] == since, "the matrices are not in order")
    verdict.need(~_reserved(entries), "a reserved field is not zero")
    _check_fields(entries, verdict, file)
    _check_places(entries, records, first, verdict)


def _reserved(entries: NDArray[Any]) -> NDArray[np.bool_]:
    return (
        (entries["flags"] != 0)
        | (entries["reserved0"] != 0)
        | (entries["reserved1"] != 0)
        | entries["extents"][:, 2].any(axis=1)
    )


def _check_fields(entries: NDArray[Any], verdict: _Verdict, file: str) -> None:
    unknown = entries["codec"][entries["codec"] >= len(CODECS)]
    if len(unknown):
        raise FormatError(f"{file}: codec id {unknown[0]} is unknown to this zipmoe")
    raw = entries["codec"] == 0
    verdict.need(entries["layout"] == LAYOUT, "the codec's layout version is unknown")
    verdict.need(ITEM_BYTES[entries["dtype"]] > 0, "the dtype is unknown")
    verdict.need(raw | (entries["dtype"] == 1), "only BF16 can be coded")
    verdict.need(entries["role"] < len(ROLES), "the role is unknown")
    dense = entries["layer"] == NOBODY
    verdict.need(~(dense ^ (entries["expert"] == NOBODY)), "it is neither expert nor dense")
    verdict.need(~(dense ^ (entries["role"] == ROLES.index("dense"))), "the role is wrong")
    limit = dense | ((entries["layer"] < MAX_EXPERTS) & (entries["expert"] < MAX_EXPERTS))
    verdict.need(limit, "the layer or expert number is over the limit")
    small = (entries["rows"] < 1 << 31) & (entries["columns"] < 1 << 31)
    verdict.need(small, "rows or columns are over the limit")
    weights = entries["rows"].astype(np.uint64) * entries["columns"]
    verdict.need(weights <= MAX_WEIGHTS, "the matrix is over the limit")
    group, tile = (entries[name].astype(np.uint64) for name in ("row_group", "k_tile"))
    blocks = (group % 4 == 0) & (tile % 64 == 0) & (group > 0) & (tile > 0)
    blocks &= group * tile <= 8192
    verdict.need(
        np.where(raw, (group == 0) & (tile == 0), blocks), "the block geometry is impossible"
    )
    _check_lengths(entries, weights, verdict)


def _check_lengths(entries: NDArray[Any], weights: NDArray[np.uint64], verdict: _Verdict) -> None:
    raw, integer = entries["codec"] == 0, IS_INTEGER[entries["codec"]]
    verdict.need(~integer | (entries["layer"] != NOBODY), "only experts can be stored as integers")
    padded = _padded_weights(entries)
    coded = padded * CODE_BITS[entries["codec"]] // np.uint64(8)
    plane = np.where(raw, weights * ITEM_BYTES[entries["dtype"]], coded)
    first, second = entries["extents"][:, 0, 1], entries["extents"][:, 1, 1]
    verdict.need(first == plane, "extent 0 has a wrong length")
    rows = ceil_to(entries["rows"].astype(np.uint64), 4) * (entries["columns"] > 0)
    scales = (second == 2 * rows) | (second == padded // 32)
    verdict.need(~raw | (second == 0), "extent 1 has a wrong length")
    verdict.need(~integer | scales, "extent 1 has a wrong length")


def _padded_weights(entries: NDArray[Any]) -> NDArray[np.uint64]:
    """Weights of a coded matrix, padding included: blocks are cut to multiples of 4 and 64."""
    rows = ceil_to(entries["rows"].astype(np.uint64), 4)
    return rows * ceil_to(entries["columns"].astype(np.uint64), 64)


def _check_places(
    entries: NDArray[Any],
    records: Sequence[TensorPlace],
    first: NDArray[np.bool_],
    verdict: _Verdict,
) -> None:
    """Extents must follow each other without gap from their record's start to its end."""
    offsets, lengths, sums = (entries["extents"][:, :2, i] for i in range(3))
    verdict.need((lengths <= MAX_RECORD_BYTES).all(axis=1), "an extent is over the limit")
    starts = np.array([record.start for record in records], np.uint64)
    stops = np.array([record.stop for record in records], np.uint64)
    padded = ceil_to(lengths, PAGE)
    middle = offsets[:, 0] + padded[:, 0]
    ends = middle + padded[:, 1]
    begins = np.empty_like(ends)
    begins[1:] = ends[:-1]
    begins[first] = starts
    verdict.need(offsets[:, 0] == begins, "extent 0 is not in its place")
    verdict.need(offsets[:, 1] == middle, "extent 1 is not in its place")
    last = np.append(first[1:], True)[: len(first)]
    wrong = np.ones(len(entries), bool)
    wrong[last] = ends[last] == stops
    verdict.need(wrong, "the extents do not fill their record")
    verdict.need(((lengths > 0) | (sums == 0)).all(axis=1), "an empty extent has a checksum")


class _Verdict:
    """Turns the first entry that breaks a rule into an error that names it."""

    def __init__(self, entries: NDArray[Any], names: list[str], file: str) -> None:
        self._entries, self._names, self._file = entries, names, file

    def need(self, rule: Any, broken: str) -> None:
        if rule.all():
            return
        entry = self._entries[int(np.argmin(rule))]
        record = int(entry["record"])
        dense = entry["layer"] == NOBODY
        raise CorruptError(
            f"index: {broken}",
            file=self._file,
            tensor=self._names[record] if record < len(self._names) else None,
            layer=None if dense else int(entry["layer"]),
            expert=None if dense else int(entry["expert"]),
        )
