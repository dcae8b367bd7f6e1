"""Sequences in progress, side by side: the model's side of continuous batching.

A stream is a sequence with a KV cache of its own. One decode step takes any streams a token
further: in one pass where all attention of the model is native and sees the whole sequence
(`Streams.is_ragged`), so that dense weights and each distinct expert are read and decoded once for
all; one after the other where states are latent, recurrent or slide. With compute="native" no bit
of a stream's logits depends on the others, on who came or went before, or on the memory granted.
With compute="torch" streams take turns, and only what torch promises holds.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from zipmoe import kv
from zipmoe._errors import UnsupportedModelError
from zipmoe.blocks import NativeAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from zipmoe.model import Loaded

__all__ = ["Stream", "Streams"]


class Stream:
    """One sequence in progress. `tokens`: what of prompt and answer its KV cache holds."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache  # None: the model makes one
        self.tokens: list[int] = []
        self.is_open = True
        self._places: NDArray[np.int64] | None = None  # [layers, kv.PLACE], as long as they hold
        self._room = 0

    @property
    def length(self) -> int:
        """Count the tokens."""
        return len(self.tokens)

    def places(self) -> NDArray[np.int64]:
        """Describe a cache that grows in place, with room for one more token, and counting it."""
        places, length = self._places, len(self.tokens)
        if places is None or length >= self._room:
            self.settle()
            layers = self.cache.layers
            places = self._places = np.array([layer.reserve(1) for layer in layers], np.int64)
            self._room = min(layer.capacity for layer in layers)
        places[:, -1] = length + 1
        return places

    def settle(self) -> None:
        """Let a cache's layers know of the tokens that shared steps have put into their rooms."""
        if self._places is not None:
            for layer in self.cache.layers:
                layer.resize(len(self.tokens))
            self._places = None


