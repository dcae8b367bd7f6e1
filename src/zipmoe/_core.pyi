"""Contract of the native core.

Arrays are numpy; the GIL is released in every call that works on data.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def available_isas() -> list[str]:
    """Instruction sets of this machine, best first: some of "avx512", "avx2", "portable"."""

def geometry(rows: int, columns: int) -> tuple[int, int]:
    """(row group, k-tile) that zipmoe chooses for a matrix (docs/format.md section 5)."""

def xxh3(data: Any) -> int:
    """XXH3 64 of a contiguous buffer."""

class Encoded:
    """A coded matrix. Arrays have their exact lengths, without padding to 4096."""

    @property
    def codec(self) -> str:
        """What it was coded with: the codec asked for, or "raw" if that takes less space."""
    @property
    def row_group(self) -> int: ...
    @property
    def k_tile(self) -> int: ...
    @property
    def extents(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]: ...

def encode(
    codec: str,
    weights: NDArray[np.uint16],
    *,
    row_group: int = 0,
    k_tile: int = 0,
    shards: int = 3,
    threads: int = 1,
    isa: str = "",
    allow_raw: bool = True,
) -> Encoded:
    """Encode a BF16 matrix [rows, columns] given as its bits; any strides (transposed is fine).

    row_group and k_tile 0: as `geometry`. isa "": the best. allow_raw False: never fall back to
    raw.
    """

def decode(
    codec: str,
    extents: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    out: NDArray[np.uint16],
    *,
    row_group: int,
    k_tile: int,
    threads: int = 1,
    isa: str = "",
) -> None:
    """Decode into `out` [rows, columns]: rows may be strided, columns must be contiguous.

    Raises CorruptError where the bytes are not a valid coding of such a matrix; never reads or
    writes out of bounds, whatever the bytes.
    """

class ExpertCache:
    """Expert records kept compressed in memory: read on demand, verified, LRU.

    `paths`: the expert shards. `matrices`: u64 [n, 16], one row per matrix, rows of one expert
    together in order of use: layer, expert, matrix, shard (ordinal in paths), codec id, bytes per
    element, rows, columns, row group, k-tile, then offset, length, xxh3 of extent 0 and of extent 1
    (as in the store's index). An expert's extents lie in one run of its shard, as docs/format.md
    section 3 says.

    Raises FetchError (path, offset, errno) where a read fails, CorruptError (file, layer, expert,
    plane, offset) where the bytes are not those promised; it stays usable after either.
    """

    def __init__(
        self,
        paths: Sequence[str],
        matrices: NDArray[np.uint64],
        *,
        capacity_bytes: int,
        reader: str = "",
        isa: str = "",
    ) -> None:
        """capacity_bytes: all that it may allocate. reader "": io_uring if it works, else pread.

        "io_uring" and "pread" insist on one; "+direct" or "+buffered" after it on how files are
        read. Raises BudgetError below `floor_bytes`, ValueError for names that are unknown or
        do not work here. A process must not fork while it holds a cache: the child's calls raise
        ValueError.
        """

    @property
    def reader(self) -> str:
        """What reads: "io_uring+direct", "io_uring", "pread+direct" or "pread"."""
    @property
    def isa(self) -> str: ...
    @property
    def slots(self) -> int:
        """How many experts it can hold."""
    @property
    def allocated_bytes(self) -> int: ...
    @staticmethod
    def floor_bytes(matrices: NDArray[np.uint64]) -> int:
        """Least capacity_bytes that works for these matrices."""
    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Start reading those that are absent, as far as slots allow; does not wait.

        The others follow in the background as slots become free. What goes wrong surfaces at
        `decode` of that expert. A later list replaces this one.
        """
    def decode(self, layer: int, expert: int, matrix: int, out: NDArray[Any]) -> None:
        """Decode one matrix into `out` [rows, columns] of its element size (rows may be strided).

        Waits for the read if need be. Nothing is written to `out` from unverified bytes.
        """
    def counters(self) -> dict[str, int]:
        """hits, misses, bytes_read, evictions, read_errors, wait_ns, decode_ns since the start.

        Hits and misses count visits: one begins when `prefetch` lists an expert or, if it has not,
        when a matrix of it is decoded; it ends with the expert's last matrix. A hit found the
        record in memory or its read under way. read_errors counts those that a retry cured too.
        wait_ns and decode_ns are sums over calling threads.
        """
    def close(self) -> None:
        """Free threads, files and memory. Idempotent. Any later call raises ValueError."""
