"""Every error zipmoe raises on purpose.

ZipmoeError
├─ CheckpointError        the folder to pack: missing shard, bad header, dtype, path trick
│  └─ UnsupportedModelError   names the family or method, and what works instead
├─ StoreError             the packed folder
│  ├─ FormatError             not a store, unknown version or codec, unfinished pack
│  ├─ CorruptError            checksum, length or padding wrong; says file, layer, expert, offset
│  ├─ MismatchError           parts of different stores, or made from another checkpoint
│  └─ LossyError              what only a lossless store has is asked of a lossy one
├─ QuantizationError      weights that integers cannot stand for: infinite, NaN, or not BF16
├─ BudgetError            memory below the floor; says the floor and what fills it
├─ SpaceError             not enough disk
├─ TraceError             a routing trace that is none, or holds too little
├─ CalibrationError       a text or a task file that nothing can be measured on
└─ FetchError             I/O failed at run time; carries path, offset, errno

Messages say what, where, and what to do. Nothing is printed and passed over.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "CorruptError",
    "FetchError",
    "FormatError",
    "LossyError",
    "MismatchError",
    "QuantizationError",
    "SpaceError",
    "StoreError",
    "TraceError",
    "UnsupportedModelError",
    "ZipmoeError",
]


class ZipmoeError(Exception):
    """Base of all errors raised by zipmoe."""


class CheckpointError(ZipmoeError):
    """The checkpoint cannot be packed."""


class UnsupportedModelError(CheckpointError):
    """The model's family, or the method by which it is already quantised, is not supported."""


class StoreError(ZipmoeError):
    """The store cannot be used."""


class FormatError(StoreError):
    """Not a store, or one of a version or codec that this zipmoe does not know."""


class CorruptError(StoreError):
    """Bytes of a store are not what its checksums promise.

    The attributes name the place, as far as it is known: `file`, `tensor`, `layer`, `expert`,
    `plane` and `offset` (bytes from the start of the file).
    """

    def __init__(
        self,
        reason: str,
        *,
        file: str | None = None,
        tensor: str | None = None,
        layer: int | None = None,
        expert: int | None = None,
        plane: str | None = None,
        offset: int | None = None,
    ) -> None:
        self.reason, self.file, self.tensor = reason, file, tensor
        self.layer, self.expert, self.plane, self.offset = layer, expert, plane, offset
        place = {
            "file": file,
            "tensor": tensor,
            "layer": layer,
            "expert": expert,
            "plane": plane,
            "offset": offset,
        }
        where = ", ".join(f"{key} {value}" for key, value in place.items() if value is not None)
        super().__init__(f"{reason} ({where})" if where else reason)


class MismatchError(StoreError):
    """Parts that do not belong together: another store's shard, or another checkpoint's pack."""


class LossyError(StoreError):
    """The store is lossy: the published weights are not in it, and cannot be restored from it."""


class QuantizationError(ZipmoeError):
    """A weight that no integer stands for: an infinity, NaN, or of another dtype than BF16."""


class BudgetError(ZipmoeError):
    """The memory granted is below the floor. `floor_bytes` is the least that works."""

    def __init__(self, message: str, *, floor_bytes: int) -> None:
        self.floor_bytes = floor_bytes
        super().__init__(message)


class SpaceError(ZipmoeError):
    """Not enough free disk for what is asked."""


class TraceError(ZipmoeError):
    """A routing trace cannot be used."""


class CalibrationError(ZipmoeError):
    """A text or a task file cannot be used to measure quality."""


class FetchError(ZipmoeError):
    """A read failed while running. The engine stays usable. `errno` is the system's error, or 0."""

    def __init__(self, message: str, *, path: str = "", offset: int = 0, errno: int = 0) -> None:
        self.path, self.offset, self.errno = path, offset, errno
        super().__init__(message)
