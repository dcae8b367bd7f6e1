"""Symbolic tensors: where each element of a converted weight comes from, without its bytes.

Every conversion that transformers applies to expert weights moves whole axes (stack, concatenate,
split, transpose, interleave). So a symbolic tensor is a list of pieces, each a product of ranges,
and the operations below are arithmetic on ranges. They mirror transformers' own by exact class;
`conversion` proves the outcome against the originals on marked elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import core_model_loading as ops

from zipmoe._errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Context", "Piece", "Symbolic", "convert", "whole"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of elements from one source tensor.

    Axis a of the box stands at the indices `at[a]` of the symbolic tensor and holds the indices
    `taken[a]` of the source's axis `axes[a]`; an axis made by stacking has `axes[a]` None.
    """

    tensor: str
    at: tuple[range, ...]
    axes: tuple[int | None, ...]
    taken: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Symbolic:
    """A tensor as pieces of source tensors."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Context:
    """What a conversion may look at besides its tensors."""

    source_patterns: list[str]
    target_patterns: list[str]
    layer_name: str
    model: Any
    config: Any


Values = dict[str, list[Symbolic]]


def whole(tensor: str, shape: tuple[int, ...]) -> Symbolic:
    """Represent a source tensor as it is."""
    spans = tuple(range(size) for size in shape)
    return Symbolic(shape, (Piece(tensor, spans, tuple(range(len(shape))), spans),))


def convert(operations: Iterable[Any], values: Values, context: Context) -> dict[str, Symbolic]:
    """Run a converter's operations: source pattern → tensors becomes target pattern → tensor.

    Raises UnsupportedModelError for an operation that is not known here.
    """
    for operation in operations:
        run = _OPERATIONS.get(type(operation))
        if run is None:
            raise UnsupportedModelError(
                f"the weights of {context.layer_name} are converted by "
                f"{type(operation).__name__}, which zipmoe cannot undo exactly"
            )
        values = {key: [value] for key, value in run(operation, values, context).items()}
    return {key: value[0] for key, value in values.items()}


def stack(tensors: list[Symbolic], dim: int) -> Symbolic:
    """As torch.stack."""
    _same_shape(tensors)
    pieces = []
    for number, tensor in enumerate(tensors):
        at = range(number, number + 1)
        pieces += [
            Piece(
                piece.tensor,
                _insert(piece.at, dim, at),
                _insert(piece.axes, dim, None),
                _insert(piece.taken, dim, range(1)),
            )
            for piece in tensor.pieces
        ]
    return Symbolic(_insert(tensors[0].shape, dim, len(tensors)), tuple(pieces))


def concatenate(tensors: list[Symbolic], dim: int) -> Symbolic:
    """As torch.cat."""
    pieces = []
    start = 0
    for tensor in tensors:
        for piece in tensor.pieces:
            at = piece.at[dim]
            moved = range(at.start + start, at.stop + start, at.step)
            pieces.append(replace(piece, at=_put(piece.at, dim, moved)))
        start += tensor.shape[dim]
    _same_shape([Symbolic(_put(tensor.shape, dim, 0), ()) for tensor in tensors])
    return Symbolic(_put(tensors[0].shape, dim, start), tuple(pieces))


def take(tensor: Symbolic, dim: int, start: int, stop: int, step: int = 1) -> Symbolic:
    """As tensor[..., start:stop:step, ...] on axis dim."""
    window = range(*slice(start, stop, step).indices(tensor.shape[dim]))
    pieces = []
    for piece in tensor.pieces:
        for part in _common(piece.at[dim], window):
            first, last = piece.at[dim].index(part[0]), piece.at[dim].index(part[-1])
            every = (last - first) // (len(part) - 1) if len(part) > 1 else 1
            pieces.append(
                replace(
                    piece,
                    at=_put(piece.at, dim, _affine(part, window.start, window.step)),
                    taken=_put(piece.taken, dim, piece.taken[dim][first : last + 1 : every]),
                )
            )
    return Symbolic(_put(tensor.shape, dim, len(window)), tuple(pieces))


def transpose(tensor: Symbolic, dim0: int, dim1: int) -> Symbolic:
    """As torch.transpose."""
    order = list(range(len(tensor.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    pieces = tuple(
        Piece(
            piece.tensor,
            tuple(piece.at[a] for a in order),
            tuple(piece.axes[a] for a in order),
            tuple(piece.taken[a] for a in order),
        )
        for piece in tensor.pieces
    )
    return Symbolic(tuple(tensor.shape[a] for a in order), pieces)


def _merge(op: Any, values: Values, context: Context) -> dict[str, Symbolic]:
    return {
        op.get_target_pattern(len(values), source, context.target_patterns): stack(tensors, op.dim)
        for source, tensors in values.items()
    }


def _concatenate(op: Any, values: Values, context: Context) -> dict[str, Symbolic]:
    ordered = [t for source in context.source_patterns for t in values.get(source, [])]
    return {op.get_target_pattern(context.target_patterns): concatenate(ordered, op.dim)}


def _chunk(op: Any, values: Values, context: Context) -> dict[str, Symbolic]:
    tensor = _only(values)
    targets = op.get_target_patterns(context.target_patterns, config=context.config)
    size = math.ceil(tensor.shape[op.dim] / len(targets))
    return {
        target: take(tensor, op.dim, number * size, (number + 1) * size)
        for number, target in enumerate(targets)
    }


def _split(op: Any, values: Values, context: Context) -> dict[str, Symbolic]:
    tensor = _only(values)
    start, found = 0, {}
    for target in context.target_patterns:
        name = context.layer_name.replace(context.target_patterns[0], target)
        stop = start + context.model.get_parameter(name).shape[op.dim]
        found[target] = take(tensor, op.dim, start, stop)
        start = stop
    return found


def _split_list(op: Any, values: Values, context: Context) -> dict[str, Symbolic]:
    found = {}
    for source, (tensor, *_) in values.items():
        sizes = tensor.shape[op.dim]
        targets = op.get_target_patterns(values, source, context.target_patterns, sizes)
        for number, target in enumerate(targets):
            found[target] = _drop(take(tensor, op.dim, number, number + 1), op.dim)
    return found


def _transpose(op: Any, values: Values, context: Context) -> dict[str, Symbolic]:
    target = op.get_target_pattern(values, context.source_patterns, context.target_patterns)
    tensor = _only(values)
    if op.check_dims:
        expected = tuple(context.model.get_parameter(context.layer_name).shape)
        if tensor.shape == expected:
            return {target: tensor}
    return {target: transpose(tensor, op.dim0, op.dim1)}


def _interleave(op: Any, values: Values, context: Context) -> dict[str, Symbolic]:
    tensor, size = _only(values), _only(values).shape[op.dim]
    if op.inverse:  # element i of the two halves, in turn
        halves = [take(tensor, op.dim, 0, size // 2), take(tensor, op.dim, size // 2, size)]
        pieces = tuple(
            replace(piece, at=_put(piece.at, op.dim, _spread(piece.at[op.dim], number)))
            for number, half in enumerate(halves)
            for piece in half.pieces
        )
        return {context.target_patterns[0]: Symbolic(tensor.shape, pieces)}
    parities = [take(tensor, op.dim, number, size, 2) for number in (0, 1)]
    return {context.target_patterns[0]: concatenate(parities, op.dim)}


def _ernie(op: Any, values: Values, context: Context) -> dict[str, Symbolic]:
    """Text experts are the first half of every list, vision experts the second."""
    targets = context.target_patterns
    found: dict[str, list[Symbolic]] = {target: [] for target in targets}
    for source in context.source_patterns:
        tensors = values[source]
        size = math.ceil(len(tensors) / len(targets))
        for number, target in enumerate(targets):
            group = tensors[number * size : (number + 1) * size]
            found[target].append(stack(group, op.stack_dim))
    return {target: concatenate(group, op.concat_dim) for target, group in found.items()}


_OPERATIONS: dict[type, Callable[[Any, Values, Context], dict[str, Symbolic]]] = {
    ops.MergeModulelist: _merge,
    ops.Concatenate: _concatenate,
    ops.Chunk: _chunk,
    ops.Split: _split,
    ops.SplitModulelist: _split_list,
    ops.Transpose: _transpose,
    ops.Interleave: _interleave,
    ops.ErnieFuseAndSplitTextVisionExperts: _ernie,
}


def _only(values: Values) -> Symbolic:
    ((tensor, *_),) = values.values()
    return tensor


def _same_shape(tensors: list[Symbolic]) -> None:
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) != 1:
        raise ValueError(f"tensors of shapes {sorted(shapes)} cannot be joined")


def _common(a: range, b: range) -> list[range]:
    """Numbers in both, ascending, as ranges of constant step (at most one)."""
    step = math.lcm(a.step, b.step)
    low, high = max(a.start, b.start), min(a.stop, b.stop)
    for first in range(low, min(high, low + step)):
        if first in a and first in b:
            return [range(first, high, step)]
    return []


def _affine(part: range, start: int, step: int) -> range:
    """Positions of the members of `part` in range(start, ..., step)."""
    first = (part[0] - start) // step
    every = part.step // step if len(part) > 1 else 1
    return range(first, first + (len(part) - 1) * every + 1, every)


def _spread(at: range, offset: int) -> range:
    return range(2 * at.start + offset, 2 * (at.stop - 1) + offset + 1, 2 * at.step)


def _drop(tensor: Symbolic, dim: int) -> Symbolic:
    """Remove an axis of length 1 that stacking made."""
    if any(piece.axes[dim] is not None for piece in tensor.pieces):
        raise UnsupportedModelError("a fused expert tensor is split apart by the conversion")
    pieces = tuple(
        Piece(p.tensor, _omit(p.at, dim), _omit(p.axes, dim), _omit(p.taken, dim))
        for p in tensor.pieces
    )
    return Symbolic(_omit(tensor.shape, dim), pieces)


def _insert(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at:])


def _put(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _omit(values: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    return (*values[:at], *values[at + 1 :])
