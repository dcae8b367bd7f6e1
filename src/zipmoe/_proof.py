"""Proof by example: transformers' own converter, run on one expert, must agree with our symbols.

The elements are seeded random bytes instead of weights, so that any exchange of rows or columns
shows, whatever the weights are, in half the memory. One run per distinct layout.
"""

from __future__ import annotations

import math
from copy import deepcopy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zipmoe._errors import UnsupportedModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zipmoe._symbolic import Piece, Symbolic
    from zipmoe.checkpoint import Checkpoint
    from zipmoe.conversion import Group

__all__ = ["prove"]


def prove(
    name: str,
    group: Group,
    made: dict[str, Symbolic],
    *,
    targets: dict[str, str],
    checkpoint: Checkpoint,
    model: Any,
    proven: set[Any],
) -> None:
    """Compare the first expert of every target pattern; `targets` gives their parameters' names.

    `proven` collects layouts already seen.

    Raises UnsupportedModelError where transformers and the symbols disagree.
    """
    if group.converter is None:
        return  # a renaming moves nothing
    layout = _layout(group, made, checkpoint)
    if layout in proven:
        return
    marked = _marked_sources(group, made, checkpoint)
    expected = _by_transformers(name, group, marked, model)
    for target, value in made.items():
        found = expected.get(targets[target])
        if found is None or not _agree(value, marked, found):
            raise UnsupportedModelError(
                f"zipmoe and transformers disagree on how {name} is made from the checkpoint"
            )
    proven.add(layout)


def _layout(group: Group, made: dict[str, Symbolic], checkpoint: Checkpoint) -> Any:
    sources = tuple(
        (pattern, len(keys), checkpoint.tensors[keys[0]].place.shape)
        for pattern, keys in sorted(group.keys.items())
    )
    operations = tuple(
        (type(op).__name__, str(sorted(vars(op).items()))) for op in group.converter.operations
    )
    targets = tuple((target, value.shape) for target, value in sorted(made.items()))
    return sources, operations, targets


def _first_expert(value: Symbolic) -> list[Piece]:
    return [piece for piece in value.pieces if 0 in piece.at[0]]


def _marked_sources(
    group: Group, made: dict[str, Symbolic], checkpoint: Checkpoint
) -> dict[str, NDArray[np.uint8]]:
    """Mark the sources of the first experts; of a fused tensor, a slice [1, ...]."""
    fused = {
        piece.tensor: piece.axes[0] is not None
        for value in made.values()
        for piece in _first_expert(value)
    }
    sources: dict[str, NDArray[np.uint8]] = {}
    for keys in group.keys.values():
        for key in keys:
            if key in fused:
                shape = checkpoint.tensors[key].place.shape
                shape = (1, *shape[1:]) if fused[key] else shape
                sources[key] = _mark(shape, seed=len(sources))
    return sources


def _mark(shape: tuple[int, ...], seed: int) -> NDArray[np.uint8]:
    data = np.random.default_rng(seed).bytes(math.prod(shape))
    return np.frombuffer(bytearray(data), np.uint8).reshape(shape)  # torch wants it writable


class _OneExpert:
    """Stands for the model where a conversion asks for a parameter's shape: one expert of it."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Any:
        shape = self._model.get_parameter(name).shape
        return SimpleNamespace(shape=torch.Size((1, *shape[1:])))


def _by_transformers(
    name: str, group: Group, sources: dict[str, NDArray[np.uint8]], model: Any
) -> dict[str, NDArray[np.uint8]]:
    converter = deepcopy(group.converter)
    for pattern, keys in group.keys.items():
        for key in keys:
            if key in sources:
                converter.add_tensor(name, key, pattern, torch.from_numpy(sources[key]))
    made = converter.convert(name, model=_OneExpert(model), config=model.config)
    plain = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
    return {key: value.numpy() for key, value in plain.items()}


def _agree(
    value: Symbolic, sources: dict[str, NDArray[np.uint8]], expected: NDArray[np.uint8]
) -> bool:
    """Whether the first expert's pieces fill `expected` [1, ...], each with its own elements."""
    pieces = _first_expert(value)
    filled = sum(math.prod(len(at) for at in piece.at[1:]) for piece in pieces)
    if expected.shape != (1, *value.shape[1:]) or filled != expected.size:
        return False
    return all(
        np.array_equal(expected[0][_box(piece.at[1:])], _taken(piece, sources)) for piece in pieces
    )


def _taken(piece: Piece, sources: dict[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Elements of one expert that a piece takes, in the order of the target's axes."""
    source, axes, spans = sources[piece.tensor], list(piece.axes), list(piece.taken)
    if axes[0] is not None:  # fused: the source here is the first expert's slice alone
        spans[0] = range(1)
    order = [axis for axis in axes if axis is not None]
    by_axis = {axis: span for axis, span in zip(axes, spans, strict=True) if axis is not None}
    box = source[_box(tuple(by_axis[axis] for axis in sorted(order)))].transpose(order)
    return box[0] if axes[0] is not None else box


def _box(spans: tuple[range, ...]) -> tuple[slice, ...]:
    return tuple(slice(span.start, span.stop, span.step) for span in spans)
