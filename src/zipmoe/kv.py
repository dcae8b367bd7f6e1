"""A KV cache that grows in place.

transformers' `DynamicCache` makes a new, larger copy of every layer's keys and values for every
token: with a long context that takes longer than attending to them. `attach` lets a model's caches
keep some room behind their last token instead, and hand out views. Bits stay what they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["GrowingLayer", "attach", "grow_in_place"]

_STEP = 256  # tokens of room to begin with, and at each growth


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with room behind its keys and values [batch, heads, tokens, width]."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: list[torch.Tensor] = []

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """Take over what a layer holds."""
        grown = cls()
        if layer.is_initialized:
            grown.dtype, grown.device, grown.is_initialized = layer.dtype, layer.device, True
            grown.keys, grown.values = layer.keys, layer.values
        return grown

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and give all keys and values."""
        begin = self.extend(key_states.shape, value_states.shape, key_states)
        self.keys[:, :, begin:] = key_states
        self.values[:, :, begin:] = value_states
        return self.keys, self.values

    def extend(
        self, key_shape: Sequence[int], value_shape: Sequence[int], like: torch.Tensor
    ) -> int:
        """Make room for keys and values of these shapes, for the caller to fill.

        Returns where it begins in `keys` and `values`, which have the new length. like: of the
        dtype that a new cache is to have.
        """
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        held, more = (self.keys, self.values), key_shape[-2]
        if not self._holds(held, more):
            shapes = (key_shape, value_shape)
            self._rooms = [self._room(old, new) for old, new in zip(held, shapes, strict=True)]
        begin = held[0].shape[-2] if held[0].numel() else 0
        keys, values = self._rooms
        self.keys, self.values = keys.narrow(2, 0, begin + more), values.narrow(2, 0, begin + more)
        return begin

    def _holds(self, held: tuple[torch.Tensor, torch.Tensor], more: int) -> bool:
        """Tell whether what is held lies in the rooms, which have space for some more tokens.

        It does not after something else than `update` has made new keys and values.
        """
        # Every attribute counts here, as in zipmoe.norm.
        for room, tensor in zip(self._rooms, held, strict=False):
            shape, wide = tensor.shape, room.shape
            if (
                room.data_ptr() != tensor.data_ptr()
                or shape[:2] != wide[:2]
                or shape[-2] + more > wide[-2]
                or tensor.stride() != room.stride()
            ):
                return False
        return bool(self._rooms)

    @staticmethod
    def _room(old: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        length = old.shape[-2] if old.numel() else 0
        tokens = -(-(length + shape[-2] + 1) // _STEP) * _STEP
        room = old.new_empty(*shape[:-2], tokens, shape[-1])
        if length:
            room[:, :, :length] = old
        return room

    def reset(self) -> None:
        """Forget everything, the room too."""
        self._rooms = []
        super().reset()


def grow_in_place(cache: Any) -> None:
    """Let the plain layers of a cache grow in place; layers of other kinds stay."""
    if type(cache) is DynamicCache:
        layers = cache.layers
        for number, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[number] = GrowingLayer.of(layer)


def attach(model: torch.nn.Module) -> None:
    """Let every cache that is given to this model grow in place, `generate`'s own included."""
    model.register_forward_pre_hook(_see, with_kwargs=True)


def _see(_: torch.nn.Module, __: Any, given: dict[str, Any]) -> None:
    grow_in_place(given.get("past_key_values"))
