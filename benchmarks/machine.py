"""What a benchmark ran on: every result carries it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path


def git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """Commit of the working tree, with "+" where it has uncommitted changes."""
    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory, kernel, Python, commit, time, load when it was asked."""
    from zipmoe import _core  # noqa: PLC0415
    from zipmoe.hardware import processor  # noqa: PLC0415

    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "isas": _core.available_isas(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit(),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_1min": os.getloadavg()[0],
    }
