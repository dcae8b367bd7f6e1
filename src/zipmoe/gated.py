"""Gated blocks of dense layers and shared experts in one call of the engine.

`replace_gated` finds modules that compute `down(act(gate(x)) * up(x))` and nothing else, by their
own source, and whose weights are packed.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zipmoe._expert_engine import GATES
from zipmoe.linear import PackedWeight

if TYPE_CHECKING:
    from zipmoe import _core

__all__ = ["GatedBlock", "replace_gated"]

_PARTS = ("gate_proj", "up_proj", "down_proj")
# The body of such a forward, white space aside.
_FORWARD = re.compile(
    r"(?:return|(\w+)=)self\.down_proj\(self\.act_fn\(self\.gate_proj\((\w+)\)\)\*self\.up_proj\(\2\)\)"
    r"(?:return\1)?$"
)


class GatedBlock(nn.Module):
    """Stands for such a module; its parts keep their names. Anything but BF16 goes through them."""

    def __init__(self, original: nn.Module, gate: _core.Gate) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.kind = gate
        self._weights: list[PackedWeight] = [getattr(original, part).weight for part in _PARTS]
        self.train(original.training)

    @property
    def parts(self) -> tuple[Any, Any, Any, _core.Gate]:
        """Gate, up and down as the core has them, and the activation."""
        gate, up, down = (weight.matrix for weight in self._weights)
        return gate, up, down, self.kind

    def forward(self, x: Tensor) -> Tensor:
        """Run it: [..., hidden] to [..., hidden], rounded once between the products."""
        gate, up, down = self._weights
        parts = self._modules
        if (
            x.dtype is not torch.bfloat16
            or not x.is_cpu
            or gate.engine is None
            or any(
                getattr(parts[part], "weight", None) is not weight
                for part, weight in zip(_PARTS, self._weights, strict=True)
            )
        ):
            inner = parts["act_fn"](parts["gate_proj"](x)) * parts["up_proj"](x)  # type: ignore[misc]
            return parts["down_proj"](inner)  # type: ignore[misc]
        x = x.contiguous()
        rows, columns = down.shape[0], gate.shape[1]
        out = torch.empty(*x.shape[:-1], rows, dtype=torch.bfloat16)
        gate.engine.gated(
            gate.matrix,
            up.matrix,
            down.matrix,
            self.kind,
            x.data_ptr(),
            columns,
            math.prod(x.shape[:-1]),
            out.data_ptr(),
            rows,
        )
        return out


def replace_gated(model: nn.Module) -> list[str]:
    """Put `GatedBlock`s in the places of gated blocks. Returns their names."""
    found = [
        (name, gate)
        for name, module in model.named_modules()
        if (gate := _gate_of(module)) is not None
    ]
    for name, gate in found:
        owner, _, attribute = name.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, attribute, GatedBlock(model.get_submodule(name), gate))
    return [name for name, _ in found]


def _gate_of(module: nn.Module) -> _core.Gate | None:
    parts = [getattr(module, part, None) for part in _PARTS]
    if not all(
        type(part) is nn.Linear and part.bias is None and isinstance(part.weight, PackedWeight)
        for part in parts
    ):
        return None
    if set(module._modules) - {*_PARTS, "act_fn"} or not _computes_that(type(module)):
        return None
    return GATES.get(type(getattr(module, "act_fn", None)).__name__)


def _computes_that(kind: Any) -> bool:
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    body = re.sub(r'("""|#).*', "", source.split(":", 1)[1].split("\n", 1)[1])
    return _FORWARD.search(re.sub(r"\s", "", body)) is not None
