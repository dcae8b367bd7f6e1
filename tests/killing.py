"""Stores written in a process of its own, which is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from typing import TYPE_CHECKING

import torch

from zipmoe import _write

if TYPE_CHECKING:
    from collections.abc import Callable


def killed(write: Callable[[], object], seconds: float, *, batch_bytes: int) -> bool:
    """Write in a forked process and SIGKILL it after `seconds`; whether it was still running.

    batch_bytes: of weights between two notes in the journal.
    """
    child = multiprocessing.get_context("fork").Process(target=_run, args=(write, batch_bytes))
    child.start()
    child.join(seconds)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def _run(write: Callable[[], object], batch_bytes: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    sys.stderr.close()
    _write.BATCH_BYTES = batch_bytes
    write()
