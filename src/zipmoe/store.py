"""The store on disk: the only reader of the format. numpy only; nothing is given out unverified.

`open_store` checks the manifest, the presence and length of every file, the SHA-256 of the small
ones and headers and indexes of the shards. Records are checked as they are read.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash

from zipmoe import _core, _index
from zipmoe._errors import CorruptError, FetchError, MismatchError
from zipmoe._folder import file_errors, read_manifest, read_verified
from zipmoe._index import CODECS, INTEGER_BITS, ITEM_BYTES, NOBODY, PAGE, ceil_to
from zipmoe._lossy import LOSSLESS_BITS
from zipmoe._safetensors import DTYPES, TensorPlace
from zipmoe._shard import OpenShard, as_matrix, open_shard
from zipmoe._source import SOURCE, Source
from zipmoe.recipe import ROLES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from numpy.typing import NDArray

    from zipmoe._manifest import Layer, Manifest

__all__ = ["DenseTensor", "Store", "open_store"]

PLANES = ("sign-mantissa", "exponent")
INTEGER_PLANES = ("codes", "scales")
DTYPE_NAMES = {number: name for name, (number, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor of the checkpoint that is no routed expert's weight."""

    name: str
    dtype: str  # as in safetensors
    shape: tuple[int, ...]
    codec: str
    stored_bytes: int  # padding included
    decoded_bytes: int
    plane_bytes: tuple[int, int]  # sign-mantissa and exponents, without padding


@dataclass(frozen=True)
class PackedRecord:
    """A matrix as the store has it: verified, not decoded."""

    codec: str
    planes: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    rows: int
    columns: int
    row_group: int
    k_tile: int


@dataclass(frozen=True)
class PackedPlace:
    """Where a dense tensor lies. `offsets`: of its planes, bytes from the start of the file."""

    path: str
    tensor: str
    offsets: tuple[int, int]
    planes: tuple[str, str] = PLANES


