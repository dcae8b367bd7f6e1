"""A store → the checkpoint's files again, byte for byte, each proven by its SHA-256.

Files are written under temporary names and renamed when they have been read back and proven.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipmoe._disk import typed_write_errors, write_all
from zipmoe._errors import CorruptError, LossyError, MismatchError, SpaceError
from zipmoe._hashing import hash_shard
from zipmoe._lossy import LOSSLESS_BITS
from zipmoe._source import SOURCE, SourceFile, prove_recipes
from zipmoe.checkpoint import Shard
from zipmoe.recipe import SliceKey, restore
from zipmoe.store import Store, open_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from zipmoe._lossy import Lossy
    from zipmoe._safetensors import TensorPlace

__all__ = ["UnpackReport", "unpack_store"]

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class UnpackReport:
    """What was restored. Everything in it has been checked against its SHA-256."""

    files: int
    tensors: int
    total_bytes: int
    seconds: float
    left_out: list[str]  # names of files that the store never held
    changed_tensors: int = 0  # of a lossy store: those with experts that are not the original ones


def unpack_store(
    store: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    lossy: bool = False,
) -> UnpackReport:
    """Restore a checkpoint into a new or empty folder.

    `progress` is called with bytes done and in total. `lossy`: of a lossy store, write the experts
    as they are, in BF16; its config.json says so (`zipmoe_lossy`).

    Raises
    ------
    LossyError
        The store is lossy, and `lossy` was not asked for.
    StoreError
        The store is damaged; files that were not proven keep their temporary names.
    MismatchError
        The folder is not empty.
    SpaceError
        There is not enough free disk.
    """
    started = time.monotonic()
    target = Path(folder)
    with open_store(store) as opened, typed_write_errors(target, "unpack again"):
        if opened.manifest.lossy and not lossy:
            raise LossyError(
                f"{opened.path} is lossy: {_lost(opened.manifest.lossy)} cannot be restored. "
                "--lossy writes what there is, as BF16"
            )
        _prepare(opened, target)
        unpacker = _Unpacker(opened, target, progress)
        unpacker.run()
        source = opened.source
        return UnpackReport(
            files=len(source.files),
            tensors=len(source.tensors),
            total_bytes=sum(file.num_bytes for file in source.files),
            seconds=time.monotonic() - started,
            left_out=list(source.left_out),
            changed_tensors=len(unpacker.changed),
        )


def _lost(lossy: Lossy) -> str:
    counts = lossy.counts()
    lost = sum(counts.values()) - counts.get("lossless", 0)
    return f"the weights of {lost} of {sum(counts.values())} experts"


def _changed_tensors(store: Store) -> set[str]:
    """Name the tensors of the checkpoint that hold experts of fewer bits."""
    lossy = store.manifest.lossy
    if lossy is None:
        return set()
    return {
        part.key(expert)[0]
        for recipe in store.source.recipes
        for expert, bits in enumerate(lossy.bits[recipe.layer])
        if bits != LOSSLESS_BITS
        for part in recipe.parts
    }


def _prepare(store: Store, folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MismatchError(f"{folder} is not an empty folder: unpack overwrites nothing")
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(file.num_bytes for file in store.source.files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SpaceError(f"unpacking takes {needed:,} bytes in {folder} and {free:,} are free")


class _Unpacker:
    def __init__(
        self, store: Store, folder: Path, progress: Callable[[int, int], None] | None
    ) -> None:
        self._store, self._folder, self._progress = store, folder, progress
        self._places = store.source.places()
        self.changed = _changed_tensors(store)
        self._changed_files = {self._places[name][0] for name in self.changed}
        self._fds: dict[str, int] = {}
        self._threads = len(os.sched_getaffinity(0))
        self._done_bytes = 0
        self._total_bytes = 2 * sum(file.num_bytes for file in store.source.files)

    def run(self) -> None:
        """Write all, then read all back, prove it and give it its name."""
        self._check_complete()
        with ExitStack() as undo:
            for file in self._store.source.files:
                self._start(file, undo)
            for tensor in self._store.dense_tensors():
                matrix = self._store.read_dense(tensor.name, threads=self._threads)
                self._write((tensor.name, None), matrix)
            self._write_experts()
            for fd in self._fds.values():
                os.fsync(fd)
        for file in self._store.source.files:
            self._prove(file)
        for file in self._store.source.files:
            self._temporary(file).rename(self._folder / file.name)

    def _check_complete(self) -> None:
        """Every tensor must come from one place before a byte is written."""
        keys = prove_recipes(self._store.source, self._store.layers)
        dense = {tensor.name for tensor in self._store.dense_tensors()}
        if keys & dense or keys | dense != self._places.keys():
            raise CorruptError("not every tensor of the checkpoint is in the store", file=SOURCE)

    def _temporary(self, file: SourceFile) -> Path:
        return self._folder / f".zipmoe-{file.name}"[:255]

    def _start(self, file: SourceFile, undo: ExitStack) -> None:
        """Create a file; shards get their header, small files their content."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(self._temporary(file), flags, 0o644)
        undo.callback(os.close, fd)
        self._fds[file.name] = fd
        if file.header is not None:
            text = file.header.encode()
            write_all(fd, [len(text).to_bytes(8, "little"), text], 0)
            self._advance(8 + len(text))
        elif file.text is not None:
            write_all(fd, [self._text(file).encode()], 0)
            self._advance(file.num_bytes)
        else:
            with (self._store.path / file.name).open("rb") as kept:
                offset = 0
                while chunk := kept.read(CHUNK_BYTES):
                    write_all(fd, [chunk], offset)
                    offset += len(chunk)
            self._advance(file.num_bytes)

    def _text(self, file: SourceFile) -> str:
        """Give a small file; config.json says that weights are not the original ones."""
        lossy = self._store.manifest.lossy
        if lossy is None or file.name != "config.json":
            return file.text or ""
        self._changed_files.add(file.name)
        config = json.loads(file.text or "{}") | {"zipmoe_lossy": lossy.brief()}
        return json.dumps(config, indent=2, ensure_ascii=False) + "\n"

    def _write_experts(self) -> None:
        recipes = self._store.source.recipes
        for layer, expert, shard, rows in self._store.expert_records():
            matrices = [self._store.read_matrix(shard, r, threads=self._threads) for r in rows]
            chosen = [recipe for recipe in recipes if recipe.layer == layer]
            for key, piece in restore(chosen, matrices, expert, self._slice_shape).items():
                self._write(key, piece)

    def _slice_shape(self, key: SliceKey) -> tuple[int, int]:
        rows, columns = self._place(key).shape[-2:]
        return rows, columns

    def _place(self, key: SliceKey) -> TensorPlace:
        return self._places[key[0]][1]

    def _write(self, key: SliceKey, piece: NDArray[Any]) -> None:
        file, place = self._places[key[0]]
        offset = place.start + (key[1] or 0) * piece.nbytes
        if offset + piece.nbytes > place.stop:
            raise AssertionError(f"a piece of {place.name} leaves its place")
        write_all(self._fds[file], [piece.reshape(-1).view("u1").data], offset)
        self._advance(piece.nbytes)

    def _prove(self, file: SourceFile) -> None:
        path = self._temporary(file)
        if file.header is None:
            with path.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            shard = Shard(file.name, path, file.num_bytes, file.parsed_header())
            hashes = hash_shard(shard)
            assert hashes is not None
            for name, found in hashes.tensors.items():
                if name not in self.changed and found != self._store.source.tensors[name]:
                    raise CorruptError(
                        "the restored tensor has not its SHA-256", file=file.name, tensor=name
                    )
            digest = hashes.sha256
        is_original = digest == file.sha256 and path.stat().st_size == file.num_bytes
        if not is_original and file.name not in self._changed_files:
            raise CorruptError("the restored file has not its SHA-256", file=file.name)
        self._advance(file.num_bytes)

    def _advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
