"""KV caches that grow in place, and several of them as one.

transformers' `DynamicCache` makes a new, larger copy of every layer's keys and values for every
token: with a long context that takes longer than attending to them. `attach` lets a model's caches
keep some room behind their last token instead, and hand out views. Bits stay what they are.

What native attention must know of a cache is written as int64 [sequences, 7]: the addresses of keys
and values, the strides of head and token of either, and the number of tokens (`PLACE`). A
`SharedStep` is such a table of sequences that have nothing in common but the step they make.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from zipmoe._errors import ZipmoeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

__all__ = [
    "PLACE",
    "GrowingLayer",
    "NotSharedError",
    "SharedLayer",
    "SharedStep",
    "UnwantedError",
    "attach",
    "grow_in_place",
    "room",
]

PLACE = 7  # numbers that describe a sequence's cache in one layer, the tokens being the last
STEP = 256  # tokens of room to begin with, and at each growth


def room(tokens: int) -> int:
    """Count the tokens for which there is room in a cache that holds so many."""
    return -(-(tokens + 1) // STEP) * STEP


class UnwantedError(ZipmoeError):
    """A sequence was given up while it was computed."""


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with room behind its keys and values [batch, heads, tokens, width]."""

    keys: torch.Tensor
    values: torch.Tensor
    is_wanted = True  # else nothing may be added: whoever is at it ends with `UnwantedError`

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
        if not self.is_wanted:
            raise UnwantedError("nobody wants these tokens any more")
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        begin = self.keys.shape[-2] if self.keys.numel() else 0
        self._make_room(key_shape, value_shape)
        self.resize(begin + key_shape[-2])
        return begin

    def place(self, shape: Sequence[int], like: torch.Tensor) -> int:
        """Extend it by keys and values of one shape; give the address of its `PLACE` numbers.

        They are there until the next call.
        """
        self.extend(shape, shape, like)
        self._place = array("q", [n for row in range(shape[0]) for n in self._describe(row)])
        return self._place.buffer_info()[0]

    def reserve(self, more: int) -> list[int]:
        """Have room for some more tokens behind what is held; give the `PLACE` numbers.

        Of a batch of one. They hold until there is no room left.
        """
        keys, values = self.keys.shape, self.values.shape
        self._make_room((*keys[:2], more, keys[3]), (*values[:2], more, values[3]))
        self.resize(keys[2])
        return self._describe(0)

    def resize(self, length: int) -> None:
        """Hold the first tokens of the room, whoever has filled it."""
        keys, values = self._rooms
        self.keys, self.values = keys.narrow(2, 0, length), values.narrow(2, 0, length)

    @property
    def capacity(self) -> int:
        """Tokens that it can hold without growing."""
        return self._rooms[0].shape[2] if self._rooms else 0

    def _describe(self, row: int) -> list[int]:
        keys, values = self.keys, self.values
        k, v, size = keys.stride(), values.stride(), keys.element_size()
        return [
            keys.data_ptr() + row * k[0] * size,
            values.data_ptr() + row * v[0] * size,
            *k[1:3],
            *v[1:3],
            keys.shape[2],
        ]

    def _make_room(self, key_shape: Sequence[int], value_shape: Sequence[int]) -> None:
        held = (self.keys, self.values)
        if not self._holds(held, key_shape[-2]):
            shapes = (key_shape, value_shape)
            self._rooms = [self._room(old, new) for old, new in zip(held, shapes, strict=True)]

    def _holds(self, held: tuple[torch.Tensor, torch.Tensor], more: int) -> bool:
        """Tell whether what is held lies in the rooms, which have space for some more tokens.

        It does not after something else than `update` has made new keys and values.
        """
        # Every attribute counts here, as in zipmoe.norm.
        for space, tensor in zip(self._rooms, held, strict=False):
            shape, wide = tensor.shape, space.shape
            if (
                space.data_ptr() != tensor.data_ptr()
                or shape[:2] != wide[:2]
                or shape[-2] + more > wide[-2]
                or tensor.stride() != space.stride()
            ):
                return False
        return bool(self._rooms)

    @staticmethod
    def _room(old: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        length = old.shape[-2] if old.numel() else 0
        wide = old.new_empty(*shape[:-2], room(length + shape[-2]), shape[-1])
        if length:
            wide[:, :, :length] = old
        return wide

    def reset(self) -> None:
        """Forget everything, the room too."""
        self._rooms = []
        super().reset()


class NotSharedError(ZipmoeError):
    """A step of several sequences met attention that is not native."""


class SharedLayer(CacheLayerMixin):
    """One layer of the caches of several sequences, each of its own length, for one more token.

    It holds no keys: native attention alone can use it.
    """

    is_sliding = False

    def __init__(self, address: int, longest: int) -> None:
        super().__init__()
        self._address, self._longest = address, longest

    def place(self, *_: Any) -> int:
        """Give the address of the `PLACE` numbers of each sequence."""
        return self._address

    def get_seq_length(self) -> int:
        """Count the tokens of the longest sequence without the new one."""
        return self._longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Give the number of keys, and that of the first."""
        return self._longest + query_length, 0

    def get_max_length(self) -> int:
        """Say that there is none."""
        return -1

    def lazy_initialization(self, *_: Any) -> NoReturn:
        """Refuse, as `update` does."""
        self.update()

    def update(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: nobody but native attention knows whose keys these are."""
        raise NotSharedError("this attention cannot tell which keys are whose")


class SharedStep(Cache):
    """The caches of several sequences as one, for a step of one token each.

    caches: of each sequence; it keeps them. places: int64 [layers, sequences, PLACE], with room for
    the new token and counting it.
    """

    def __init__(self, caches: Sequence[Cache], places: NDArray[np.int64]) -> None:
        assert places.flags.c_contiguous
        assert places.dtype == np.int64
        self.caches, self._places = caches, places
        address, layer_bytes = places.ctypes.data, places[0].nbytes
        longest = int(places[0, :, -1].max()) - 1
        super().__init__(
            layers=[SharedLayer(address + n * layer_bytes, longest) for n in range(len(places))]
        )


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
