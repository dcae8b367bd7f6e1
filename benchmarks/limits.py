"""A memory limit for a process, page cache charged to it, and a drive as cold as a user's.

Memory cgroups of version 1 and 2; root is needed to make them.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
READ_AHEAD_KIB = 128  # Linux's default: more makes mapped files read what nobody wants
NO_LIMIT = 1 << 60
REMOVAL_S = 10.0


class MemoryGroup:
    """A memory cgroup for one process, with a limit in bytes or none."""

    def __init__(self, limit: int | None) -> None:
        self.is_v1 = (V1 / "memory.limit_in_bytes").exists()
        if not self.is_v1:
            if "memory" not in (V2 / "cgroup.controllers").read_text().split():
                raise SystemExit("this benchmark needs memory cgroups")
            (V2 / "cgroup.subtree_control").write_text("+memory")
        self.limit = limit
        self.folder = (V1 if self.is_v1 else V2) / f"zipmoe-bench-{os.getpid()}"
        self.swapped_before = swapped_pages()

    def __enter__(self) -> Self:
        self.folder.mkdir()
        if self.limit is not None and self.is_v1:
            self._write("memory.limit_in_bytes", self.limit)
        elif self.limit is not None:
            self._write("memory.max", self.limit)
            if (self.folder / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it, once its process has ended; what it left in the page cache goes too."""
        end = time.monotonic() + REMOVAL_S
        while True:
            with contextlib.suppress(OSError):
                self._write("memory.force_empty" if self.is_v1 else "memory.reclaim", NO_LIMIT)
            try:
                self.folder.rmdir()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
            else:
                return

    @property
    def processes(self) -> str:
        """The file into which a process writes its id to belong to the group."""
        return str(self.folder / "cgroup.procs")

    def facts(self) -> dict[str, Any]:
        """Say what was used, how often the limit was met, and who was killed for it."""
        if self.is_v1:
            peak = int(self._read("memory.max_usage_in_bytes"))
            met, killed = int(self._read("memory.failcnt")), self._read("memory.oom_control")
        else:
            peak, killed = int(self._read("memory.peak")), self._read("memory.events")
            met = number_of("max", killed)
        return {
            "limit_bytes": self.limit,
            "peak_bytes": peak,
            "times_at_limit": met,
            "oom_kills": number_of("oom_kill", killed),
            "swapped_pages": swapped_pages() - self.swapped_before,
        }

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text()


def number_of(name: str, text: str) -> int:
    found = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def swapped_pages() -> int:
    """Pages that the machine has written to swap or read from it."""
    text = Path("/proc/vmstat").read_text()
    return number_of("pswpin", text) + number_of("pswpout", text)


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@contextlib.contextmanager
def ordinary_read_ahead(path: Path) -> Iterator[None]:
    """Have the drive of a path read ahead as Linux does by default, until the block ends."""
    number = path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    queue = next(
        (folder for folder in (device / "queue", device.parent / "queue") if folder.exists()), None
    )
    if queue is None:
        raise SystemExit(f"{path} is on no block device whose read-ahead can be set")
    setting = queue / "read_ahead_kb"
    before = setting.read_text()
    setting.write_text(str(READ_AHEAD_KIB))
    try:
        yield
    finally:
        setting.write_text(before)
