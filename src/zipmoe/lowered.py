"""Experts of a loaded model in fewer bits, while the store stays as it is.

`LoweredExperts` stands where the expert cache stood: what it decodes is rounded as the lossy store
would round it, each expert to its own width, so that a choice of widths can be measured without
writing a store. Widths are named as the codecs are; `LOSSLESS` leaves an expert as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from zipmoe._expert_source import DecodingCache
    from zipmoe.rounding import Codes, Rounding

__all__ = ["LOSSLESS", "WIDTHS", "LoweredExperts", "Place"]

Place = tuple[int, int]  # layer, expert

LOSSLESS = "lossless"
WIDTHS = ("int2", "int4", "int8", LOSSLESS)  # from the fewest bits on


class LoweredExperts:
    """An expert cache whose experts have been rounded: BF16 ones.

    Codes are kept, up to `keep_bytes`, for the passes to come; of widths that experts have not now
    only as long as there is room.
    """

    def __init__(self, cache: DecodingCache, rounding: Rounding, *, keep_bytes: int = 0) -> None:
        self._cache, self._rounding, self._room = cache, rounding, keep_bytes
        self._widths: dict[Place, str] = {}
        self._kept: dict[tuple[Place, str], dict[int, Codes]] = {}

    def set_widths(self, widths: Mapping[Place, str]) -> None:
        """Give experts their widths; those not named are lossless."""
        self._widths = {place: width for place, width in widths.items() if width != LOSSLESS}

    def prefetch(
        self, layer: int, experts: Sequence[int], tokens: Sequence[int], num_tokens: int
    ) -> None:
        """Read those of which nothing is kept."""
        wanted = [
            (expert, count)
            for expert, count in zip(experts, tokens, strict=True)
            if not self._codes((layer, expert))
        ]
        names = [expert for expert, _ in wanted]
        self._cache.prefetch(layer, names, [count for _, count in wanted], num_tokens)

    def decode(self, layer: int, expert: int, matrix: int, out: NDArray[np.generic]) -> None:
        """Give a matrix in the expert's width, as the bits of BF16."""
        place = layer, expert
        width = self._widths.get(place)
        codes = self._codes(place).get(matrix)
        if codes is None:
            self._cache.decode(layer, expert, matrix, out)
            if width is None:
                return
            codes = self._rounding.encode(torch.from_numpy(out).view(torch.bfloat16), width)
            self._keep(place, width, matrix, codes)
        torch.from_numpy(out).view(torch.bfloat16).copy_(self._rounding.decode(codes))

    def _codes(self, place: Place) -> dict[int, Codes]:
        width = self._widths.get(place)
        return {} if width is None else self._kept.get((place, width), {})

    def _keep(self, place: Place, width: str, matrix: int, codes: Codes) -> None:
        for other, other_width in [*self._kept]:
            if codes.nbytes <= self._room:
                break
            if self._widths.get(other) != other_width:
                gone = self._kept.pop((other, other_width))
                self._room += sum(code.nbytes for code in gone.values())
        if codes.nbytes <= self._room:
            self._room -= codes.nbytes
            self._kept.setdefault((place, width), {})[matrix] = codes

    def __getattr__(self, name: str) -> Any:
        """All else is the cache's own."""
        return getattr(self._cache, name)
