"""A store → every place in it that is not as it was packed. Reads every byte once."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from zipmoe._errors import CorruptError, FetchError, FormatError, StoreError
from zipmoe._folder import file_errors, read_manifest, read_verified
from zipmoe._index import PAGE, ceil_to
from zipmoe._shard import OpenShard, open_shard
from zipmoe._source import SOURCE, prove_recipes
from zipmoe.store import assemble, place_of, read_padded

if TYPE_CHECKING:
    from collections.abc import Callable

    from zipmoe._lossy import Lossy
    from zipmoe._manifest import Manifest

T = TypeVar("T")

__all__ = ["VerifyReport", "verify_store"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked and what is wrong. The store is sound if `errors` is empty."""

    files: int
    records: int
    checked_bytes: int
    seconds: float
    errors: list[StoreError]
    lossy: Lossy | None = None  # not None: there is no way back to the original weights


def verify_store(
    store: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check every checksum, length, reserved field and padding of a store.

    `progress` is called with bytes done and in total.

    Raises
    ------
    FormatError
        It is no store, an unfinished one, or of another version.
    FetchError
        A file could not be read.
    """
    started = time.monotonic()
    folder = Path(store)
    try:
        manifest = read_manifest(folder)
    except CorruptError as error:
        return VerifyReport(1, 0, 0, time.monotonic() - started, [error])
    check = _Check(folder, manifest, progress)
    with ExitStack() as undo:
        check.run(undo)
    files = 1 + len(manifest.shards) + len(manifest.files)
    seconds = time.monotonic() - started
    return VerifyReport(
        files, check.records, check.done_bytes, seconds, check.errors, manifest.lossy
    )


class _Check:
    def __init__(
        self, folder: Path, manifest: Manifest, progress: Callable[[int, int], None] | None
    ) -> None:
        self._folder, self._manifest, self._progress = folder, manifest, progress
        self.errors: list[StoreError] = list(file_errors(folder, manifest))
        self._unusable = {error.file for error in self.errors if isinstance(error, CorruptError)}
        self.records = self.done_bytes = 0

    def run(self, undo: ExitStack) -> None:
        for info in self._manifest.files:
            if info.name not in self._unusable:
                self._try(partial(read_verified, self._folder, info, keep=False))
            self._advance(info.num_bytes)
        shards: list[OpenShard] = []
        for described in self._manifest.shards:
            shard = None
            if described.name not in self._unusable:
                shard = self._try(partial(open_shard, self._folder, described))
            if shard is None:
                self._advance(described.num_bytes)
                continue
            undo.callback(os.close, shard.fd)
            shards.append(shard)
            self._check_records(shard)
        if not self.errors:
            self._try(partial(self._check_whole, shards))

    def _check_records(self, shard: OpenShard) -> None:
        """Read every extent of a shard: its checksum, and its padding, which must be zero."""
        self._advance(shard.data_start)
        self.records += len(shard.records)
        for row in range(len(shard.entries)):
            for plane in (0, 1):
                self._try(partial(self._check_extent, shard, row, plane))
        self._advance(128 * len(shard.entries) + 72)

    def _check_extent(self, shard: OpenShard, row: int, plane: int) -> None:
        length = int(shard.entries[row]["extents"][plane][1])
        self._advance(int(ceil_to(length, PAGE)))
        padded = read_padded(shard, row, plane)
        if padded[length:].any():
            raise CorruptError("the padding is not zero", **place_of(shard, row, plane))

    def _check_whole(self, shards: list[OpenShard]) -> None:
        """Check that the parts, each sound, belong together."""
        store = assemble(self._folder, self._manifest, shards)
        keys = prove_recipes(store.source, store.layers)
        keys |= {tensor.name for tensor in store.dense_tensors()}
        if keys != store.source.tensors.keys():
            raise CorruptError("not every tensor of the checkpoint is in the store", file=SOURCE)

    def _try(self, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except (FormatError, FetchError):
            raise
        except StoreError as error:
            self.errors.append(error)
            return None

    def _advance(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        if self._progress is not None:
            self._progress(self.done_bytes, self._manifest.store_bytes)
