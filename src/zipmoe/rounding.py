"""Weights → the same weights as a lossy codec would give them back: encoded and decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zipmoe import _core

if TYPE_CHECKING:
    from torch import Tensor

    from zipmoe.lowered import Lower

__all__ = ["rounding"]


def rounding(scale_group: int, *, threads: int = 1) -> Lower:
    """Give the function that rounds BF16 matrices [rows, columns], any strides, to a width.

    `scale_group`: weights of a row that share a scale; 0: the whole row.
    """

    def lower(weights: Tensor, width: str) -> Tensor:
        bits = weights.view(torch.uint16).numpy()
        coded = _core.encode(
            width, bits, allow_raw=False, scale_group=scale_group, threads=threads
        )
        out = torch.empty(weights.shape, dtype=torch.uint16)
        _core.decode(
            width,
            coded.extents,
            out.numpy(),
            row_group=coded.row_group,
            k_tile=coded.k_tile,
            threads=threads,
        )
        return out.view(weights.dtype)

    return lower
