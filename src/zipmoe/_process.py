"""What Linux says about the memory of this process."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["peak_rss_bytes", "rss_bytes", "unreclaimable_bytes"]


def rss_bytes() -> int:
    """Memory of this process now (VmRSS). Quick enough for every token."""
    with open("/proc/self/statm", "rb", buffering=0) as file:  # noqa: PTH123  Path reads in text
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def unreclaimable_bytes() -> int:
    """Memory of this process now that is no page of a file: without swap it cannot be taken."""
    return _status_bytes("RssAnon") + _status_bytes("RssShmem")


def peak_rss_bytes() -> int:
    """Most memory this process ever had (VmHWM).

    Not getrusage's figure: that one survives exec, so that a small process started by a large one
    would be charged with its parent's.
    """
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
