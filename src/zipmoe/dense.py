"""Dense weights of a store → one file in memory that transformers' own loader reads.

transformers renames, merges, ties and casts what it loads; handing it an ordinary safetensors
file keeps all of that its business. The file has no name and no place on disk (memfd), and the
loader maps it without copying, so each dense weight is in memory once.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PADDING", "DenseFile", "DenseTensor"]

_ALIGNMENT = 64
_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_LABEL = "zipmoe-dense"


PADDING = "zipmoe.padding."


@dataclass(frozen=True)
class DenseTensor:
    """Name, dtype (as safetensors names it) and shape of a tensor to come.

    `phase` is its address modulo 64 where transformers maps the checkpoint itself: the products
    of FP32 vectors in torch depend on it in their last bits, so it is kept.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    phase: int = 0


class DenseFile:
    """A safetensors file in anonymous memory, reachable by `path` until it is closed.

    Closing gives up the descriptor and the path; the memory lives as long as something maps it.
    """

    def __init__(
        self, tensors: Iterable[DenseTensor], read: Callable[[str], NDArray[np.generic]]
    ) -> None:
        ordered = _with_padding(tensors)
        header = _header(ordered)
        self.bytes = len(header) + sum(tensor.nbytes for tensor in ordered)
        self._folder: str | None = None
        self._fd = os.memfd_create(_LABEL, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, self.bytes)
            offset = _write(self._fd, memoryview(header), 0)
            for tensor in ordered:
                if tensor.name.startswith(PADDING):
                    offset += tensor.nbytes
                    continue
                data = read(tensor.name).reshape(-1).view("u1").data
                assert data.nbytes == tensor.nbytes, tensor.name
                offset = _write(self._fd, data, offset)
            self._folder = tempfile.mkdtemp(prefix="zipmoe-")
            self.path = str(
                Path(self._folder) / "dense.safetensors"
            )  # transformers looks at the suffix
            Path(self.path).symlink_to(f"/proc/{os.getpid()}/fd/{self._fd}")
        except BaseException:
            self.close()
            raise

    def release_all_but(self, used: Iterable[tuple[int, int]]) -> int:
        """Give back pages of which no byte is used; `used` are (address, bytes) in this process.

        What the loader merged or cast was copied, and its source need not stay. Returns the bytes
        given back.
        """
        spans = []
        for start, end, offset in _mappings(self._fd):
            for address, size in used:
                low, high = max(address, start), min(address + size, end)
                if low < high:
                    spans.append((low - start + offset, high - start + offset))
        freed, position = 0, 0
        for low, high in [*sorted(spans), (self.bytes, self.bytes)]:
            begin = -(-position // mmap.PAGESIZE) * mmap.PAGESIZE
            length = low // mmap.PAGESIZE * mmap.PAGESIZE - begin
            if length > 0:
                _punch(self._fd, begin, length)
                freed += length
            position = max(position, high)
        return freed

    def close(self) -> None:
        """Give up the descriptor and the path. Idempotent."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _with_padding(tensors: Iterable[DenseTensor]) -> list[DenseTensor]:
    """Put padding between tensors (the format allows no holes) so that each gets its phase."""
    ordered: list[DenseTensor] = []
    offset = 0
    for tensor in tensors:
        gap = (tensor.phase - offset) % _ALIGNMENT
        if gap:
            ordered.append(DenseTensor(f"{PADDING}{len(ordered)}", "U8", (gap,), gap))
        ordered.append(tensor)
        offset += gap + tensor.nbytes
    return ordered


def _header(tensors: Sequence[DenseTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 4096)
    return len(text).to_bytes(8, "little") + text


def _write(fd: int, data: memoryview, offset: int) -> int:
    """Write all of it; returns the offset after it."""
    done = 0
    while done < data.nbytes:
        done += os.pwrite(fd, data[done:], offset + done)
    return offset + done


def _mappings(fd: int) -> list[tuple[int, int, int]]:
    """(start, end, file offset) of the places at which this process maps the file."""
    inode = os.fstat(fd).st_ino
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        entry = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ (\d+)\s+(.*)", line)
        if entry and _LABEL in entry[5] and int(entry[4]) == inode:
            found.append((int(entry[1], 16), int(entry[2], 16), int(entry[3], 16)))
    return found


def _punch(fd: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length))
    if result != 0:
        raise OSError(ctypes.get_errno(), "fallocate")
