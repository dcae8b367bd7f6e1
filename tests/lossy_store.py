"""A lossy store of the tiny models: experts of every width, in one layer and another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zipmoe._lossy import Loss
from zipmoe.requantize import requantize_store
from zipmoe.store import open_store

if TYPE_CHECKING:
    from pathlib import Path

LOSS = Loss(metric="perplexity", target=0.02, reached=0.013, calibration_sha256="ab" * 32)
WIDTHS = (8, 4, 2, 16)


def mixed(store: Path) -> list[list[int]]:
    """Every width in every layer, each expert's another than its neighbours'."""
    with open_store(store) as opened:
        return [
            [WIDTHS[(layer + expert) % 4] for expert in range(one.experts)]
            for layer, one in enumerate(opened.layers)
        ]


def write_lossy(store: Path, folder: Path) -> Path:
    requantize_store(store, folder, mixed(store), loss=LOSS)
    return folder
