"""A packed model at work for the commands: load and answer.

Support of `cli.py`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .budget import available_memory, format_bytes
from .generate import generate
from .model import load
from .recording import RoutingRecording
from .routing import save_trace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ._terminal import Terminal
    from .generate import GenerateResult
    from .model import Loaded


@contextmanager
def loaded_model(
    terminal: Terminal, store: Path, *, memory: int | None, **options: Any
) -> Iterator[Loaded]:
    """Load a store, say how the memory is shared out, and free everything at the end."""
    available = available_memory()
    granted = available.budget if memory is None else memory
    with load(store, memory=granted, **options) as loaded:
        if memory is None:
            terminal.say(
                f"--memory {format_bytes(granted)}: what the {available.limited_by} has available, "
                f"{format_bytes(available.bytes)}, less a reserve"
            )
        terminal.say(str(loaded.memory))
        yield loaded


@contextmanager
def recorded(terminal: Terminal, loaded: Loaded, path: Path | None) -> Iterator[None]:
    """Record the routing of what happens inside, if there is a file to write it to."""
    if path is None:
        yield
        return
    with RoutingRecording(loaded.model, loaded.runtime.source) as recording:
        yield
    if not recording.steps:
        terminal.say("no token was computed: no routing was recorded")
        return
    save_trace(recording.trace(), path)
    terminal.say(f"{path}: routing of {recording.steps} passes")


def answer(
    terminal: Terminal, loaded: Loaded, prompt: str | list[dict[str, str]], **options: Any
) -> GenerateResult:
    """Generate one answer, streamed to stdout."""
    result = generate(loaded, prompt, on_text=terminal.write, **options)
    terminal.write("\n")
    return result
