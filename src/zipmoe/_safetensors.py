"""The safetensors container: bytes of a header → tensors and their places. Knows nothing of models.

Both a checkpoint's shards and a store's are such files. Every length is checked before it is used.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_HEADER_BYTES = 100_000_000

# dtype name: (id in a store's index, numpy dtype that carries its bits)
DTYPES: dict[str, tuple[int, np.dtype[Any]]] = {
    "BF16": (1, np.dtype("<u2")),
    "F16": (2, np.dtype("<f2")),
    "F32": (3, np.dtype("<f4")),
    "F64": (4, np.dtype("<f8")),
    "F8_E4M3": (5, np.dtype("u1")),
    "F8_E5M2": (6, np.dtype("u1")),
    "I8": (7, np.dtype("i1")),
    "I16": (8, np.dtype("<i2")),
    "I32": (9, np.dtype("<i4")),
    "I64": (10, np.dtype("<i8")),
    "U8": (11, np.dtype("u1")),
    "U16": (12, np.dtype("<u2")),
    "U32": (13, np.dtype("<u4")),
    "U64": (14, np.dtype("<u8")),
    "BOOL": (15, np.dtype("u1")),
}


class HeaderError(Exception):
    """A safetensors header that breaks a rule. Callers turn it into an error of their own tree."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of a shard. `start` and `stop` are offsets in the file, not in its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Its length in bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. `text` is its JSON as it stands in the file, spaces included."""

    text: bytes
    tensors: tuple[TensorPlace, ...]  # in file order
    metadata: dict[str, str]

    @property
    def data_start(self) -> int:
        """Offset of the first byte of data."""
        return 8 + len(self.text)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object and refuse a key that occurs twice (`object_pairs_hook`)."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise HeaderError(f"key {twice!r} occurs twice")
    return found


def read_exactly(fd: int, num_bytes: int, offset: int) -> bytes:
    """Read `num_bytes` at `offset`; HeaderError where the file ends before."""
    chunks = []
    while num_bytes:
        chunk = os.pread(fd, min(num_bytes, 1 << 24), offset)
        if not chunk:
            raise HeaderError(f"the file ends at {offset}, {num_bytes} bytes too early")
        chunks.append(chunk)
        num_bytes -= len(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def read_header(fd: int, file_bytes: int) -> Header:
    """Read and check the header of a safetensors file of `file_bytes` bytes."""
    return parse_header(read_header_text(fd, file_bytes), file_bytes)


def read_header_text(fd: int, file_bytes: int) -> bytes:
    """Read the header's JSON, its length checked against the limit and the file."""
    if file_bytes < 8:
        raise HeaderError(f"{file_bytes} bytes are too few for a safetensors file")
    length = int.from_bytes(read_exactly(fd, 8, 0), "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"header length {length} is over the limit of {MAX_HEADER_BYTES}")
    if 8 + length > file_bytes:
        raise HeaderError(f"header length {length} does not fit in a file of {file_bytes} bytes")
    return read_exactly(fd, length, 8)


def parse_header(text: bytes, file_bytes: int) -> Header:
    """Check a header's JSON against the length of its file."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise HeaderError("the header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise HeaderError("__metadata__ is not an object")
    data_start = 8 + len(text)
    places = [_place(name, entry, data_start) for name, entry in content.items()]
    places.sort(key=lambda place: (place.start, place.stop))
    end = data_start
    for place in places:
        if place.start != end:
            raise HeaderError(
                f"tensor {place.name!r} begins at {place.start} where {end} is expected: "
                "tensors must lie one after the other without gap or overlap"
            )
        end = place.stop
    if end != file_bytes:
        raise HeaderError(f"the tensors end at {end} and the file at {file_bytes}")
    return Header(text, tuple(places), metadata)


def _place(name: str, entry: Any, data_start: int) -> TensorPlace:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise HeaderError(f"tensor {name!r} has an impossible shape or data_offsets")
    num_bytes = math.prod(shape) * DTYPES[dtype][1].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise HeaderError(
            f"tensor {name!r} of shape {shape} and dtype {dtype} takes {num_bytes} bytes, "
            f"its data_offsets say {offsets[1] - offsets[0]}"
        )
    return TensorPlace(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_counts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(v) is int and 0 <= v < 1 << 62 for v in values)
    )
