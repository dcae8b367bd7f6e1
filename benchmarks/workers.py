"""Engines in processes of their own, so that arms can alternate without sharing threads or memory.

A worker waits, using no processor time, until it is told to call a method of its engine.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import statistics
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

MOST_FOREIGN = 0.1  # of one core: beyond it the machine was not idle


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def require_memory(needed: int, what: str) -> None:
    if needed > available_bytes():
        raise SystemExit(
            f"{what} need {needed / 1e9:.1f} GB of memory and {available_bytes() / 1e9:.1f} GB "
            "are available: use fewer --layers"
        )


def _serve(connection: Connection, factory: str, arguments: dict[str, Any]) -> None:
    module, name = factory.split(":")
    try:
        engine = getattr(importlib.import_module(module), name)(**arguments)
        connection.send((True, None))
        while (request := connection.recv()) is not None:
            method, positional = request
            connection.send((True, getattr(engine, method)(*positional)))
    except EOFError:
        pass
    except Exception:  # noqa: BLE001  (whatever it is, whoever waits must be told)
        connection.send((False, traceback.format_exc()))


class WorkerEnded(SystemExit):
    """A worker failed, or was killed."""


class Worker:
    """An engine made by `factory` ("module:callable") in a new process with this environment."""

    def __init__(
        self, name: str, factory: str, environment: dict[str, str], **arguments: Any
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, factory, arguments), name=name, daemon=True
        )
        with _environment(environment):
            self.process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self._kill()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        self.connection.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, result = self.connection.recv()
        except EOFError:
            self.process.join()
            raise WorkerEnded(f"{self.name} ended with {self.process.exitcode}") from None
        if not good:
            raise WorkerEnded(f"{self.name} failed:\n{result}")
        return result

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.connection.send(None)
        self.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self._kill()
        self.close()

    def _kill(self) -> None:
        """End it, whatever it is in the middle of."""
        self.process.kill()
        self.process.join()


def in_child(function: str, **arguments: Any) -> None:
    """Run "module:callable" in a process that gives its memory back when it is done."""
    Worker(function, function, {}, **arguments).close()


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    kinds = {"median": statistics.median, "min": min, "max": max}
    return {name: round(kind(values), digits) for name, kind in kinds.items()}


def disturbed(name: str, usages: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up what should not have been: other processes at work, weights that were not in RAM."""
    foreign = spread([usage["foreign_share"] for usage in usages])
    if foreign["median"] > MOST_FOREIGN:
        message = f"{name}: others took {foreign['median']:.0%} of a core, do not quote this run"
        print(message, file=sys.stderr)
    read = sum(usage["read_bytes"] for usage in usages)
    return {"foreign_share": foreign, "read_bytes": read}


def rotated(names: list[str], number: int) -> list[str]:
    """Give the arms in another order in every repetition, so that none is always first."""
    shift = number % len(names)
    return names[shift:] + names[:shift]
