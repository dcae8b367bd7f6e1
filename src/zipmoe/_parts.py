"""Symbolic expert parameters → recipes: the parts of one expert, and how its number enters."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from zipmoe._errors import CheckpointError, UnsupportedModelError
from zipmoe.recipe import Part, Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zipmoe._symbolic import Piece, Symbolic

__all__ = ["derive_recipes"]


def derive_recipes(
    module: str, layer: int, experts: int, matrices: Sequence[Symbolic]
) -> tuple[Recipe, ...]:
    """Recipe of each matrix, given as a symbolic [experts or more, rows, columns]."""
    return tuple(
        Recipe(layer, number, _parts(f"{module}, matrix {number}", experts, matrix))
        for number, matrix in enumerate(matrices)
    )


def _parts(place: str, experts: int, matrix: Symbolic) -> tuple[Part, ...]:
    fused: list[Part] = []
    single: list[list[Part]] = [[] for _ in range(experts)]
    for piece in matrix.pieces:
        if piece.axes[0] is not None:
            fused.append(_fused_part(place, piece, matrix, experts))
        elif piece.at[0].start < experts:
            single[piece.at[0].start].append(_part(place, piece, matrix, (0, 1)))
    parts = fused
    if any(single):
        parts += _generalise(place, single)
    return tuple(sorted(parts, key=lambda part: (part.into.start, part.tensor)))


def _fused_part(place: str, piece: Piece, matrix: Symbolic, experts: int) -> Part:
    at, taken = piece.at[0], piece.taken[0]
    steady = len(at) == 1 or (at.step == 1 and taken.step == 1)
    if piece.axes[0] != 0 or not steady or at.start != 0 or at.stop < experts:
        raise UnsupportedModelError(
            f"{place}: {piece.tensor} does not hold its experts along its first dimension"
        )
    part = _part(place, piece, matrix, (1, 2))
    return replace(part, fused=True, expert_offset=taken.start)


def _part(place: str, piece: Piece, matrix: Symbolic, straight: tuple[int, int]) -> Part:
    """Read a piece as a slice of a two-dimensional source whose axes are `straight`."""
    if piece.at[2] != range(matrix.shape[2]):
        raise UnsupportedModelError(f"{place}: a row is put together from several tensors")
    if piece.axes[1:] == straight:
        rows, columns, turned = piece.taken[1], piece.taken[2], False
    elif piece.axes[1:] == straight[::-1]:
        rows, columns, turned = piece.taken[2], piece.taken[1], True
    else:
        raise UnsupportedModelError(f"{place}: {piece.tensor} is not a matrix per expert")
    return Part(piece.tensor, rows, columns, piece.at[1], transpose=turned)


def _generalise(place: str, experts: list[list[Part]]) -> list[Part]:
    """One list of parts with {e} for the number, from the parts of every expert."""
    first = experts[0]
    if len(experts) == 1:
        return first
    missing = next((e for e, parts in enumerate(experts) if len(parts) != len(first)), None)
    if missing is not None or not first:
        raise CheckpointError(f"{place}: the tensors of expert {missing or 0} are missing")
    general = [_template(place, part, other) for part, other in zip(first, experts[1], strict=True)]
    for expert, parts in enumerate(experts):
        for part, form in zip(parts, general, strict=True):
            key = form.key(expert)[0]
            if part != replace(form, tensor=key, expert_offset=0):
                raise CheckpointError(
                    f"{place}: expert {expert} should come from {key}, not from {part.tensor}: "
                    "an expert is missing, or they are not numbered one after the other"
                )
    return general


def _template(place: str, part: Part, other: Part) -> Part:
    """Put {e} where the keys of experts 0 and 1 differ."""
    words, others = (re.split(r"(\d+)", p.tensor) for p in (part, other))
    differ = [i for i, pair in enumerate(zip(words, others, strict=False)) if pair[0] != pair[1]]
    if len(words) != len(others) or len(differ) != 1 or not words[differ[0]].isdigit():
        raise UnsupportedModelError(
            f"{place}: {part.tensor} and {other.tensor} do not number their experts"
        )
    offset = int(words[differ[0]])
    words[differ[0]] = "{e}"
    return replace(part, tensor="".join(words), expert_offset=offset)
