"""Stand-ins for expert parameters, and where they take experts from.

`bind` puts a stand-in where each expert parameter of a transformers model stood. It knows the cache
and the engine by their contract (`_core.pyi`) only: nothing here knows files, codecs or the memory
budget.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from zipmoe._uncopied import Uncopied

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from zipmoe import _core

__all__ = ["ExpertLayer", "ExpertMatrix", "ExpertSource", "bind"]

# The element type as which a buffer is handed to the cache, by bytes per element.
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


class DecodingCache(Protocol):
    """What is needed of `zipmoe._core.ExpertCache`."""

    def prefetch(
        self, layer: int, experts: Sequence[int], tokens: Sequence[int], num_tokens: int
    ) -> None: ...
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

    The buffers belong to whoever holds `lock`: a forward pass takes it for one product at a time,
    so that two threads that run the same model do not decode into each other's weights. Nothing
    that waits for the engine may happen under it: the engine suspends calls for others' sake.
    """

    cache: DecodingCache
    layers: list[ExpertLayer]
    engine: Any = None  # `zipmoe._core.Engine`: compute="native"; None: torch multiplies
    lock: threading.Lock = field(default_factory=threading.Lock)
    gates: dict[type, _core.Gate | None] = field(default_factory=dict)  # see `is_one_call`
    # Told of (layer, experts [tokens, k]) where the engine does not choose: see `recording`.
    on_routing: Callable[[int, Tensor], None] | None = None
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


class ExpertMatrix(Uncopied):
    """Stands where a parameter [experts, ...] stood. Indexed by an expert, it decodes that expert.

    That is all that the forward passes of families outside transformers' experts interface ask of
    it. What they get is theirs to keep; the fast path of `experts_forward` uses shared buffers
    instead.
    """

    _why_not = "its experts are not in memory"

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
