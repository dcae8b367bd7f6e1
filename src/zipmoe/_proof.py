"""Proof by example: transformers' own converter, run on one expert, must agree with our symbols.

The elements are numbered instead of read, so that any exchange of two of them shows, whatever the
weights are. One run per distinct layout.
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

_PRIME = 65_521  # elements a multiple of this apart share a number; no shift of rows does that


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
    numbered = _numbered_sources(group, made, checkpoint)
    expected = _by_transformers(name, group, numbered, model)
    for target, value in made.items():
        found = expected.get(targets[target])
        ours = _by_symbols(value, numbered)
        if found is None or not np.array_equal(found, ours):
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


def _numbered_sources(
    group: Group, made: dict[str, Symbolic], checkpoint: Checkpoint
) -> dict[str, NDArray[np.uint16]]:
    """Give numbered sources of the first experts; of a fused tensor, a slice [1, ...]."""
    fused = {
        piece.tensor: piece.axes[0] is not None
        for value in made.values()
        for piece in _first_expert(value)
    }
    sources: dict[str, NDArray[np.uint16]] = {}
    for keys in group.keys.values():
        for key in keys:
            if key in fused:
                shape = checkpoint.tensors[key].place.shape
                shape = (1, *shape[1:]) if fused[key] else shape
                sources[key] = _number(shape, salt=len(sources))
    return sources


def _number(shape: tuple[int, ...], salt: int) -> NDArray[np.uint16]:
    cycle = np.roll(np.arange(_PRIME, dtype=np.uint16), 7919 * (salt + 1))
    return np.resize(cycle, math.prod(shape)).reshape(shape)


class _OneExpert:
    """Stands for the model where a conversion asks for a parameter's shape: one expert of it."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Any:
        shape = self._model.get_parameter(name).shape
        return SimpleNamespace(shape=torch.Size((1, *shape[1:])))


def _by_transformers(
    name: str, group: Group, sources: dict[str, NDArray[np.uint16]], model: Any
) -> dict[str, NDArray[np.uint16]]:
    converter = deepcopy(group.converter)
    for pattern, keys in group.keys.items():
        for key in keys:
            if key in sources:
                tensor = torch.from_numpy(sources[key].view(np.int16))
                converter.add_tensor(name, key, pattern, tensor)
    made = converter.convert(name, model=_OneExpert(model), config=model.config)
    plain = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
    return {key: value.numpy().view(np.uint16) for key, value in plain.items()}


def _by_symbols(value: Symbolic, sources: dict[str, NDArray[np.uint16]]) -> NDArray[np.uint16]:
    made = np.zeros((1, *value.shape[1:]), np.uint16)
    for piece in _first_expert(value):
        source = sources[piece.tensor]
        taken = list(piece.taken)
        taken[0] = range(1)  # the expert's axis: stacked, or the first slice of a fused source
        order = [axis for axis in piece.axes if axis is not None]
        spans: list[slice] = [slice(None)] * len(order)
        for axis, span in zip(piece.axes, taken, strict=True):
            if axis is not None:
                spans[axis] = slice(span.start, span.stop, span.step)
        box = source[tuple(spans)].transpose(order)
        rows, columns = piece.at[1], piece.at[2]
        made[0, rows.start : rows.stop : rows.step, columns.start : columns.stop : columns.step] = (
            box[0] if piece.axes[0] is not None else box
        )
    return made
