"""Routed experts by the core's engine: in one call where it knows all that a module does.

Else product by product: biases, gates of a family's own and norms after each expert are then done
by the module, through torch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zipmoe import _core

if TYPE_CHECKING:
    from zipmoe._expert_source import ExpertMatrix

__all__ = ["GATES", "is_native", "is_one_call", "one_call", "product", "up"]


def is_native(standin: ExpertMatrix, x: Tensor) -> bool:
    """Tell whether products with these experts run on the engine: BF16 both."""
    return (
        standin.source.engine is not None
        and standin.layer.dtype is torch.bfloat16
        and x.dtype is torch.bfloat16
    )


# What the engine knows, by the class of the activation.
GATES = {
    "SiLUActivation": _core.Gate.silu,
    "SiLU": _core.Gate.silu,
    "GELUActivation": _core.Gate.gelu,
    "GELUTanh": _core.Gate.gelu_tanh,
    "ReLU": _core.Gate.relu,
    "ReLUSquaredActivation": _core.Gate.relu2,
}


def _gate_of(module: Any) -> _core.Gate | None:
    """Name the engine's own activation that does what this module does, if there is one."""
    own = "_apply_gate" in vars(type(module))
    stock = getattr(type(module), "_apply_gate", None) is _default_apply_gate()
    if (own and not stock) or module.has_bias or module.has_post_expert_norm:
        return None
    return GATES.get(type(module.act_fn).__name__)


@functools.cache
def _default_apply_gate() -> Any:
    # Not at import: transformers.integrations may still be loading.
    from transformers.integrations import moe  # noqa: PLC0415

    return moe._default_apply_gate


def is_one_call(module: Any, standin: ExpertMatrix, hidden: Tensor) -> bool:
    """Tell whether one call of the engine does all that this module does with its experts."""
    if not is_native(standin, hidden):
        return False
    known = standin.source.gates
    if type(module) not in known:
        known[type(module)] = _gate_of(module)
    return known[type(module)] is not None


def one_call(
    self: Any, standin: ExpertMatrix, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    source = standin.source
    gate = source.gates[type(self)]
    assert gate is not None
    hidden, index = hidden.contiguous(), index.long().contiguous()
    weights = weights.float().contiguous()
    tokens, columns = hidden.shape
    out = torch.empty(tokens, standin.layer.rows("down"), dtype=torch.bfloat16)
    source.engine.experts(
        source.cache,
        standin.layer.ordinal,
        index.data_ptr(),
        weights.data_ptr(),
        index.shape[1],
        self.num_experts,
        gate,
        hidden.data_ptr(),
        columns,
        tokens,
        out.data_ptr(),
        out.shape[1],
    )
    return out


def product(standin: ExpertMatrix, expert: int, role: str, x: Tensor) -> Tensor:
    source, layer = standin.source, standin.layer
    x = x.contiguous()
    out = torch.empty(x.shape[0], layer.rows(role), dtype=torch.bfloat16)
    source.engine.multiply_expert(
        source.cache,
        layer.ordinal,
        expert,
        layer.roles.index(role),
        x.data_ptr(),
        x.shape[1],
        x.shape[0],
        out.data_ptr(),
        out.shape[1],
    )
    return out


def up(self: Any, standin: ExpertMatrix, expert: int, x: Tensor) -> Tensor:
    """Gate and up as the family lays them out, biases added."""
    if not self.has_gate:
        h = product(standin, expert, "up", x)
    else:
        pair = [product(standin, expert, role, x) for role in ("gate", "up")]
        h = torch.stack(pair, 2).flatten(1) if standin.interleaved else torch.cat(pair, 1)
    if self.has_bias:
        h += (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[expert]
    return h
