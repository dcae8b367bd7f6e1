"""The journal of an unfinished pack: what is safely on the disk, so that a killed pack continues.

One line per fact: JSON, a space, its xxh3. The first line is the identity of the plan. A line that
is torn or wrong ends the journal: what follows it is done again. The open file is also the lock.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash

from zipmoe._disk import sync_folder
from zipmoe._errors import MismatchError, StoreError
from zipmoe._folder import JOURNAL
from zipmoe._index import ENTRY

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

__all__ = ["FileHashes", "Journal"]


@dataclass(frozen=True, slots=True)
class FileHashes:
    """SHA-256 of a file of the checkpoint and of the tensors in it."""

    name: str
    sha256: str
    tensors: dict[str, str]


@dataclass(slots=True)
class Journal:
    """An open and locked journal. `records` and `hashes` are what an earlier run finished."""

    folder: Path
    identity: dict[str, Any]
    records: dict[str, list[NDArray[Any]]] = field(default_factory=dict)  # shard → entries
    hashes: dict[str, FileHashes] = field(default_factory=dict)
    _fd: int = -1

    @staticmethod
    def open(folder: Path, identity: dict[str, Any]) -> Journal:
        """Start or continue the journal of the plan called `identity`.

        Raises
        ------
        StoreError
            Another process packs into the folder.
        MismatchError
            The folder holds the unfinished pack of another plan.
        """
        journal = Journal(folder, identity)
        journal._fd = _open_locked(folder)
        try:
            journal._read()
        except BaseException:
            journal.close()
            raise
        return journal

    def add_records(self, shard: str, entries: list[NDArray[Any]]) -> None:
        """Note records whose bytes are on the disk."""
        for record in entries:
            code = base64.b64encode(record.tobytes()).decode()
            self._append({"shard": shard, "entries": code})
        os.fdatasync(self._fd)

    def add_hashes(self, found: FileHashes) -> None:
        """Note the checksums of a file of the checkpoint."""
        self.hashes[found.name] = found
        self._append({"file": found.name, "sha256": found.sha256, "tensors": found.tensors})

    def remove(self) -> None:
        """Delete the journal of a finished store, and close it."""
        (self.folder / JOURNAL).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, fact: dict[str, Any]) -> None:
        text = json.dumps(fact, separators=(",", ":")).encode()
        line = text + b" " + xxhash.xxh3_64_hexdigest(text).encode() + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]

    def _read(self) -> None:
        with open(self._fd, "rb", closefd=False) as file:
            lines = file.read().split(b"\n")
        good = 0
        facts = []
        for line in lines[:-1]:  # what follows the last newline is torn
            text, _, checksum = line.rpartition(b" ")
            if xxhash.xxh3_64_hexdigest(text).encode() != checksum:
                break
            facts.append(json.loads(text))
            good += len(line) + 1
        os.ftruncate(self._fd, good)
        os.lseek(self._fd, good, os.SEEK_SET)
        if not facts:
            self._append(self.identity)
            os.fsync(self._fd)
            sync_folder(self.folder)
            return
        if facts[0] != self.identity:
            raise MismatchError(
                f"{self.folder} holds an unfinished pack of another checkpoint, or one made with "
                "other options or versions: delete the folder, or pack into another one"
            )
        for fact in facts[1:]:
            self._take(fact)

    def _take(self, fact: dict[str, Any]) -> None:
        if "shard" in fact:
            entries = np.frombuffer(base64.b64decode(fact["entries"]), ENTRY)
            self.records.setdefault(fact["shard"], []).append(entries)
        else:
            found = FileHashes(fact["file"], fact["sha256"], fact["tensors"])
            self.hashes[found.name] = found


def _open_locked(folder: Path) -> int:
    path = folder / JOURNAL
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise StoreError(f"another zipmoe is packing into {folder}") from error
        # The holder may have finished and removed the file between open and lock.
        try:
            if os.path.samestat(os.fstat(fd), path.lstat()):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)
