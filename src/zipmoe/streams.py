"""Sequences in progress, side by side: the model's side of continuous batching.

A stream is a sequence with a KV cache of its own. One decode step takes any streams a token
further. With compute="native" no bit of a stream's logits depends on the others, on the order in
which they came, or on the memory granted; with compute="torch" they are only close to it.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from zipmoe import kv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zipmoe.model import Loaded

__all__ = ["Stream", "Streams"]


class Stream:
    """One sequence in progress. `tokens`: what of prompt and answer its KV cache holds."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache  # None: the model makes one
        self.tokens: list[int] = []
        self.is_open = True

    @property
    def length(self) -> int:
        """Count the tokens."""
        return len(self.tokens)


class Streams:
    """The streams of one model. Several threads may use it, one stream belongs to one at a time."""

    def __init__(self, loaded: Loaded) -> None:
        self._model, self._runtime = loaded.model, loaded.runtime
        self._context, self._report = loaded.context, loaded.memory
        self._prefilling: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._decoding: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._last_only = {"logits_to_keep": 1} if self._model._supports_logits_to_keep() else {}

    @property
    def is_ragged(self) -> bool:
        """Tell whether a step of several streams is one pass; if not, they take turns."""
        return False

    def open(self) -> Stream:
        """Begin an empty sequence."""
        return Stream(self._new_cache())

    def close(self, stream: Stream) -> None:
        """Free its memory. Idempotent."""
        stream.cache, stream.tokens, stream.is_open = None, [], False
        with self._lock:
            self._decoding.discard(stream)

    @torch.no_grad()
    def prefill(self, stream: Stream, token_ids: list[int]) -> Tensor:
        """Append tokens; give the logits [vocabulary] after the last one, FP32.

        A request begins with it. If it fails, the stream is as it was before, as far as its family
        can go back (see `truncate`).

        Raises
        ------
        ValueError
            No tokens, or a closed stream.
        FetchError, CorruptError
            An expert could not be read. All streams can be used again.
        """
        _check_open([stream])
        if not token_ids:
            raise ValueError("a prefill needs at least one token")
        with self._lock:
            self._prefilling.add(stream)
            self._runtime.running = len({*self._prefilling, *self._decoding})
        if stream.tokens:
            self._runtime.begin_request()  # otherwise the model's own hook does
        try:
            return self._forward(stream, token_ids)
        finally:
            with self._lock:
                self._prefilling.discard(stream)

    @torch.no_grad()
    def decode(self, streams: list[Stream], token_ids: list[int]) -> Tensor:
        """Append one token to each of some streams; give the logits [streams, vocabulary], FP32.

        If it fails, no stream has its token, as far as its family can go back (see `truncate`).

        Raises
        ------
        ValueError
            No streams, one of them twice, closed or empty, or not one token for each.
        FetchError, CorruptError
            An expert could not be read. All streams can be used again.
        """
        if not streams or len({*streams}) != len(streams) or len(streams) != len(token_ids):
            raise ValueError("a step needs distinct streams, and one token for each")
        _check_open(streams)
        if not all(stream.tokens for stream in streams):
            raise ValueError("a stream begins with a prefill")
        with self._lock:
            self._decoding = weakref.WeakSet(streams)
        lengths = [stream.length for stream in streams]
        try:
            rows = [self._forward(s, [t]) for s, t in zip(streams, token_ids, strict=True)]
        except BaseException:
            for stream, length in zip(streams, lengths, strict=True):
                if stream.length > length:
                    self._go_back(stream, length)
            raise
        return torch.stack(rows)

    def truncate(self, stream: Stream, length: int) -> int:
        """Forget all but the first `length` tokens; return how many are left.

        Fewer than `length`, that is none, where a family's states cannot go back (recurrent layers,
        a sliding window that has slid): `stream.tokens` says what to prefill again.
        """
        _check_open([stream])
        if not 0 <= length <= stream.length:
            raise ValueError(f"a stream of {stream.length} tokens cannot be cut to {length}")
        if length < stream.length:
            self._go_back(stream, length)
        return stream.length

    def bytes_for(self, tokens: int) -> int:
        """Bytes of a sequence of that many tokens: its KV cache, and the scratch of its prefill."""
        part = -(-(tokens + 256) // self._context)
        return (self._report.kv + self._report.scratch) * max(part, 1)

    def step_bytes(self, streams: int) -> int:
        """Bytes that a decode step of that many streams takes besides what they hold."""
        return self._report.scratch * -(-streams // self._context)

    def _new_cache(self) -> Any:
        if not self._model._supports_default_dynamic_cache():
            return None
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        kv.grow_in_place(cache)
        return cache

    def _forward(self, stream: Stream, token_ids: list[int]) -> Tensor:
        try:
            out = self._model(
                input_ids=torch.tensor([token_ids]),
                past_key_values=stream.cache,
                use_cache=True,
                **self._last_only,
            )
        except BaseException:
            self._go_back(stream, stream.length)  # some layers may have the new tokens already
            raise
        stream.cache = out.past_key_values
        stream.tokens.extend(token_ids)
        return out.logits[0, -1].float()

    def _go_back(self, stream: Stream, length: int) -> None:
        layers = getattr(stream.cache, "layers", None)
        if length and layers is not None and all(map(_can_go_back, layers)):
            for layer in layers:
                layer.crop(min(length - layer.get_seq_length(), 0))
            del stream.tokens[length:]
        elif stream.tokens or stream.cache is not None:
            stream.cache, stream.tokens = self._new_cache(), []


def _can_go_back(layer: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.get_seq_length() < layer.sliding_window
    return type(layer) in {DynamicLayer, kv.GrowingLayer}


def _check_open(streams: Sequence[Stream]) -> None:
    if not all(stream.is_open for stream in streams):
        raise ValueError("a closed stream")