class Store:
    """An open store. Close it, or use it in a `with` statement."""

    def __init__(self, path: Path, manifest: Manifest, shards: list[OpenShard]) -> None:
        """Use `open_store`, which checks what it gives."""
        self.path, self.manifest, self.shards = path, manifest, shards
        self._dense = {
            place.name: (shard, int(row))
            for shard in shards
            if shard.info.kind == "dense"
            for place, row in zip(shard.records, _first_rows(shard), strict=True)
        }

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Modules with routed experts, in the model's order."""
        return self.manifest.layers

    @property
    def dtype(self) -> str:
        """Name the dtype that transformers loads it in by itself."""
        return self.manifest.model["dtype"]

    @property
    def expert_shards(self) -> list[OpenShard]:
        """Shards of experts, in order."""
        return [shard for shard in self.shards if shard.info.kind == "experts"]

    @cached_property
    def source(self) -> Source:
        """What leads back to the checkpoint; read and verified at first use."""
        info = next((f for f in self.manifest.files if f.name == SOURCE), None)
        if info is None:
            raise CorruptError("the manifest does not list it", file=SOURCE)
        return Source.parse(read_verified(self.path, info))

    def expert_table(self) -> tuple[list[str], NDArray[np.uint64]]:
        """Paths of the expert shards and one row of 16 numbers per matrix, as ExpertCache wants."""
        paths, tables = [], [np.zeros((0, 16), np.uint64)]
        for number, shard in enumerate(self.expert_shards):
            entries = shard.entries
            table = np.zeros((len(entries), 16), np.uint64)
            for column, name in enumerate(("layer", "expert", "matrix")):
                table[:, column] = entries[name]
            table[:, 3] = number
            table[:, 4], table[:, 5] = entries["codec"], ITEM_BYTES[entries["dtype"]]
            for column, name in enumerate(("rows", "columns", "row_group", "k_tile"), 6):
                table[:, column] = entries[name]
            table[:, 10:] = entries["extents"][:, :2].reshape(-1, 6)
            paths.append(shard.path)
            tables.append(table)
        return paths, np.concatenate(tables)

    def expert_dtypes(self, layer: int) -> tuple[str, ...]:
        """Name the dtype of each matrix of a layer's experts (the first expert's)."""
        for shard in self.expert_shards:
            rows = shard.entries[shard.entries["layer"] == layer]
            if len(rows):
                first = rows[rows["expert"] == rows["expert"][0]]
                return tuple(DTYPE_NAMES[int(number)] for number in first["dtype"])
        return ()

    def dense_tensors(self) -> list[DenseTensor]:
        """List the dense tensors, in order of name."""
        shapes = self._dense_shapes
        found = []
        for name, (shard, row) in self._dense.items():
            entry = shard.entries[row]
            found.append(
                DenseTensor(
                    name,
                    DTYPE_NAMES[int(entry["dtype"])],
                    shapes[name],
                    CODECS[entry["codec"]],
                    int(ceil_to(entry["extents"][:2, 1], PAGE).sum()),
                    decoded_bytes(entry),
                    (int(entry["extents"][0][1]), int(entry["extents"][1][1])),
                )
            )
        return found

    @cached_property
    def _dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, each proven to fit its entry."""
        places = self.source.places()
        shapes = {}
        for name, (shard, row) in self._dense.items():
            entry = shard.entries[row]
            place = places[name][1] if name in places else None
            if place is None or (
                as_matrix(place.shape) != (entry["rows"], entry["columns"])
                or place.dtype != DTYPE_NAMES[int(entry["dtype"])]
            ):
                raise CorruptError(
                    "source.json and the index disagree on it", file=shard.info.name, tensor=name
                )
            shapes[name] = place.shape
        return shapes

    def decoded_bytes(self, kind: str) -> int:
        """Bytes that all "experts" or all "dense" weights take when they are decoded."""
        shards = [shard for shard in self.shards if shard.info.kind == kind]
        return sum(decoded_bytes(entry) for shard in shards for entry in shard.entries)

    def read_dense(self, name: str, *, threads: int = 1) -> NDArray[Any]:
        """Read, verify and decode a dense tensor.

        Its elements carry the bits of the dtype: BF16 as uint16, float8 and BOOL as uint8.

        Raises
        ------
        CorruptError
            The bytes are not those that were packed.
        FetchError
            They could not be read.
        """
        shard, row = self._dense[name]
        return self.read_matrix(shard, row, threads=threads).reshape(self._dense_shapes[name])

    def read_packed(self, name: str) -> PackedRecord:
        """Read and verify a dense tensor, without decoding it. Raises as `read_dense`."""
        shard, row = self._dense[name]
        entry = shard.entries[row]
        return PackedRecord(
            CODECS[entry["codec"]],
            (read_extent(shard, row, 0), read_extent(shard, row, 1)),
            *(int(entry[key]) for key in ("rows", "columns", "row_group", "k_tile")),
        )

    def packed_place(self, name: str) -> PackedPlace:
        """Say where a dense tensor lies, for those who read parts of it."""
        shard, row = self._dense[name]
        offsets = shard.entries[row]["extents"][:, 0]
        return PackedPlace(shard.path, name, (int(offsets[0]), int(offsets[1])))

    def expert_records(self) -> Iterator[tuple[int, int, OpenShard, range]]:
        """Layer, expert, shard and rows of the index of every expert, in order."""
        for shard in self.expert_shards:
            starts = [*_first_rows(shard), len(shard.entries)]
            for start, stop in pairwise(starts):
                entry = shard.entries[start]
                yield int(entry["layer"]), int(entry["expert"]), shard, range(start, stop)

    def read_matrix(self, shard: OpenShard, row: int, *, threads: int = 1) -> NDArray[Any]:
        """Read, verify and decode the matrix [rows, columns] of one row of a shard's index."""
        entry = shard.entries[row]
        planes = (read_extent(shard, row, 0), read_extent(shard, row, 1))
        shape = int(entry["rows"]), int(entry["columns"])
        carrier = DTYPES[DTYPE_NAMES[int(entry["dtype"])]][1]
        if entry["codec"] == 0:
            return planes[0].view(carrier).reshape(shape)
        out = np.empty(shape, carrier)
        try:
            _core.decode(
                CODECS[entry["codec"]],
                planes,
                out,
                row_group=int(entry["row_group"]),
                k_tile=int(entry["k_tile"]),
                threads=threads,
            )
        except CorruptError as error:
            raise CorruptError(error.reason, **place_of(shard, row, 1)) from error
        return out

    def close(self) -> None:
        """Close the files. Idempotent."""
        while self.shards:
            os.close(self.shards.pop().fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store and check everything but its records.

    Raises
    ------
    FormatError
        Not a store, an unfinished one, or one of another version.
    CorruptError
        A file is missing, has another length, or does not have its checksum.
    MismatchError
        The folder holds a file that does not belong to the store.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for error in file_errors(folder, manifest):
        raise error
    for info in manifest.files:
        if info.name != SOURCE:  # verified when it is read
            read_verified(folder, info, keep=False)
    with ExitStack() as undo:
        shards: list[OpenShard] = []
        for shard in manifest.shards:
            shards.append(open_shard(folder, shard))
            undo.callback(os.close, shards[-1].fd)
        store = assemble(folder, manifest, shards)
        undo.pop_all()
        return store


def assemble(folder: Path, manifest: Manifest, shards: list[OpenShard]) -> Store:
    """Make a store of open shards, which must hold exactly what the manifest says."""
    _check_records(manifest, shards)
    return Store(folder, manifest, shards)


def read_extent(shard: OpenShard, row: int, plane: int) -> NDArray[np.uint8]:
    """Read one extent, verified together with its padding, which is not given out."""
    return read_padded(shard, row, plane)[: int(shard.entries[row]["extents"][plane][1])]


def read_padded(shard: OpenShard, row: int, plane: int) -> NDArray[np.uint8]:
    """Read one extent and its padding, and check their checksum."""
    offset, length, expected = (int(value) for value in shard.entries[row]["extents"][plane])
    buffer = np.empty(int(ceil_to(length, PAGE)), np.uint8)
    if not fill(shard.fd, shard.path, offset, buffer):
        raise CorruptError("the file ends too early", **place_of(shard, row, plane))
    if length and xxhash.xxh3_64_intdigest(buffer.data) != expected:
        raise CorruptError("wrong checksum", **place_of(shard, row, plane))
    return buffer


def fill(fd: int, path: str, offset: int, buffer: NDArray[np.uint8]) -> bool:
    """Read a whole buffer, however little the system gives at once; False: the file ends before.

    Raises
    ------
    FetchError
        The system cannot read it.
    """
    done = 0
    while done < buffer.size:
        try:
            got = os.preadv(fd, [buffer[done:].data], offset + done)
        except OSError as error:
            raise FetchError(
                f"cannot read {path} at {offset + done}: {error.strerror}",
                path=path,
                offset=offset + done,
                errno=error.errno or 0,
            ) from error
        if got == 0:
            return False
        done += got
    return True


def place_of(shard: OpenShard, row: int, plane: int) -> dict[str, Any]:
    """Name an extent, as CorruptError's keywords."""
    entry = shard.entries[row]
    dense = entry["layer"] == NOBODY
    tensor = shard.records[int(entry["record"])].name
    is_integer = CODECS[entry["codec"]] in INTEGER_BITS
    return {
        "file": shard.info.name,
        "tensor": tensor if dense else f"{tensor}.{_index.ROLES[entry['role']]}",
        "layer": None if dense else int(entry["layer"]),
        "expert": None if dense else int(entry["expert"]),
        "plane": (INTEGER_PLANES if is_integer else PLANES)[plane],
        "offset": int(entry["extents"][plane][0]),
    }


def _first_rows(shard: OpenShard) -> list[int]:
    return [int(row) for row in np.flatnonzero(shard.entries["matrix"] == 0)]


def decoded_bytes(entry: Any) -> int:
    """Bytes of the decoded matrix of an index entry."""
    return int(entry["rows"]) * int(entry["columns"]) * int(ITEM_BYTES[entry["dtype"]])


def _check_records(manifest: Manifest, shards: list[OpenShard]) -> None:
    """Shards must hold exactly the experts of the manifest's layers, in order, and dense ones."""
    experts = [shard for shard in shards if shard.info.kind == "experts"]
    expected = iter(
        (f"{layer.module}.{expert}", number, expert, layer)
        for number, layer in enumerate(manifest.layers)
        for expert in range(layer.experts)
    )
    for shard in experts:
        starts = [*_first_rows(shard), len(shard.entries)]
        for place, start, stop in zip(shard.records, starts, starts[1:], strict=False):
            wanted = next(expected, None)
            _check_expert(wanted, shard, place, shard.entries[start:stop])
            _check_bits(manifest, shard, place, shard.entries[start:stop])
    if (missing := next(expected, None)) is not None:
        raise MismatchError(f"no shard of the store holds {missing[0]}")
    names: list[str] = []
    for shard in shards:
        if shard.info.kind == "dense":
            if len(shard.entries) != len(shard.records) or (shard.entries["layer"] != NOBODY).any():
                raise CorruptError("a dense shard holds experts", file=shard.info.name)
            names += [place.name for place in shard.records]
    if names != sorted(set(names), key=str.encode):
        raise CorruptError("the dense tensors are not in order of name", file=shards[0].info.name)


def _check_expert(
    wanted: tuple[str, int, int, Layer] | None,
    shard: OpenShard,
    place: TensorPlace,
    entries: NDArray[Any],
) -> None:
    found = [(e["layer"], e["expert"], e["role"], e["rows"], e["columns"]) for e in entries]
    if wanted is not None and place.name == wanted[0]:
        _, number, expert, layer = wanted
        described = [
            (number, expert, ROLES.index(m.role), m.rows, m.columns) for m in layer.matrices
        ]
        if found == described:
            return
    raise MismatchError(
        f"{shard.info.name} holds {place.name} where the manifest has "
        f"{wanted[0] if wanted else 'nothing'}, or in another shape"
    )


def _check_bits(
    manifest: Manifest, shard: OpenShard, place: TensorPlace, entries: NDArray[Any]
) -> None:
    """Refuse an expert of other bits than the manifest says: nothing is lossy unsaid."""
    lossy = manifest.lossy
    layer, expert = int(entries[0]["layer"]), int(entries[0]["expert"])
    said = lossy.bits[layer][expert] if lossy else LOSSLESS_BITS
    found = {INTEGER_BITS.get(CODECS[entry["codec"]], LOSSLESS_BITS) for entry in entries}
    if found != {said}:
        raise MismatchError(
            f"{shard.info.name}: {place.name} has {min(found)} bits where the manifest says {said}"
        )
