"""RMS norms by the native core, in the place of a model's own.

`replace_norms` recognises a norm by what it does, not by its name: a copy of it, with other
weights, is run on rows of several sizes and compared with each kind that the core knows. A norm
that is none of them (gated, grouped, centred) stays as it is.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zipmoe import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RMSNorm", "replace_norms"]

_PLAIN, _ROUNDED = _core.NormKind.plain, _core.NormKind.rounded
_WIDE, _PLUS1 = _core.NormKind.wide, _core.NormKind.wide_plus1
_ANY_WIDTH = 128  # to try norms without weights with
_WEIGHTS = (torch.bfloat16, torch.float32)


class RMSNorm(nn.Module):
    """A norm over the last dimension; BF16 goes to the core, all else through torch as before.

    Each row's bits depend on that row alone. `weight` is the parameter of the norm it replaces.
    """

    weight: nn.Parameter | None
    eps: float
    variance_epsilon: float

    def __init__(self, original: nn.Module, kind: Any, eps: float) -> None:
        super().__init__()
        self.register_parameter("weight", getattr(original, "weight", None))
        self.kind = kind
        self.eps = self.variance_epsilon = eps  # both are names that models read
        self.train(original.training)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        # Every attribute counts here: a product of one row takes less time than a few of them.
        x, weight = hidden_states, self._parameters.get("weight")
        width = x.shape[-1]
        address, is_wide = 0, False
        if x.dtype is not torch.bfloat16 or not width or not x.is_cpu:
            return self._by_torch(x)
        if weight is not None:
            address, is_wide = weight.data_ptr(), weight.dtype is torch.float32
            if weight.numel() != width or not (is_wide or weight.dtype is torch.bfloat16):
                return self._by_torch(x)
        if torch.is_grad_enabled() and (
            x.requires_grad or (weight is not None and weight.requires_grad)
        ):
            return self._by_torch(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // width
        at, to = x.data_ptr(), out.data_ptr()
        _core.rms_norm(at, rows, width, address, is_wide, to, kind=self.kind, eps=self.eps)
        return out

    def _by_torch(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight is None:
            return normed.to(x.dtype)
        if self.kind == _ROUNDED:
            return self.weight * normed.to(x.dtype)
        weight = self.weight.float()
        return ((1.0 + weight if self.kind == _PLUS1 else weight) * normed).to(x.dtype)

    def extra_repr(self) -> str:
        """Show what tells one norm from another."""
        shape = None if self.weight is None else tuple(self.weight.shape)
        return f"{shape}, eps={self.eps}, kind={self.kind}"


def replace_norms(model: nn.Module) -> tuple[list[str], list[str]]:
    """Put native norms where the model's own do the same; return the names replaced, and left.

    Names of modules called norms that stay as they are. Weights must be loaded: what is replaced
    keeps them, as the same parameters.
    """
    known: dict[Any, tuple[Any, float] | None] = {}
    replaced, left = [], []
    for name, parent, child, module in list(_norms(model)):
        weight = getattr(module, "weight", None)
        shape = None if weight is None else (tuple(weight.shape), weight.dtype)
        key = (type(module), shape, _eps(module))
        if key not in known:
            known[key] = _recognise(module)
        match = known[key]
        if match is None:
            left.append(name)
            continue
        if not isinstance(module, RMSNorm):
            setattr(parent, child, RMSNorm(module, *match))
        replaced.append(name)
    return replaced, left


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    for name, parent in model.named_modules():
        for child, module in parent.named_children():
            if "norm" in type(module).__name__.lower():
                yield (f"{name}.{child}" if name else child), parent, child, module


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _recognise(module: nn.Module) -> tuple[Any, float] | None:
    """Return the kind and eps of a norm that does what the core can do, else None."""
    eps = _eps(module)
    parameters = dict(module.named_parameters())
    weight = parameters.pop("weight", None)
    simple = not parameters and not list(module.buffers()) and not list(module.children())
    plain = len(inspect.signature(module.forward).parameters) == 1  # no gate, not even at choice
    if not (simple and plain and isinstance(eps, float)) or module._forward_hooks:
        return None
    if weight is not None and (weight.dim() != 1 or weight.dtype not in _WEIGHTS or weight.is_meta):
        return None
    generator = torch.Generator().manual_seed(0)
    twin, width = copy.deepcopy(module), _ANY_WIDTH
    if weight is not None:
        width = weight.numel()
        twin.weight.data = (0.5 + torch.rand(width, generator=generator)).to(weight.dtype)
    rows = torch.randn(24, width, generator=generator)
    sizes = torch.logspace(-3, 2, 24)[:, None]  # eps counts in some
    x = (rows * sizes).bfloat16().view(4, 6, width)
    for kind in (_ROUNDED, _WIDE, _PLUS1) if weight is not None else (_PLAIN,):
        if _is_same(twin, RMSNorm(twin, kind, eps), x):
            return kind, eps
    return None


@torch.no_grad()
def _is_same(one: nn.Module, other: nn.Module, x: torch.Tensor) -> bool:
    """Compare, but for what another order of the sum does: few values, in their last bit."""
    try:
        expected = one(x)
    except Exception:  # noqa: BLE001 - a norm that wants more than rows is not one of ours
        return False
    if not isinstance(expected, torch.Tensor) or expected.dtype != x.dtype:
        return False
    out = other(x)
    if out.shape != expected.shape:
        return False
    steps = (out.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    return bool(steps.max() <= 1 and (steps != 0).float().mean() <= 0.01)
