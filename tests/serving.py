"""A server in this process, and what stands for the streams of a model where faults are wanted."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import uvicorn
from transformers.cache_utils import DynamicCache

import zipmoe
from zipmoe.serve.api import build
from zipmoe.serve.limits import Limits
from zipmoe.serve.server import bound_socket
from zipmoe.serve.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


class Stream:
    def __init__(self) -> None:
        self.cache, self.tokens = DynamicCache(), []

    @property
    def length(self) -> int:
        return len(self.tokens)


class OneByOne:
    """Like `zipmoe.streams.Streams`, each stream a pass of its own. `fail` is raised once."""

    def __init__(self, loaded: Any) -> None:
        self._model = loaded.model
        self._per_token = max(1, loaded.memory.kv // loaded.context)
        self.open_streams: set[Stream] = set()
        self.lock = threading.Lock()
        self.fail: list[Exception] = []
        self.prefilled: list[int] = []
        self.steps: list[int] = []
        self.before = lambda: None

    def open(self) -> Stream:
        stream = Stream()
        self.open_streams.add(stream)
        return stream

    def close(self, stream: Stream) -> None:
        self.open_streams.discard(stream)

    def truncate(self, stream: Stream, length: int) -> int:
        if length < stream.length:
            stream.cache.crop(length - stream.length)
            del stream.tokens[length:]
        return length

    def prefill(self, stream: Stream, token_ids: Sequence[int]) -> torch.Tensor:
        self.prefilled.append(len(token_ids))
        return self._forward(stream, token_ids)

    def decode(self, streams: Sequence[Stream], token_ids: Sequence[int]) -> torch.Tensor:
        self.steps.append(len(streams))
        return torch.stack([self._forward(s, [t]) for s, t in zip(streams, token_ids, strict=True)])

    @torch.no_grad()
    def _forward(self, stream: Stream, token_ids: Sequence[int]) -> torch.Tensor:
        self.before()
        if self.fail:
            raise self.fail.pop(0)
        with self.lock:
            out = self._model(
                input_ids=torch.tensor([list(token_ids)]),
                past_key_values=stream.cache,
                logits_to_keep=1,
            )
        stream.tokens += token_ids
        return out.logits[0, -1].float()

    def bytes_for(self, tokens: int) -> int:
        return tokens * self._per_token

    def step_bytes(self, streams: int) -> int:
        return 0


class Served:
    """A server of a store at `url`; its `service`, `streams` and log `lines`."""

    def __init__(self, loaded: Any, limits: Limits, key: str | None) -> None:
        self.loaded, self.lines = loaded, []
        self.streams = OneByOne(loaded)
        self.service = Service(loaded, self.streams, "tiny", limits)
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
    store: Path, *, limits: Limits | None = None, key: str | None = None, **options: Any
) -> Iterator[Served]:
    """Serve a store inside the block."""
    with zipmoe.load(store, memory="16GB", **options) as loaded:
        served = Served(loaded, limits or Limits(), key)
        served.start()
        try:
            yield served
        finally:
            served.stop()
