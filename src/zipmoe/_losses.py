"""What was measured already, so that a search that was stopped goes on where it was.

A file of JSON Lines. Each fact has a key, a checksum of all that it depends on; a line that is torn
or does not have its own checksum ends the file, and what it said is measured again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import xxhash

from zipmoe._disk import typed_write_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["KnownFacts"]


class KnownFacts:
    """Facts by key, kept in a file from the first one on."""

    def __init__(self, path: Path, about: str) -> None:
        """Read `path`, if it is there. `about` stands for all that every fact depends on."""
        self._path, self._about = path, about
        self._facts: dict[str, Any] = {}
        good = 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            text, _, checksum = line.rstrip(b"\n").rpartition(b" ")
            if not line.endswith(b"\n") or _checksum(text) != checksum:
                break
            key, value = json.loads(text)
            self._facts[key] = value
            good += len(line)
        if lines:
            with path.open("r+b") as file:
                file.truncate(good)

    def get(self, name: Any, find: Callable[[], Any]) -> Any:
        """Give what is known under a name (plain data), or find it and keep it (plain data too)."""
        named = json.dumps([self._about, name], sort_keys=True)
        key = xxhash.xxh3_128_hexdigest(named.encode())
        if key not in self._facts:
            self._facts[key] = value = find()
            text = json.dumps([key, value]).encode()
            self._append(text + b" " + _checksum(text) + b"\n")
        return self._facts[key]

    def _append(self, line: bytes) -> None:
        again = "run the same command again"
        with typed_write_errors(self._path.parent, again), self._path.open("ab") as file:
            file.write(line)

    def forget(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


def _checksum(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode()
