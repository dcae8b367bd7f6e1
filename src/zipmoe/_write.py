"""A store's folder being written: records encoded by a pool of threads, then the manifest.

What is on the disk is noted in a journal; the manifest comes last, by rename.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from zipmoe._disk import sync_folder, write_all
from zipmoe._manifest import MANIFEST, FileInfo, Manifest, ShardInfo
from zipmoe._shard import CodedMatrix, RecordPlan, ShardPlan, ShardWriter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from zipmoe._journal import FileHashes, Journal

__all__ = ["Progress", "StoreWriter", "copy_file", "publish", "write_file"]

Progress = Callable[[int, int], None]
Encode = Callable[[RecordPlan, int], list[CodedMatrix]]

BATCH_BYTES = 128 << 20  # weights between two waits for the disk
IN_FLIGHT_BYTES = 192 << 20  # weights being read, encoded or waiting to be written
CHUNK_BYTES = 4 << 20


class StoreWriter:
    """Encodes in a pool, writes in order, notes in the journal what is on the disk.

    `encode` makes a record's matrices with so many threads. `poll` gives checksums of files of the
    checkpoint that were finished since it was last asked.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ShardPlan],
        journal: Journal,
        encode: Encode,
        progress: Progress | None,
        *,
        poll: Callable[[], list[FileHashes]] = list,
    ) -> None:
        self._folder, self._shards, self._journal = folder, shards, journal
        self._encode, self._poll, self._progress = encode, poll, progress
        self._done_bytes = 0
        self._total_bytes = sum(r.raw_bytes for shard in shards for r in shard.records)
        self._noter = ThreadPoolExecutor(1, "zipmoe-journal")
        self._noting: list[Future[None]] = []

    def run(self, jobs: int) -> list[ShardInfo]:
        """Write all shards; returns them in order."""
        with ThreadPoolExecutor(jobs, "zipmoe-encode") as pool, self._noter:
            try:
                coded = self._encoded(pool, jobs)
                return [self._write_shard(shard, coded) for shard in self._shards]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _encoded(
        self, pool: ThreadPoolExecutor, jobs: int
    ) -> Iterator[tuple[RecordPlan, list[CodedMatrix]]]:
        """Encode all records that are not done yet, in order, a bounded number at once."""
        waiting: deque[tuple[RecordPlan, Future[list[CodedMatrix]]]] = deque()
        in_flight = 0
        for shard in self._shards:
            for record in shard.records[len(self._journal.records.get(shard.name, ())) :]:
                while waiting and in_flight + record.raw_bytes > IN_FLIGHT_BYTES:
                    first, future = waiting.popleft()
                    in_flight -= first.raw_bytes
                    yield first, future.result()
                # A large record runs alone, so it gets all threads.
                threads = jobs if record.raw_bytes * jobs > IN_FLIGHT_BYTES else 1
                waiting.append((record, pool.submit(self._encode, record, threads)))
                in_flight += record.raw_bytes
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()

    def _write_shard(
        self, shard: ShardPlan, coded: Iterator[tuple[RecordPlan, list[CodedMatrix]]]
    ) -> ShardInfo:
        done = self._journal.records.get(shard.name, [])
        self._advance(sum(record.raw_bytes for record in shard.records[: len(done)]))
        writer = ShardWriter(self._folder, shard, done)
        try:
            batch: list[NDArray[Any]] = []
            batch_bytes = 0
            for planned in shard.records[len(done) :]:
                record, matrices = next(coded)
                if record is not planned:
                    raise AssertionError("records are encoded and written in different orders")
                batch.append(writer.append(matrices))
                batch_bytes += record.raw_bytes
                if batch_bytes >= BATCH_BYTES:
                    self._note_later(writer, batch)
                    batch, batch_bytes = [], 0
                self._advance(record.raw_bytes)
            self._note_later(writer, batch)
            self._wait_for_notes()
            return writer.finish()
        finally:
            wait(self._noting)
            writer.close()

    def _note_later(self, writer: ShardWriter, batch: list[NDArray[Any]]) -> None:
        """Wait for the disk and write the journal in a thread beside; one batch at a time."""
        self._wait_for_notes()
        hashes = self._poll()
        self._noting = [self._noter.submit(self._note, writer, batch, hashes)]

    def _wait_for_notes(self) -> None:
        for note in self._noting:
            note.result()
        self._noting = []

    def _note(
        self, writer: ShardWriter, batch: list[NDArray[Any]], hashes: list[FileHashes]
    ) -> None:
        writer.sync()
        self._journal.add_records(writer.plan.name, batch)
        for found in hashes:
            self._journal.add_hashes(found)

    def _advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


def publish(folder: Path, manifest: Manifest, journal: Journal) -> None:
    """Make a folder whose files are all on the disk a store, at once."""
    temporary = f".{MANIFEST}.tmp"
    write_file(folder, temporary, manifest.dump())
    sync_folder(folder)
    (folder / temporary).rename(folder / MANIFEST)
    sync_folder(folder)
    journal.remove()


def copy_file(source: Path, folder: Path, name: str) -> FileInfo:
    """Copy a file into the folder, on the disk when this returns."""
    digest, num_bytes = hashlib.sha256(), 0
    with source.open("rb") as opened, (folder / name).open("wb") as target:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    return FileInfo(name, num_bytes, digest.hexdigest())


def write_file(folder: Path, name: str, data: bytes) -> FileInfo:
    """Write a small file, on the disk when this returns."""
    fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, [data], 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileInfo(name, len(data), hashlib.sha256(data).hexdigest())
