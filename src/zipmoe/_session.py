"""A packed model at work for the commands: load and answer.

Support of `cli.py`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .generate import generate
from .model import load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ._terminal import Terminal
    from .generate import GenerateResult
    from .model import Loaded


@contextmanager
def loaded_model(terminal: Terminal, store: Path, **options: Any) -> Iterator[Loaded]:
    """Load a store, say how the memory is shared out, and free everything at the end."""
    with load(store, **options) as loaded:
        terminal.say(str(loaded.memory))
        yield loaded


def answer(
    terminal: Terminal, loaded: Loaded, prompt: str | list[dict[str, str]], **options: Any
) -> GenerateResult:
    """Generate one answer, streamed to stdout."""
    result = generate(loaded, prompt, on_text=terminal.write, **options)
    terminal.write("\n")
    return result
