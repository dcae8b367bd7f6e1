"""Routed experts of a transformers model, taken from the expert cache while it runs.

`bind` puts a stand-in where each expert parameter stood; `experts_forward` is the function that
transformers' experts interface calls instead of its own. Both know the cache by its contract
(`_core.pyi`) only: nothing here knows files, codecs or the memory budget.

The function does what transformers' `grouped_mm` path does, operation by operation, so its
results are the same bits: the same sort, the same products of the same operands, the same order
of the last sum.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "IMPLEMENTATION",
    "ExpertLayer",
    "ExpertMatrix",
    "ExpertSource",
    "bind",
    "experts_forward",
    "needs_whole",
]

IMPLEMENTATION = "zipmoe"
"""Name of `experts_forward` in transformers' experts interface."""

_COMBINED_ELEMENTS = 1 << 21  # of one block in the last sum
# The element type as which a buffer is handed to the cache, by bytes per element.
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


class DecodingCache(Protocol):
    """What is needed of `zipmoe._core.ExpertCache`."""

    def prefetch(self, layer: int, experts: Sequence[int]) -> None: ...
    def decode(self, layer: int, expert: int, matrix: int, out: NDArray[Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class ExpertLayer:
    """One experts module of the store: which matrices an expert has, in order of use.

    `roles` holds "gate", "up" and "down" in the order of the record; `shapes` their (rows,
    columns), that is (outputs, inputs).
    """

    ordinal: int
    module: str
    experts: int
    roles: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    def rows(self, role: str) -> int:
        """Count the outputs of the matrix of that role."""
        return self.shapes[self.roles.index(role)][0]

    def columns(self, role: str) -> int:
        """Count the inputs of the matrix of that role."""
        return self.shapes[self.roles.index(role)][1]


@dataclass
class Buffer:
    """Memory for one decoded matrix: a tensor [rows, columns], and its bits for the cache."""

    weights: Tensor
    bits: NDArray[np.generic]


@dataclass
class ExpertSource:
    """Decodes experts of a model into a few buffers that all layers share.

    The buffers belong to whoever holds `lock`: a forward pass takes it for one layer at a time,
    so that two threads that run the same model do not decode into each other's weights.
    """

    cache: DecodingCache
    layers: list[ExpertLayer]
    lock: threading.Lock = field(default_factory=threading.Lock)
    needs_whole: dict[type, bool] = field(default_factory=dict)  # see the function of that name
    _buffers: dict[tuple[str, int, int, torch.dtype], Buffer] = field(default_factory=dict)

    def gate_up(
        self, layer: ExpertLayer, expert: int, *, interleaved: bool, own: bool = False
    ) -> Tensor:
        """Decode gate and up as one matrix [2 * intermediate, hidden]; gate first, or row about."""
        rows = layer.rows("gate")
        out = self._buffer("gate_up", 2 * rows, layer.columns("gate"), layer.dtype, own=own)
        gate, up = (
            (slice(0, None, 2), slice(1, None, 2))
            if interleaved
            else (slice(rows), slice(rows, None))
        )
        self._decode(layer, expert, "gate", out.bits[gate])
        self._decode(layer, expert, "up", out.bits[up])
        return out.weights

    def single(self, layer: ExpertLayer, expert: int, role: str, *, own: bool = False) -> Tensor:
        """One matrix as the store has it, [outputs, inputs]."""
        out = self._buffer(role, layer.rows(role), layer.columns(role), layer.dtype, own=own)
        self._decode(layer, expert, role, out.bits)
        return out.weights

    def _decode(self, layer: ExpertLayer, expert: int, role: str, out: NDArray[np.generic]) -> None:
        self.cache.decode(layer.ordinal, expert, layer.roles.index(role), out)

    def _buffer(
        self, use: str, rows: int, columns: int, dtype: torch.dtype, *, own: bool
    ) -> Buffer:
        key = (use, rows, columns, dtype)
        if own or key not in self._buffers:
            bits = torch.empty(rows, columns, dtype=_BITS[dtype.itemsize])
            buffer = Buffer(bits.view(dtype), bits.numpy())
            if own:
                return buffer
            self._buffers[key] = buffer
        return self._buffers[key]

    @staticmethod
    def buffer_bytes(layers: Sequence[ExpertLayer]) -> int:
        """Bytes of all buffers that these layers will need (the decoded area)."""
        sizes = set()
        for layer in layers:
            for role, (rows, columns) in zip(layer.roles, layer.shapes, strict=True):
                fused = "gate" in layer.roles and role != "down"
                sizes.add((role == "down", rows * (2 if fused else 1), columns, layer.dtype))
        return sum(rows * columns * dtype.itemsize for _, rows, columns, dtype in sizes)


class ExpertMatrix:
    """Stands where a parameter [experts, ...] stood. Indexed by an expert, it decodes that expert.

    That is all that the forward passes of families outside transformers' experts interface ask of
    it. What they get is theirs to keep; the fast path of `experts_forward` uses shared buffers
    instead.
    """

    def __init__(
        self,
        source: ExpertSource,
        layer: ExpertLayer,
        role: str,
        parameter: Tensor,
        *,
        module: nn.Module,
    ) -> None:
        self.source, self.layer, self.role = source, layer, role
        self.shape, self.dtype, self.device = parameter.shape, parameter.dtype, torch.device("cpu")
        self.transposed = bool(getattr(module, "is_transposed", False))
        self.interleaved = not getattr(module, "is_concatenated", True)
        self._is_hf_initialized = (
            True  # or families that initialise from outside would try to fill it
        )

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """Decode one expert, shaped as the parameter's slice was."""
        ordinal = _expert_ordinal(expert)
        if self.role == "gate_up":
            weights = self.source.gate_up(
                self.layer, ordinal, interleaved=self.interleaved, own=True
            )
        else:
            weights = self.source.single(self.layer, ordinal, self.role, own=True)
        return weights.t() if self.transposed else weights

    def dim(self) -> int:
        """Count the dimensions of the parameter."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Shape of the parameter, or one length of it."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return int(self.shape[0])

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError("a model loaded by zipmoe cannot be copied: its experts are not in memory")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a model loaded by zipmoe cannot be pickled or saved: its experts are not in memory; "
            "`zipmoe unpack` restores the checkpoint"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"the experts of a model loaded by zipmoe are read on demand and have no {name!r}: "
            "set_experts_implementation('zipmoe') or ('eager') works, others need whole tensors"
        )


def _expert_ordinal(expert: int | Tensor) -> int:
    if isinstance(expert, Tensor) and expert.numel() != 1:
        raise TypeError("experts are read one at a time: index by one expert, not by several")
    return int(expert)


def bind(module: nn.Module, source: ExpertSource, layer: ExpertLayer) -> list[str]:
    """Put stand-ins in the place of an experts module's weights.

    Returns the names of the parameters replaced. Biases and norms stay what they are: dense
    weights.
    """
    roles = {"gate_up_proj": "gate_up"} if "gate" in layer.roles else {"up_proj": "up"}
    roles["down_proj"] = "down"
    for name, role in roles.items():
        parameter = module.get_parameter(name)
        delattr(module, name)  # nn.Module refuses a plain object over a parameter
        setattr(module, name, ExpertMatrix(source, layer, role, parameter, module=module))
    # Else _init_weights would fill the stand-ins.
    module._is_hf_initialized = True  # type: ignore[assignment]
    return list(roles)


def experts_forward(
    self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the routed experts of one layer: as transformers' `grouped_mm` does, bit for bit.

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
    with torch.no_grad(), standin.source.lock:
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
    source.cache.prefetch(layer.ordinal, [expert for expert, _, _ in groups])
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
    if self.has_gate:
        weights = source.gate_up(layer, expert, interleaved=standin.interleaved)
    else:
        weights = source.single(layer, expert, "up")
    h = torch.mm(x, weights.to(standin.dtype).t())
    if self.has_bias:
        h += (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[expert]
    return h


def _down(self: Any, standin: ExpertMatrix, expert: int, h: Tensor, out: Tensor) -> None:
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
