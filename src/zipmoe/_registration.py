"""Make transformers know stores as soon as it is imported, without importing it for that.

`import zipmoe` must be enough for `AutoModelForCausalLM.from_pretrained(store)`, and must not
cost the seconds that torch and transformers take to import when nobody wants a model. So it
registers at once if transformers is there, and otherwise leaves a finder that waits for the
module with transformers' registry and then registers.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["register"]

_REGISTRY = "transformers.quantizers.auto"
_OURS = "zipmoe._quantizer"


def register() -> None:
    """Register zipmoe's quantizer with transformers: now, or when its registry is imported."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_OURS)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing but the registry, once, and has it loaded as it would have been."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """A loader that registers after the loader it wraps is done."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_OURS)
