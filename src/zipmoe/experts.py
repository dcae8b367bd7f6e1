"""Routed experts of a transformers model, taken from the expert cache while it runs.

`experts_forward` is the function that transformers' experts interface calls instead of its own, for
modules whose parameters are stand-ins (`_expert_source.bind`). With `compute="native"` the engine
multiplies (`_expert_engine`).

Otherwise the function does what transformers' `grouped_mm` path does, operation by operation, so
its results are the same bits: the same sort, the same products of the same operands, the same order
of the last sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from zipmoe import _expert_engine
from zipmoe._expert_source import ExpertLayer, ExpertMatrix, ExpertSource, bind

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "IMPLEMENTATION",
    "ExpertLayer",
    "ExpertMatrix",
    "ExpertSource",
    "bind",
    "experts_forward",
    "is_chosen",
    "needs_whole",
    "runs_in_one_call",
]

IMPLEMENTATION = "zipmoe"
"""Name of `experts_forward` in transformers' experts interface."""

_COMBINED_ELEMENTS = 1 << 21  # of one block in the last sum


def is_chosen(config: Any) -> bool:
    """Tell whether `experts_forward` runs the experts of a model of this configuration."""
    return bool(config._experts_implementation == IMPLEMENTATION)


def experts_forward(
    self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the routed experts of one layer.

    Without an engine as transformers' `grouped_mm` does, bit for bit; with one, each token's states
    are the same bits whatever other tokens there are.

    Parameters
    ----------
    self : an experts module that `bind` has been at.
    hidden : [tokens, hidden], any floating dtype.
    top_k_index : [tokens, k], int64. Ids from the number of experts on (expert parallelism) count
    nothing. top_k_weights : [tokens, k].

    Returns
    -------
    Tensor
        [tokens, hidden] of the dtype of `hidden`.

    Raises
    ------
    FetchError, CorruptError
        From the cache. The model can be used again afterwards.
    """
    standin = self.down_proj
    if not isinstance(standin, ExpertMatrix):
        raise TypeError(
            "the experts implementation 'zipmoe' is for models loaded from a zipmoe store"
        )
    if hidden.device.type == "meta":
        return torch.empty_like(hidden)  # a skeleton is run for its shapes
    if hidden.device.type != "cpu":
        raise RuntimeError(f"zipmoe runs on the CPU; the hidden states are on {hidden.device}")
    if standin.source.on_routing is not None:
        standin.source.on_routing(standin.layer.ordinal, top_k_index)
    if _expert_engine.is_one_call(self, standin, hidden):
        total = _expert_engine.one_call(self, standin, hidden, top_k_index, top_k_weights)
        if torch.is_grad_enabled() and hidden.requires_grad:
            total = _NoGradient.apply(total, hidden)  # type: ignore[no-untyped-call]
        return total
    with torch.no_grad():
        ids, order = torch.sort(top_k_index.reshape(-1))
        groups = _groups(ids, self.num_experts)
        out = _run(self, standin, hidden, order // top_k_index.shape[1], groups)
        if self.has_post_expert_norm:
            out = self.post_expert_norm(out)
        out[groups[-1][2] if groups else 0 :] = 0  # rows of no expert
        total = _combine(out, order, top_k_weights).to(hidden.dtype)
    if torch.is_grad_enabled() and hidden.requires_grad:
        total = _NoGradient.apply(total, hidden)  # type: ignore[no-untyped-call]
    return total


class _NoGradient(torch.autograd.Function):
    """Lets a forward pass with gradients enabled through, and refuses the backward pass.

    Parameters keep requires_grad as transformers sets it, as torch chooses between kernels by it
    (matmul folds its operands when the second requires gradients), and bits depend on kernels.
    """

    @staticmethod
    def forward(_: Any, total: Tensor, __: Tensor) -> Tensor:
        return total.view_as(total)

    @staticmethod
    def backward(_: Any, *__: Tensor) -> NoReturn:
        raise RuntimeError("zipmoe is for inference: its experts have no gradients")


def _groups(ids: Tensor, num_experts: int) -> list[tuple[int, int, int]]:
    """(expert, first row, row after the last) of sorted ids, in ascending order of experts."""
    experts, counts = torch.unique_consecutive(ids, return_counts=True)
    groups, start = [], 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        if expert < num_experts:
            groups.append((expert, start, start + count))
        start += count
    return groups


def _combine(out: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Weigh the sorted outputs [tokens * k, hidden] and sum each token's k in their order.

    By blocks of tokens, so that nothing else of this size is held.
    """
    tokens, k = weights.shape
    hidden = out.shape[1]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0])
    total = out.new_empty(tokens, hidden, dtype=torch.promote_types(out.dtype, weights.dtype))
    step = max(1, _COMBINED_ELEMENTS // max(1, k * hidden))
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        rows = out[place[start * k : end * k]] * weights[start:end].reshape(-1, 1)
        total[start:end] = rows.view(end - start, k, hidden).sum(dim=1)
    return total


def _run(
    self: Any,
    standin: ExpertMatrix,
    hidden: Tensor,
    token: Tensor,
    groups: list[tuple[int, int, int]],
) -> Tensor:
    """Run each expert on the states of its tokens; rows of no expert are left undefined.

    `token` [rows] says whose state each sorted row is. Returns [rows, hidden] of the weights'
    dtype.
    """
    source, layer = standin.source, standin.layer
    tokens = [end - start for _, start, end in groups]
    source.cache.prefetch(layer.ordinal, [expert for expert, _, _ in groups], tokens, len(hidden))
    rows, dtype = token.shape[0], standin.dtype
    out = torch.empty(rows, layer.rows("down"), dtype=dtype)
    activate: Callable[[Tensor], Tensor] = self._apply_gate if self.has_gate else self.act_fn
    if not needs_whole(self):
        for expert, start, end in groups:
            h = _up(self, standin, expert, hidden[token[start:end]].to(dtype))
            _down(self, standin, expert, activate(h), out[start:end])
        return out
    wide = sum(rows for rows, _ in layer.shapes[:-1])
    h = torch.zeros(rows, wide, dtype=dtype)
    for expert, start, end in groups:
        h[start:end] = _up(self, standin, expert, hidden[token[start:end]].to(dtype))
    h = activate(h)
    for expert, start, end in groups:
        _down(self, standin, expert, h[start:end], out[start:end])
    return out


def _up(self: Any, standin: ExpertMatrix, expert: int, x: Tensor) -> Tensor:
    source, layer = standin.source, standin.layer
    if _expert_engine.is_native(standin, x):
        return _expert_engine.up(self, standin, expert, x)
    with source.lock:
        if self.has_gate:
            weights = source.gate_up(layer, expert, interleaved=standin.interleaved)
        else:
            weights = source.single(layer, expert, "up")
        h = torch.mm(x, weights.to(standin.dtype).t())
    if self.has_bias:
        h += (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[expert]
    return h


def _down(self: Any, standin: ExpertMatrix, expert: int, h: Tensor, out: Tensor) -> None:
    if _expert_engine.is_native(standin, h):
        out.copy_(_expert_engine.product(standin, expert, "down", h))
        if self.has_bias:
            out += self.down_proj_bias[expert]
        return
    with standin.source.lock:
        weights = standin.source.single(standin.layer, expert, "down").to(standin.dtype)
        torch.mm(h.to(weights.dtype), weights.t(), out=out)
    if self.has_bias:
        out += self.down_proj_bias[expert]


def needs_whole(module: Any) -> bool:
    """Tell whether the activation must see all rows of a layer at once, as it does in stock.

    torch runs whole vectors and the remainder of a tensor through different code. For SiLU they
    agree on all 65,536 values of BF16, and each expert's rows can be activated as they come; for
    GELU they do not agree. 16-bit types are tried in full, once per model; wider ones count as
    not agreeing.
    """
    standin = getattr(module, "down_proj", None)
    if not isinstance(standin, ExpertMatrix) or not hasattr(module, "has_gate"):
        return False
    known, key = standin.source.needs_whole, type(module)
    if key not in known:
        known[key] = standin.dtype.itemsize != 2 or not _same_everywhere(module, standin.dtype)
    return known[key]


def runs_in_one_call(module: Any) -> bool:
    """Tell whether the engine does all of an experts module's work; true of any other module."""
    standin = getattr(module, "down_proj", None)
    if not isinstance(standin, ExpertMatrix):
        return True
    if not hasattr(module, "has_gate"):
        return False
    probe = torch.empty(0, dtype=standin.layer.dtype)
    return _expert_engine.is_one_call(module, standin, probe)


def _same_everywhere(module: Any, dtype: torch.dtype) -> bool:
    """Try the activation on all values of a 16-bit type: one row, rows of one, rows of 64."""
    values = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.uint16).view(dtype)
    if module.has_gate:
        shapes = [(1, 1 << 16), (1 << 16, 1), (1 << 10, 64)]
        results = [_activated(module, values.view(shape)) for shape in shapes]
    else:
        spread = torch.stack([values, values], dim=1)[:, 0]  # strided, so no vector is used
        results = [module.act_fn(values), module.act_fn(spread).contiguous()]
    first, *others = [result.reshape(-1).nan_to_num(0.5) for result in results]
    return all(torch.equal(first, other) for other in others)


def _activated(module: Any, gate: Tensor) -> Tensor:
    """Apply the gate to rows of gate values and ones, in the layout of the family."""
    pair = [gate, torch.ones_like(gate)]
    if module.is_concatenated:
        gated = module._apply_gate(torch.cat(pair, dim=1))
    else:
        gated = module._apply_gate(torch.stack(pair, dim=2).flatten(1))
    assert isinstance(gated, Tensor)
    return gated
