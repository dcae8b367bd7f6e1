"""A store's folder: its manifest, which files lie in it, and the small ones, verified."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING

from zipmoe._errors import CorruptError, FetchError, FormatError, MismatchError, StoreError
from zipmoe._manifest import MANIFEST, MAX_BYTES, FileInfo, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["JOURNAL", "file_errors", "read_manifest", "read_verified"]

JOURNAL = ".zipmoe-journal"
# Readers of a folder such as transformers look for many names, so a stranger is refused.
_HARMLESS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest alone."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise CorruptError("the manifest is over the limit of 1 GiB", file=MANIFEST)
            return Manifest.parse(file.read())
    except FileNotFoundError as error:
        if (folder / JOURNAL).exists():
            raise FormatError(
                f"{folder} is an unfinished pack: run the same `zipmoe pack` again to finish it"
            ) from error
        raise FormatError(f"{folder} is not a zipmoe store: it has no {MANIFEST}") from error
    except OSError as error:
        raise FetchError(
            f"cannot read {folder / MANIFEST}: {error}",
            path=str(folder / MANIFEST),
            errno=error.errno or 0,
        ) from error


def file_errors(folder: Path, manifest: Manifest) -> Iterator[StoreError]:
    """Find files that are missing, irregular, of another length, or strangers."""
    listed = {shard.name: shard.num_bytes for shard in manifest.shards}
    listed |= {file.name: file.num_bytes for file in manifest.files}
    for name, num_bytes in listed.items():
        try:
            status = (folder / name).lstat()
        except FileNotFoundError:
            yield CorruptError("the file is missing", file=name)
            continue
        if not stat.S_ISREG(status.st_mode):
            yield CorruptError("not a regular file (a link?)", file=name)
        elif status.st_size != num_bytes:
            yield CorruptError(
                f"the file has {status.st_size} bytes and should have {num_bytes}", file=name
            )
    if sum(listed.values()) != manifest.store_bytes:
        yield CorruptError("store_bytes is not the sum of the files", file=MANIFEST)
    for name in sorted(entry.name for entry in folder.iterdir()):
        strange = name not in listed and name != MANIFEST and name not in _HARMLESS
        if strange and not name.startswith("."):
            yield MismatchError(f"{folder / name} does not belong to the store: move it away")


def read_verified(folder: Path, info: FileInfo, *, keep: bool = True) -> bytes:
    """Read a small file and check its SHA-256; `keep` False gives b""."""
    digest, kept = hashlib.sha256(), []
    try:
        with (folder / info.name).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                if keep:
                    kept.append(chunk)
    except OSError as error:
        raise FetchError(
            f"cannot read {folder / info.name}: {error}",
            path=str(folder / info.name),
            errno=error.errno or 0,
        ) from error
    if digest.hexdigest() != info.sha256:
        raise CorruptError("the file does not have its SHA-256", file=info.name)
    return b"".join(kept)
