"""From the threads that compute to the loop that speaks: an answer's deltas, and who listens."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from zipmoe.serve.answer import Delta
from zipmoe.serve.errors import gone

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Listener"]


class Listener:
    """Takes deltas of one request. Made in the loop; `sink` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None

    def sink(self, delta: Delta) -> None:
        """Take what is new."""
        # The loop is closed only when the server ends by force: nobody listens then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, delta)

    async def next(self, patience: float | None) -> Delta | None:
        """Give the next delta; None: nothing came for `patience` seconds."""
        try:
            async with asyncio.timeout(patience):
                return await self._deltas.get()
        except TimeoutError:
            return None

    def watch(self, receive: Callable[[], Awaitable[Any]], on_gone: Callable[[], object]) -> None:
        """Notice from now on when the client leaves. receive: of its request, the body read."""
        self._watch = self._loop.create_task(self._watch_client(receive, on_gone))

    def close(self) -> None:
        """Listen no more."""
        if self._watch is not None:
            self._watch.cancel()

    async def _watch_client(
        self, receive: Callable[[], Awaitable[Any]], on_gone: Callable[[], object]
    ) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()
        self._deltas.put_nowait(Delta(0, error=gone()))
