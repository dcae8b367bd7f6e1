"""What commands say, and where: results on stdout, everything else on stderr; exit codes.

The support of `cli.py`, the only place that prints. With --json a command puts exactly one document
on stdout, an error's too.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from ._errors import CorruptError, MismatchError, ZipmoeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

USER_ERROR, USAGE_ERROR, CORRUPT_STORE, INTERRUPTED = 1, 2, 3, 130


class Terminal:
    """One command's output. `as_json`: one document on stdout at the end and nothing else."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def say(self, text: str) -> None:
        """Tell the person something: one line on stderr."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def write(self, text: str) -> None:
        """Put a piece of the result on stdout, at once; not with --json."""
        if not self.as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def document(self, content: dict[str, Any]) -> None:
        """Put the document on stdout; only with --json."""
        if self.as_json:
            sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            sys.stdout.flush()

    def fail(self, error: str, message: str, code: int) -> NoReturn:
        """Say what went wrong and leave with `code`."""
        self.say(f"zipmoe: {message}")
        self.document({"error": {"type": error, "message": message}})
        raise SystemExit(code)

    @contextmanager
    def progress(
        self, title: str, *, counts: bool = False
    ) -> Iterator[Callable[[int, int], None] | None]:
        """Give a function of (bytes done, bytes in all) that moves a bar, or None.

        With `counts` it is of things, not of bytes.

        There is a bar only where a person can see it: stderr must be a terminal.
        """
        if not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        measures = (MofNCompleteColumn(),) if counts else (DownloadColumn(), TransferSpeedColumn())
        columns = (TextColumn("{task.description}"), BarColumn(), *measures, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def reporting(terminal: Terminal, *, mismatch: int = CORRUPT_STORE) -> Iterator[None]:
    """Turn what zipmoe raises on purpose, and the system's refusals, into a sentence and a code.

    `mismatch` is the code of a MismatchError: the store is bad, or (packing) the user's choice of
    it. Any other exception is a fault of zipmoe's own and shows where it came from.
    """
    try:
        yield
    except KeyboardInterrupt:
        terminal.fail("Interrupted", "interrupted", INTERRUPTED)
    except CorruptError as error:
        terminal.fail("CorruptError", str(error), CORRUPT_STORE)
    except MismatchError as error:
        terminal.fail("MismatchError", str(error), mismatch)
    except ZipmoeError as error:
        terminal.fail(type(error).__name__, str(error), USER_ERROR)
    except BrokenPipeError:
        raise  # whoever read our output has left; click knows what to do
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        terminal.fail("OSError", f"{where}{error.strerror or error}", USER_ERROR)
