"""What Linux says about the memory cgroups (v1, v2) that this process is in.

`root` is where the system's files are looked for: tests make their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["MemoryGroup", "memory_groups", "pressure_file"]

_UNLIMITED = 1 << 60  # v1 says so with the largest number of pages


@dataclass(frozen=True)
class MemoryGroup:
    """A memory cgroup that this process is in, in bytes.

    limit: None where there is none; `usage` and the following are 0 then. The files' pages are
    counted in `usage`: nobody needs the inactive ones, the active ones can be reclaimed at a cost.
    """

    limit: int | None
    usage: int = 0
    inactive_file: int = 0
    active_file: int = 0


@dataclass(frozen=True)
class _Names:
    limits: tuple[str, ...]  # the least of them counts
    usage: str
    stat: str  # what precedes a name in memory.stat where it counts the groups below too


_V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_V2 = _Names(("memory.max", "memory.high"), "memory.current", "")


def memory_groups(root: Path) -> list[MemoryGroup]:
    """List the memory cgroup of this process and those above it, as far as they can be read."""
    found = []
    for controllers, steps in _own(root):
        if controllers == "":
            base, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        for depth in range(len(steps) + 1):
            group = _read_group(base.joinpath(*steps[:depth]), names)
            if group is not None:
                found.append(group)
    return found


def pressure_file(root: Path) -> Path:
    """Find where the time is told that tasks waited for memory: this cgroup's, or the machine's."""
    for controllers, steps in _own(root):
        for base in ("sys/fs/cgroup", "sys/fs/cgroup/unified") if controllers == "" else ():
            folder = (root / base).joinpath(*steps)
            # The root of all groups has no type; what it tells is the machine's anyway.
            if (folder / "cgroup.type").exists() and (folder / "memory.pressure").exists():
                return folder / "memory.pressure"
    return root / "proc/pressure/memory"


def _own(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (controllers, path) of each cgroup of this process; v2 has no controllers there."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # A container often sees its own group as the root, whatever the path says.
        yield controllers, [part for part in path.split("/") if part and part != ".."]


def _read_group(folder: Path, names: _Names) -> MemoryGroup | None:
    try:
        limits = [
            int(text)
            for name in names.limits
            if (folder / name).exists() and (text := (folder / name).read_text().strip()) != "max"
        ]
        if not limits or min(limits) >= _UNLIMITED:
            return MemoryGroup(None) if (folder / names.limits[0]).exists() else None
        usage = int((folder / names.usage).read_text())
        stat = dict(
            re.findall(r"^(\w+) (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        )
    except (OSError, ValueError):
        return None
    files = (int(stat.get(f"{names.stat}{kind}_file", 0)) for kind in ("inactive", "active"))
    return MemoryGroup(min(limits), usage, *files)
