"""Which experts the tokens of a running model choose → a routing trace.

Choices come from where they are made: from the core's engine, which notes them for blocks that run
in one call, and from `experts_forward` for all others. Hooks on the model say which forward pass
they belong to, and whose tokens it has.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from zipmoe.kv import SharedStep
from zipmoe.routing import Recorder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from zipmoe._expert_source import ExpertSource
    from zipmoe.routing import Trace

__all__ = ["RoutingRecording", "begins_request", "pass_shape"]


def begins_request(inputs: dict[str, Any]) -> bool:
    """Tell from a forward pass's arguments whether its tokens are the first ones."""
    past = inputs.get("past_key_values")
    return past is None or past.get_seq_length() == 0


class RoutingRecording:
    """Records what a model chooses while it is entered. One at a time.

    A forward pass that fails leaves no trace. Sequences of a batch are requests of their own, and
    every pass without a past begins some; others belong to those whose KV cache they are given.
    """

    def __init__(self, model: nn.Module, source: ExpertSource) -> None:
        self._model, self._source = model, source
        num_experts = max(layer.experts for layer in source.layers)
        self._recorder = Recorder(num_experts, len(source.layers))
        self._requests: list[int] = []  # of the pass, one for each sequence
        self._first_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._num_requests = 0
        self._chosen: dict[int, list[NDArray[np.int64]]] = {}
        self._hooks: list[Any] = []
        self.steps = 0

    def __enter__(self) -> Self:
        if self._source.on_routing is not None:
            raise RuntimeError("this model's routing is being recorded already")
        self._source.on_routing = self._note
        if self._source.engine is not None:
            self._source.engine.record_routing(is_on=True)
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(self._end, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._source.on_routing = None
        if self._source.engine is not None:
            self._source.engine.record_routing(is_on=False)

    def trace(self) -> Trace:
        """Give what was recorded.

        Raises
        ------
        TraceError
            Nothing was, or not every layer: experts of a family that asks for them one by one.
        """
        return self._recorder.trace()

    def _note(self, layer: int, experts: Tensor) -> None:
        self._chosen.setdefault(layer, []).append(experts.detach().long().numpy().copy())

    def _begin(self, _: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self._drain()
        self._chosen.clear()
        past, (batch, _) = inputs.get("past_key_values"), pass_shape(args, inputs)
        if isinstance(past, SharedStep):
            self._requests = [self._first(cache) for cache in past.caches]
            return
        first = self._new(past, batch) if begins_request(inputs) else self._first(past, batch)
        self._requests = [first + row for row in range(batch)]

    def _first(self, cache: Any, batch: int = 1) -> int:
        """Return the number of the first request whose KV cache this is."""
        first = self._first_of.get(cache)
        return self._new(cache, batch) if first is None else first  # it began before the recording

    def _new(self, cache: Any, batch: int) -> int:
        first, self._num_requests = self._num_requests, self._num_requests + batch
        if cache is not None:
            self._first_of[cache] = first
        return first

    def _end(self, _: Any, args: tuple[Any, ...], inputs: dict[str, Any], out: Any) -> None:
        self._drain()
        made = getattr(out, "past_key_values", None)
        if made is not None and inputs.get("past_key_values") is None:
            self._first_of[made] = self._requests[0]
        _, tokens = pass_shape(args, inputs)
        self._recorder.step([(request, tokens) for request in self._requests])
        for layer, parts in self._chosen.items():
            self._recorder.layer(layer, np.concatenate(parts))
        self._chosen.clear()
        self.steps += 1

    def _drain(self) -> None:
        if self._source.engine is not None:
            for layer, k, experts in self._source.engine.take_routing():
                part = np.array(experts, np.int64).reshape(-1, k)
                self._chosen.setdefault(layer, []).append(part)


def pass_shape(args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[int, int]:
    """Sequences of a forward pass, and the tokens of each."""
    named = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
    given = next((tensor for tensor in (*named, *args) if tensor is not None), None)
    assert given is not None
    return given.shape[0], given.shape[1]
