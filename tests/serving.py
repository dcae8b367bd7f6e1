"""A server in this process, and what stands for the streams of a model where faults are wanted."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

import zipmoe
from zipmoe.serve.api import build
from zipmoe.serve.limits import Limits
from zipmoe.serve.server import bound_socket
from zipmoe.serve.service import Service
from zipmoe.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch


CONVERSATIONS = 16


class Watched(Streams):
    """Counts what is asked of it. `fail`: errors to raise, one for each pass."""

    def __init__(self, loaded: Any) -> None:
        super().__init__(loaded)
        self.fail: list[Exception] = []
        self.prefilled: list[int] = []
        self.steps: list[int] = []
        self.opened: weakref.WeakSet[Any] = weakref.WeakSet()
        self.before = lambda: None

    @property
    def open_streams(self) -> int:
        return sum(stream.is_open for stream in self.opened)

    def open(self) -> Any:
        stream = super().open()
        self.opened.add(stream)
        return stream

    def prefill(self, stream: Any, token_ids: list[int]) -> torch.Tensor:
        self.prefilled.append(len(token_ids))
        self._fault()
        return super().prefill(stream, token_ids)

    def decode(self, streams: list[Any], token_ids: list[int]) -> torch.Tensor:
        self.steps.append(len(streams))
        self._fault()
        return super().decode(streams, token_ids)

    def _fault(self) -> None:
        self.before()
        if self.fail:
            raise self.fail.pop(0)


class Served:
    """A server of a store at `url`; its `service`, `streams` and log `lines`."""

    def __init__(self, loaded: Any, limits: Limits, key: str | None, name: str) -> None:
        self.loaded, self.lines = loaded, []
        self.streams = Watched(loaded)
        self.service = Service(loaded, self.streams, name, limits)
        app = build(self.service, self.lines.append, key=key, is_local=True)
        self._socket = bound_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_config=None))
        run = {"sockets": [self._socket]}
        self._thread = threading.Thread(target=self._server.run, kwargs=run)

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.service.close()


@contextmanager
def serving(
    store: Path,
    *,
    limits: Limits | None = None,
    key: str | None = None,
    name: str = "tiny",
    memory: str = "16GB",
    **options: Any,
) -> Iterator[Served]:
    """Serve a store inside the block."""
    sizes = {"conversations": CONVERSATIONS, "streams": 16}
    with zipmoe.load(store, memory=memory, **sizes, **options) as loaded:
        served = Served(loaded, limits or Limits(), key, name)
        served.start()
        try:
            yield served
        finally:
            served.stop()
