"""A packed model at work for the commands: load and answer.

Support of `cli.py`.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._report import NEVER_MEASURED, beside
from .budget import available_memory, format_bytes
from .forecast import LEAST_TOKENS, Forecaster, RunForecast, scaled_rates
from .generate import generate
from .hardware import known_profile, remember_work
from .model import load
from .recording import RoutingRecording
from .routing import save_trace

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        if loaded.runtime.lossy:
            terminal.say(loaded.runtime.lossy.summary())
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


class Forecasts:
    """Says after each run of a loaded store what it should have taken, and learns from it."""

    def __init__(self, terminal: Terminal, loaded: Loaded) -> None:
        self._terminal, self._runtime = terminal, loaded.runtime
        self._forecaster: Forecaster | None = None
        self._is_asked = False

    def beside(self, result: GenerateResult) -> RunForecast | None:
        """Say and give the forecast of a run that is over; None where there is nothing to say.

        That is: with torch's products, whose rates nobody measures, and on a machine that was never
        measured. The latter is said once.
        """
        if not self._is_asked:
            self._is_asked, self._forecaster = True, self._begin()
        if self._forecaster is None:
            return None
        tokens = len(result.token_ids)
        forecast = self._forecaster.run(result.prompt_tokens, tokens, is_cold=result.is_cold)
        self._terminal.say(beside(forecast, result))
        if tokens >= LEAST_TOKENS:
            remember_work(self._runtime.identity, result.tpot_s - result.wait_s, tokens - 1)
        return forecast

    def _begin(self) -> Forecaster | None:
        runtime = self._runtime
        if runtime.compute != "native":
            return None
        measured = known_profile(Path(runtime.folder))
        if measured is None:
            self._terminal.say(NEVER_MEASURED.format(runtime.folder))
            return None
        return Forecaster(
            runtime.sizes,
            scaled_rates(measured, runtime.sizes, runtime.identity),
            slots=runtime.cache.slots,
            policy=runtime.cache.policy,
        )


def answer(
    terminal: Terminal, loaded: Loaded, prompt: str | list[dict[str, str]], **options: Any
) -> GenerateResult:
    """Generate one answer, streamed to stdout."""
    result = generate(loaded, prompt, on_text=terminal.write, **options)
    terminal.write("\n")
    return result
