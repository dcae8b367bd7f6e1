"""Experts of a loaded model in fewer bits, while the store stays as it is.

`LoweredExperts` stands where the expert cache stood: what it decodes is rounded as the lossy store
would round it, each expert to its own width, so that a choice of widths can be measured without
writing a store. Widths are named as the codecs are; `LOSSLESS` leaves an expert as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from zipmoe._expert_source import DecodingCache, ExpertLayer

    Lower = Callable[[Tensor, str], Tensor]  # (weights [rows, columns], width) → the same, rounded

__all__ = ["LOSSLESS", "WIDTHS", "LoweredExperts", "Place"]

Place = tuple[int, int]  # layer, expert

LOSSLESS = "lossless"
WIDTHS = ("int2", "int4", "int8", LOSSLESS)  # from the fewest bits on


class LoweredExperts:
    """An expert cache whose experts have been rounded.

    What was rounded is kept, up to `keep_bytes`, for the passes to come.
    """

    def __init__(
        self,
        cache: DecodingCache,
        layers: Sequence[ExpertLayer],
        lower: Lower,
        *,
        keep_bytes: int = 0,
    ) -> None:
        self._cache, self._lower, self._room = cache, lower, keep_bytes
        self._matrices = [len(layer.roles) for layer in layers]
        self._dtypes = [layer.dtype for layer in layers]
        self._widths: dict[Place, str] = {}
        self._kept: dict[Place, dict[int, Tensor]] = {}

    def set_widths(self, widths: Mapping[Place, str]) -> None:
        """Give experts their widths; those not named are lossless."""
        for place in [*self._kept]:
            if widths.get(place, LOSSLESS) != self._widths.get(place, LOSSLESS):
                self._room += sum(matrix.nbytes for matrix in self._kept.pop(place).values())
        self._widths = dict(widths)

    def prefetch(
        self, layer: int, experts: Sequence[int], tokens: Sequence[int], num_tokens: int
    ) -> None:
        """Read what is not kept."""
        pairs = zip(experts, tokens, strict=True)
        absent = [(expert, count) for expert, count in pairs if not self._is_kept(layer, expert)]
        wanted = [expert for expert, _ in absent]
        self._cache.prefetch(layer, wanted, [count for _, count in absent], num_tokens)

    def decode(self, layer: int, expert: int, matrix: int, out: NDArray[np.generic]) -> None:
        """Give a matrix in the expert's width, as the bits of the model's dtype."""
        weights = torch.from_numpy(out).view(self._dtypes[layer])
        if self._is_kept(layer, expert):
            weights.copy_(self._kept[layer, expert][matrix])
            return
        self._cache.decode(layer, expert, matrix, out)
        width = self._widths.get((layer, expert), LOSSLESS)
        if width != LOSSLESS:
            weights.copy_(self._lower(weights, width))
        if weights.nbytes <= self._room:
            self._room -= weights.nbytes
            self._kept.setdefault((layer, expert), {})[matrix] = weights.clone()

    def _is_kept(self, layer: int, expert: int) -> bool:
        return len(self._kept.get((layer, expert), ())) == self._matrices[layer]

    def __getattr__(self, name: str) -> Any:
        """All else is the cache's own."""
        return getattr(self._cache, name)
