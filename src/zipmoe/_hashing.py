"""SHA-256 of a checkpoint's shards and of the tensors in them, in one sequential pass per file.

Runs in a thread of its own beside the encoders (hashlib releases the GIL), one file after another.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from typing import TYPE_CHECKING

from zipmoe._errors import CheckpointError
from zipmoe._journal import FileHashes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zipmoe.checkpoint import Shard

__all__ = ["HashThread", "hash_shard"]

CHUNK_BYTES = 4 << 20


def hash_shard(shard: Shard, stopped: Callable[[], bool] = lambda: False) -> FileHashes | None:
    """Hash a shard and its tensors; None if `stopped` says so meanwhile."""
    whole = hashlib.sha256()
    tensors = {}
    fd = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for chunk in _chunks(fd, 0, shard.header.data_start, shard):
            whole.update(chunk)
        for place in shard.header.tensors:
            digest = hashlib.sha256()
            for chunk in _chunks(fd, place.start, place.stop, shard):
                if stopped():
                    return None
                whole.update(chunk)
                digest.update(chunk)
            tensors[place.name] = digest.hexdigest()
    finally:
        os.close(fd)
    return FileHashes(shard.name, whole.hexdigest(), tensors)


def _chunks(fd: int, start: int, stop: int, shard: Shard) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK_BYTES, stop - start)))
    while start < stop:
        try:
            got = os.preadv(fd, [buffer[: stop - start]], start)
        except OSError as error:
            raise CheckpointError(f"cannot read {shard.path}: {error}") from error
        if got == 0:
            raise CheckpointError(f"{shard.path} became shorter while it was packed")
        start += got
        yield buffer[:got]


class HashThread:
    """Hashes shards in the background. `poll` and `wait` hand out results and raise its errors."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._todo = tuple(shards)
        self._found: queue.SimpleQueue[FileHashes | BaseException | None] = queue.SimpleQueue()
        self._ended = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zipmoe-hash", daemon=True)
        self._thread.start()

    def poll(self) -> list[FileHashes]:
        """Take what has been finished since the last call."""
        found = []
        while not self._ended and not self._found.empty():
            found += self._take()
        return found

    def wait(self) -> Iterator[FileHashes]:
        """Take everything that is still to come."""
        while not self._ended:
            yield from self._take()

    def close(self) -> None:
        """Stop and join the thread. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _take(self) -> list[FileHashes]:
        result = self._found.get()
        self._ended = not isinstance(result, FileHashes)
        if isinstance(result, BaseException):
            raise result
        return [result] if result is not None else []

    def _run(self) -> None:
        try:
            for shard in self._todo:
                found = hash_shard(shard, self._stop.is_set)
                if found is None:
                    return
                self._found.put(found)
            self._found.put(None)
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            self._found.put(error)
