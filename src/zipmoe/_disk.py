"""Writing to a disk: all bytes or a typed error, and names that survive a crash."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zipmoe._errors import SpaceError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["sync_folder", "typed_write_errors", "write_all"]


def write_all(fd: int, buffers: Sequence[Any], offset: int) -> None:
    """Write buffers one after the other at `offset`, however little the system takes at once."""
    queue = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    while queue:
        written = os.pwritev(fd, queue[:64], offset)
        offset += written
        while queue and written >= len(queue[0]):
            written -= len(queue.pop(0))
        if queue and written:
            queue[0] = queue[0][written:]


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def typed_write_errors(folder: Path, then: str) -> Iterator[None]:
    """Turn a full disk into SpaceError, saying what to do `then`, and the rest into StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SpaceError(f"the disk of {folder} is full: make room and {then}") from error
        raise StoreError(f"cannot write {folder}: {error}") from error
