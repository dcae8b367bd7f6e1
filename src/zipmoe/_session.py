"""A packed model at work for the commands: load, answer, and say what it took.

Support of `cli.py`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .budget import format_bytes
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


def measured(result: GenerateResult) -> str:
    """Say in two lines what an answer took."""
    cache, engaged = result.cache, result.engaged
    asked = cache["hits"] + cache["misses"]
    share = f"{cache['hits'] / asked:.0%} of {asked} experts" if asked else "no experts"
    pace = f", then {result.tpot_s * 1000:.0f} ms per token" if result.tpot_s else ""
    peak, promised = format_bytes(result.peak_rss_bytes), format_bytes(result.memory_bytes)
    return (
        f"{len(result.token_ids)} tokens: the first after {result.ttft_s:.2f} s{pace}; "
        f"{share} were in memory, {format_bytes(cache['bytes_read'])} read\n"
        f"peak {peak} of {promised} promised; {', '.join(engaged.values())}"
    )
