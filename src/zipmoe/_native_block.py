"""What native blocks share: a block of the core in the place of a module, and what it was made of.

A native block is a subclass of the class that it stands for, with the same parts under the same
names: hooks, `isinstance` and parameters keep their meaning, and `super().forward` is what
transformers wrote, for whatever the core cannot do (gradients, a foreign cache, parts that somebody
has changed or hooked).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zipmoe._uncopied import Uncopied

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["NativeBlock", "in_place_of", "takes"]

# Hooks of transformers that only look at what a module gives.
_LOOKING = "transformers.utils.output_capturing"


class NativeBlock(Uncopied, nn.Module):
    """What the native forms of both halves share: the core's block, and what it was made of."""

    native: Any = None  # None: it has been closed
    _parts: tuple[tuple[dict[str, Any], str, nn.Module, Any], ...] = ()
    _tensors: tuple[tuple[dict[str, Any], str, int], ...] = ()

    def made_of(self, native: Any, names: Iterable[str]) -> None:
        """Remember the core's block, and the parts and tensors that it refers to."""
        owners = [(self, name, getattr(self, name)) for name in names]
        owners += [
            (module, name, child)
            for _, _, part in owners
            for module in part.modules()
            for name, child in module.named_children()
        ]
        self.native = native
        self._parts = tuple(
            (owner._modules, name, part, vars(part).get("weight")) for owner, name, part in owners
        )
        self._tensors = tuple(
            (tensors, name, tensor.data_ptr())
            for _, _, part in owners
            for tensors in (part._parameters, part._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        )

    def close(self) -> None:
        """Give back the weights."""
        self.native = None

    def is_intact(self, *, looked_at: bool = True) -> bool:
        """Tell whether the parts are still those that the core's block was made of.

        looked_at: whether hooks that only look at what a part gives may be there.
        """
        for modules, name, part, weight in self._parts:
            own = part.__dict__
            if modules.get(name) is not part or own.get("weight") is not weight or "forward" in own:
                return False
            if (part._forward_hooks or part._forward_pre_hooks) and not (
                looked_at and _only_looked_at(part)
            ):
                return False
        for tensors, name, address in self._tensors:
            tensor = tensors.get(name)
            if tensor is None or tensor.data_ptr() != address:
                return False
        return self.native is not None and not self.training


def _only_looked_at(part: nn.Module) -> bool:
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    return all(getattr(hook, "__module__", "") == _LOOKING for hook in hooks)


def takes(x: torch.Tensor) -> bool:
    """Tell whether the core can compute with these states."""
    return (
        x.dtype is torch.bfloat16
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


@functools.cache
def _class_of(kind: Any, native: Any) -> Any:
    # Not at import, as in zipmoe._quantizer.validate_environment.
    from transformers import PreTrainedModel  # noqa: PLC0415

    if issubclass(kind, PreTrainedModel):  # transformers finds what it knows of one by its name
        return type(kind.__name__, (native, kind), {"__module__": kind.__module__})
    return type(f"Native{kind.__name__}", (native, kind), {"__module__": __name__})


def in_place_of(module: nn.Module, native: Any) -> Any:
    """Make a module of the native class that shares everything with the one it stands for."""
    own: Any = type(module)
    kind = _class_of(own, native)
    block = kind.__new__(kind)
    block.__dict__ = module.__dict__
    return block