class Streams:
    """The streams of one model. Several threads may use it; a stream belongs to one at a time."""

    def __init__(self, loaded: Loaded) -> None:
        self._model, self._runtime = loaded.model, loaded.runtime
        if not self._model.can_generate():
            raise UnsupportedModelError(f"{type(self._model).__name__} does not generate text")
        self._runtime.announces_requests = False  # it would take each for the only one
        self._prefilling: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._decoding: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._last_only = {"logits_to_keep": 1} if self._model._supports_logits_to_keep() else {}
        self.is_ragged = _is_ragged(self._model, self._new_cache())

    def open(self) -> Stream:
        """Begin an empty sequence."""
        return Stream(self._new_cache())

    def close(self, stream: Stream) -> None:
        """Free its memory. Idempotent.

        A prefill of it that is under way in another thread ends at the next layer that keeps the
        whole sequence, with `kv.UnwantedError`.
        """
        for layer in getattr(stream.cache, "layers", ()):
            if isinstance(layer, kv.GrowingLayer):
                layer.is_wanted = False
        stream.cache, stream.tokens, stream.is_open = None, [], False
        with self._lock:
            self._decoding.discard(stream)

    @torch.no_grad()
    def prefill(self, stream: Stream, token_ids: list[int]) -> Tensor:
        """Append tokens; give the logits [vocabulary] after the last one, as the model has them.

        A request begins with it, for the expert cache too. If it fails, the stream is as it was
        before, as far as its family can go back (see `truncate`).

        Raises
        ------
        ValueError
            No tokens, or a closed stream.
        FetchError, CorruptError
            An expert could not be read. All streams can be used again.
        UnwantedError
            The stream was closed meanwhile.
        """
        _check_open([stream])
        if not token_ids:
            raise ValueError("a prefill needs at least one token")
        with self._lock:
            self._prefilling.add(stream)
            running = len({*self._prefilling, *self._decoding})
        try:
            self._runtime.cache.begin_request(1 / running)
            return self._forward(stream, token_ids)
        finally:
            with self._lock:
                self._prefilling.discard(stream)

    @torch.no_grad()
    def decode(self, streams: list[Stream], token_ids: list[int]) -> Tensor:
        """Append one token to each of some streams; give the logits [streams, vocabulary].

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
        if self.is_ragged:
            try:
                return self._step_together(streams, token_ids)
            except kv.NotSharedError:  # a part that native attention does not take after all
                self.is_ragged = False
        return self._step_in_turns(streams, token_ids)

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

    def fork(self, stream: Stream, length: int) -> Stream | None:
        """Begin a sequence with a copy of another's first `length` tokens.

        The other may be decoded meanwhile in another thread. None: its states cannot be parted, or
        it does not hold so many tokens any more.
        """
        layers = getattr(stream.cache, "layers", ())
        if not layers or any(type(layer) is not kv.GrowingLayer for layer in layers):
            return None
        tokens, copy = stream.tokens[:length], self.open()
        lending = self._runtime.lending
        assert lending is not None
        lending.begin(length)
        try:
            for ours, theirs in zip(copy.cache.layers, layers, strict=True):
                keys, values = theirs.keys[:, :, :length], theirs.values[:, :, :length]
                if not len(tokens) == keys.shape[2] == values.shape[2] == length:
                    return None
                ours.update(keys, values)
        finally:
            lending.end()
        copy.tokens = tokens
        return copy

    def _new_cache(self) -> Any:
        if not self._model._supports_default_dynamic_cache():
            return None
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        if self._runtime.compute == "native":
            kv.grow_in_place(cache)
        return cache

    def _forward(self, stream: Stream, token_ids: list[int]) -> Tensor:
        """Run some tokens of one stream."""
        stream.settle()
        try:
            out = self._model(
                input_ids=torch.tensor([token_ids]),
                past_key_values=stream.cache,
                use_cache=True,
                **self._last_only,
            )
        except BaseException:
            if stream.is_open:
                self._go_back(stream, stream.length)  # some layers may have the new tokens already
            raise
        if not stream.is_open:
            raise kv.UnwantedError("the stream was closed while its prompt was read")
        stream.cache = out.past_key_values
        stream.tokens.extend(token_ids)
        return out.logits[0, -1]

    def _step_together(self, streams: list[Stream], token_ids: list[int]) -> Tensor:
        places = np.stack([stream.places() for stream in streams], axis=1)
        out = self._model(
            input_ids=torch.tensor(token_ids).unsqueeze(1),
            position_ids=torch.tensor([[stream.length] for stream in streams]),
            past_key_values=kv.SharedStep([stream.cache for stream in streams], places),
            use_cache=True,
        )
        for stream, token in zip(streams, token_ids, strict=True):
            stream.tokens.append(token)
        return out.logits[:, -1]

    def _step_in_turns(self, streams: list[Stream], token_ids: list[int]) -> Tensor:
        lengths = [stream.length for stream in streams]
        try:
            rows = [self._forward(s, [t]) for s, t in zip(streams, token_ids, strict=True)]
        except BaseException:
            for stream, length in zip(streams, lengths, strict=True):
                if stream.is_open and stream.length > length:
                    self._go_back(stream, length)
            raise
        return torch.stack(rows)

    def _go_back(self, stream: Stream, length: int) -> None:
        layers = getattr(stream.cache, "layers", None)
        stream.settle()
        if length and layers is not None and all(map(_can_go_back, layers)):
            for layer in layers:
                layer.crop(min(length - layer.get_seq_length(), 0))
            del stream.tokens[length:]
        else:
            stream.cache, stream.tokens = self._new_cache(), []


def _is_ragged(model: Any, cache: Any) -> bool:
    """Tell whether native attention can do all there is to attend to, whatever the lengths."""
    layers = getattr(cache, "layers", ())
    native = {module.layer_idx for module in model.modules() if isinstance(module, NativeAttention)}
    # Rotations that depend on the longest sequence of a batch.
    kinds = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    depends = any("dynamic" in kind or "longrope" in kind for kind in kinds)
    is_whole = all(type(layer) is kv.GrowingLayer for layer in layers)
    return is_whole and not depends and native == {*range(len(layers))} != set()


def _can_go_back(layer: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.get_seq_length() < layer.sliding_window)
    return type(layer) in {DynamicLayer, kv.GrowingLayer}


def _check_open(streams: Sequence[Stream]) -> None:
    if not all(stream.is_open for stream in streams):
        raise ValueError("a closed stream")
