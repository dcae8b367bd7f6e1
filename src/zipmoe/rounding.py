"""Weights → a lossy codec's codes for them, and what those stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zipmoe import _core

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Codes", "Rounding"]


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix in fewer bits."""

    coded: Any  # _core.Encoded
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(extent.nbytes for extent in self.coded.extents)


@dataclass(frozen=True)
class Rounding:
    """Rounds BF16 matrices [rows, columns], any strides, as a lossy store does.

    `scale_group`: weights of a row that share a scale; 0: the whole row.
    """

    scale_group: int = 64
    threads: int = 1

    def encode(self, weights: Tensor, width: str) -> Codes:
        """Round a matrix to a width, the name of a codec."""
        bits = weights.view(torch.uint16).numpy()
        coded = _core.encode(
            width,
            bits,
            allow_raw=False,
            scale_group=self.scale_group,
            threads=self.threads,
        )
        return Codes(coded, weights.shape)

    def decode(self, codes: Codes) -> Tensor:
        """Give what the codes stand for, in BF16."""
        coded = codes.coded
        out = torch.empty(codes.shape, dtype=torch.uint16)
        _core.decode(
            coded.codec,
            coded.extents,
            out.numpy(),
            row_group=coded.row_group,
            k_tile=coded.k_tile,
            threads=self.threads,
        )
        return out.view(torch.bfloat16)
