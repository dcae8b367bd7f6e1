"""Dense records of a store → packed weights in memory, in the places of a model's parameters.

`bind` puts `PackedWeight`s where two-dimensional BF16 parameters stood, before anything is loaded;
`PackedDense.load` reads the records into one stretch of memory, verified, and gives each weight its
matrix. What else a model has (norms, biases, FP32 weights, tensors that transformers merges) is
loaded as ever.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from zipmoe import _core
from zipmoe.linear import AloneWeight, PackedWeight
from zipmoe.rows import DriveRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from zipmoe.store import DenseTensor, PackedRecord, Store

__all__ = ["PackedDense", "bind", "candidates", "collapse", "multiply_alone", "stretch"]

_ALIGNMENT = 64
_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1; Python has no name for it
WHOLE = ("zstd", "lz4hc")  # codecs that are decoded before they are multiplied


@dataclass
class PackedDense:
    """The packed weights of a model, by the name of their tensor in the store."""

    weights: dict[str, PackedWeight] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of memory, once loaded
    rows_only: set[str] = field(default_factory=set)  # of which nothing but rows is asked

    @property
    def nbytes(self) -> int:
        """Bytes that they take in memory, those that can stay on the drive not counted."""
        return sum(size for name, size in self.sizes.items() if name not in self.rows_only) + sum(
            DriveRows.resident_bytes(*self.weights[name].shape) for name in self.rows_only
        )

    @property
    def rows_bytes(self) -> int:
        """Bytes that those would take which can stay on the drive."""
        return sum(self.sizes[name] for name in self.rows_only)

    @property
    def loading_bytes(self) -> int:
        """Bytes held while loading, besides: a record is read before it finds its place."""
        return max(self.sizes.values(), default=0)

    def load(self, store: Store, engine: _core.Engine) -> None:
        """Read all records; those of `rows_only` are verified and stay where they are.

        Raises
        ------
        CorruptError, FetchError
            A record is not what was packed, or could not be read.
        """
        for name in sorted(self.rows_only):  # first: while there is most room
            weight, place = self.weights[name], store.packed_place(name)
            weight.rows, weight.engine = DriveRows(place, store.read_packed(name)), engine
        loaded = self.sizes.keys() - self.rows_only
        block, memory = stretch(sum(self.sizes[name] for name in loaded))
        at = 0
        for name, weight in self.weights.items():
            if name in self.rows_only:
                continue
            record = _multipliable(store, name)
            planes = []
            for plane in record.planes:
                view = memory[at : at + plane.size]
                view[:] = plane
                planes.append(view)
                at += _padded(plane.size)
            weight.matrix = _core.PackedMatrix(
                record.codec,
                (planes[0], planes[1]),
                rows=record.rows,
                columns=record.columns,
                row_group=record.row_group,
                k_tile=record.k_tile,
            )
            weight.engine = engine
        collapse(block)

    @property
    def decoded(self) -> list[str]:
        """Tensors that had to be decoded whole, because something else than a product was asked."""
        return sorted(name for name, weight in self.weights.items() if weight.decoded)

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        for weight in self.weights.values():
            if weight.rows is not None:
                weight.rows.close()
            weight.matrix = weight.rows = weight.engine = None
        self.weights.clear()


def bind(model: nn.Module, targets: Mapping[str, DenseTensor]) -> PackedDense:
    """Put packed weights in the places of parameters.

    `targets`: which tensor of the store each parameter is, where it is one as it stands.
    """
    dense = PackedDense()
    for parameter, tensor in targets.items():
        module_name, _, name = parameter.rpartition(".")
        module = model.get_submodule(module_name)
        weight = dense.weights.get(tensor.name)
        if weight is None:
            weight = dense.weights[tensor.name] = PackedWeight(tensor.shape)
            sizes = tensor.plane_bytes if tensor.codec not in WHOLE else (tensor.decoded_bytes,)
            dense.sizes[tensor.name] = sum(_padded(size) for size in sizes)
            if tensor.codec not in WHOLE:
                dense.rows_only.add(tensor.name)
        for place in _places(model, module, name):
            delattr(place, name)  # nn.Module refuses a plain object over a parameter
            setattr(place, name, weight)
    _untie(model, {*targets})
    others = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    multiplied = {id(getattr(module, "weight", None)) for module in others}
    dense.rows_only = {n for n in dense.rows_only if id(dense.weights[n]) not in multiplied}
    return dense


def _multipliable(store: Store, name: str) -> PackedRecord:
    """Read a record; one of a codec that cannot be multiplied packed is decoded."""
    record = store.read_packed(name)
    if record.codec not in WHOLE:
        return record
    planes = (store.read_dense(name).reshape(-1).view(np.uint8), np.empty(0, np.uint8))
    return replace(record, codec="raw", planes=planes, row_group=0, k_tile=0)


def _places(model: nn.Module, module: nn.Module, name: str) -> list[nn.Module]:
    """Modules whose parameter `name` is to be this one: tied ones too."""
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    full = next(n for n, m in model.named_modules() if m is module)
    sources = {f"{full}.{name}"}
    others = [target for target, source in tied.items() if source in sources]
    found = [module]
    for other in others:
        owner, _, attribute = other.rpartition(".")
        place = model.get_submodule(owner)
        if attribute == name and name in place._parameters:
            found.append(place)
    return found


def _untie(model: nn.Module, replaced: set[str]) -> None:
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    for key in [k for k, v in tied.items() if k in replaced or v in replaced]:
        del tied[key]  # there is nothing left to tie


def candidates(model: nn.Module) -> Iterator[str]:
    """Names of the parameters that may be packed: two-dimensional weights."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.endswith(".weight"):
            yield name


def multiply_alone(model: nn.Module) -> None:
    """Let products of weights that stayed plain be computed row by row (see `AloneWeight`)."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if name == "weight" and parameter is not None and parameter.dim() == 2:
                if isinstance(module, nn.Embedding) or not parameter.is_floating_point():
                    continue
                alone = parameter.data.as_subclass(AloneWeight)
                module._parameters[name] = nn.Parameter(alone, requires_grad=False)


def collapse(block: mmap.mmap) -> None:
    """Ask for huge pages where there were none when the memory was touched.

    A fragmented machine has none at hand, and products from small pages are a fifth slower. Only
    advice: older kernels do not know it, and a machine may have no memory in one piece.
    """
    with contextlib.suppress(OSError, ValueError):
        block.madvise(_MADV_COLLAPSE)


def stretch(size: int) -> tuple[mmap.mmap, NDArray[np.uint8]]:
    """Memory of its own, in huge pages where there are any, given back with its last view."""
    block = mmap.mmap(-1, max(size, 1) + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(block, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return block, whole[start : start + size]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
