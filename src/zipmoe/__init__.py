"""Run Mixture-of-Experts language models that do not fit in memory, bit for bit as published."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from zipmoe._errors import (
    BudgetError,
    CheckpointError,
    CorruptError,
    FetchError,
    FormatError,
    LossyError,
    MismatchError,
    QuantizationError,
    SpaceError,
    StoreError,
    TraceError,
    UnsupportedModelError,
    ZipmoeError,
)
from zipmoe._registration import register as _register

if TYPE_CHECKING:
    from zipmoe.model import Loaded, load
    from zipmoe.pack import pack_checkpoint
    from zipmoe.unpack import unpack_store

# For torch, which reads it when it is imported: its threads would wait by spinning, and take the
# cores from those that multiply, a seventh of the speed of a token.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "CorruptError",
    "FetchError",
    "FormatError",
    "Loaded",
    "LossyError",
    "MismatchError",
    "QuantizationError",
    "SpaceError",
    "StoreError",
    "TraceError",
    "UnsupportedModelError",
    "ZipmoeError",
    "__version__",
    "load",
    "pack_checkpoint",
    "unpack_store",
]

# Imported at first use: torch and transformers take seconds, and half of zipmoe needs neither.
_LAZY = {
    "Loaded": "zipmoe.model",
    "load": "zipmoe.model",
    "pack_checkpoint": "zipmoe.pack",
    "unpack_store": "zipmoe.unpack",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'zipmoe' has no attribute {name!r}")


_register()
