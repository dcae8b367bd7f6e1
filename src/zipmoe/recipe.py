"""Recipes: slices of checkpoint tensors ↔ the matrices of an expert, exact both ways.

Pure: numpy views and index arithmetic; no file, no torch, no knowledge of model families.
docs/format.md section 11 says what each field means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

__all__ = ["Matrix", "Part", "Recipe", "SliceKey", "build", "check_coverage", "restore"]

ROLES = ("gate", "up", "down")
_PART_KEYS = {"tensor", "expert_offset", "fused", "rows", "columns", "transpose", "into"}
_MAX = 1 << 31


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of an expert, as it is multiplied: [rows = out, columns = in]."""

    role: str
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a matrix, as a slice of a checkpoint tensor."""

    tensor: str  # "{e}" stands for the expert's number
    rows: range  # of the two-dimensional source
    columns: range
    into: range  # rows of the matrix
    expert_offset: int = 0
    fused: bool = False
    transpose: bool = False

    def key(self, expert: int) -> SliceKey:
        """Which two-dimensional source it reads for this expert."""
        number = expert + self.expert_offset
        return self.tensor.replace("{e}", str(number)), number if self.fused else None

    def view(self, source: NDArray[Any]) -> NDArray[Any]:
        """View the slice [len(into), columns of the matrix] of a two-dimensional source."""
        piece = source[_as_slice(self.rows), _as_slice(self.columns)]
        return piece.T if self.transpose else piece

    def to_json(self) -> dict[str, Any]:
        """Give the fields as in source.json; absent ones have their defaults."""
        fields: dict[str, Any] = {"tensor": self.tensor}
        if self.expert_offset:
            fields["expert_offset"] = self.expert_offset
        if self.fused:
            fields["fused"] = True
        fields["rows"], fields["columns"] = _triple(self.rows), _triple(self.columns)
        if self.transpose:
            fields["transpose"] = True
        fields["into"] = _triple(self.into)
        return fields

    @staticmethod
    def from_json(fields: Any) -> Part:
        """Check and read the fields of source.json; ValueError where they are not a part."""
        if not isinstance(fields, dict) or not set(fields) <= _PART_KEYS:
            raise ValueError(f"{fields!r} is not a part of a recipe")
        tensor, offset = fields.get("tensor"), fields.get("expert_offset", 0)
        flags = fields.get("fused", False), fields.get("transpose", False)
        if not isinstance(tensor, str) or type(offset) is not int or not 0 <= offset < _MAX:
            raise ValueError(f"{fields!r} is not a part of a recipe")
        if not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"{fields!r} is not a part of a recipe")
        rows, columns, into = (_span(fields.get(name)) for name in ("rows", "columns", "into"))
        return Part(tensor, rows, columns, into, offset, *flags)


SliceKey = tuple[str, int | None]  # tensor key, and the slice's number where it is fused


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one matrix of every expert of one layer came from the checkpoint."""

    layer: int
    matrix: int
    parts: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        """Give the fields as in source.json."""
        parts = [part.to_json() for part in self.parts]
        return {"layer": self.layer, "matrix": self.matrix, "parts": parts}


def build(
    matrix: Matrix, recipe: Recipe, expert: int, fetch: Callable[[SliceKey], NDArray[Any]]
) -> NDArray[Any]:
    """Make a matrix [rows, columns] of one expert from its sources; a view where that is possible.

    `fetch` gives the two-dimensional source of a slice.
    """
    views = [part.view(fetch(part.key(expert))) for part in recipe.parts]
    if len(views) == 1 and recipe.parts[0].into == range(matrix.rows):
        return views[0]
    whole = np.empty((matrix.rows, matrix.columns), views[0].dtype)
    for part, view in zip(recipe.parts, views, strict=True):
        whole[_as_slice(part.into)] = view
    return whole


def restore(
    recipes: Sequence[Recipe],
    matrices: Sequence[NDArray[Any]],
    expert: int,
    shape: Callable[[SliceKey], tuple[int, int]],
) -> dict[SliceKey, NDArray[Any]]:
    """Undo `build` for all matrices of one expert: the two-dimensional sources they came from."""
    sources: dict[SliceKey, NDArray[Any]] = {}
    for recipe, matrix in zip(recipes, matrices, strict=True):
        for part in recipe.parts:
            key = part.key(expert)
            if key not in sources:
                sources[key] = np.empty(shape(key), matrix.dtype)
            part.view(sources[key])[...] = matrix[_as_slice(part.into)]
    return sources


def check_coverage(
    layers: Sequence[tuple[int, Sequence[Matrix], Sequence[Recipe]]],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Prove that recipes are exact both ways, or raise ValueError naming what is not.

    `layers`: number of experts, matrices and recipes of each. `shapes`: of the checkpoint's
    tensors. Every row of a matrix comes from one part, every element of a source goes to one.
    """
    boxes: dict[str, list[tuple[int, range, range, range]]] = defaultdict(list)
    for number, (experts, matrices, recipes) in enumerate(layers):
        for matrix, recipe in zip(matrices, recipes, strict=True):
            _check_matrix(matrix, recipe)
            for part in recipe.parts:
                _add_boxes(boxes, number, experts, part)
    for tensor, found in boxes.items():
        _check_source(tensor, shapes, found)


def _check_matrix(matrix: Matrix, recipe: Recipe) -> None:
    rows = sorted(
        row for part in recipe.parts for row in (part.into[0], part.into[-1]) if part.into
    )
    if sum(len(part.into) for part in recipe.parts) != matrix.rows or (
        rows and (rows[0] < 0 or rows[-1] >= matrix.rows)
    ):
        raise ValueError(f"the parts of {recipe} do not fill {matrix}")
    for at, part in enumerate(recipe.parts):
        out, inner = len(part.rows), len(part.columns)
        if part.transpose:
            out, inner = inner, out
        if (out, inner) != (len(part.into), matrix.columns):
            raise ValueError(f"{part} does not fit {matrix}")
        if any(_overlap(part.into, other.into) for other in recipe.parts[:at]):
            raise ValueError(f"two parts of {recipe} fill the same rows")


def _add_boxes(
    boxes: dict[str, list[tuple[int, range, range, range]]], layer: int, experts: int, part: Part
) -> None:
    if part.fused or "{e}" not in part.tensor:
        numbers = range(part.expert_offset, part.expert_offset + experts)
        boxes[part.tensor].append((layer, numbers, part.rows, part.columns))
        return
    for expert in range(experts):
        boxes[part.key(expert)[0]].append((layer, range(1), part.rows, part.columns))


def _check_source(
    tensor: str,
    shapes: dict[str, tuple[int, ...]],
    boxes: Iterable[tuple[int, range, range, range]],
) -> None:
    if tensor not in shapes:
        raise ValueError(f"the checkpoint has no tensor {tensor!r}")
    shape = shapes[tensor]
    if len(shape) == 2:
        shape = (1, *shape)
    found = list(boxes)
    used = sum(len(a) * len(b) * len(c) for _, a, b, c in found)
    if len(shape) != 3 or used != shape[0] * shape[1] * shape[2]:
        raise ValueError(f"{used} elements of {tensor!r} of shape {shapes[tensor]} are used")
    for at, (layer, *box) in enumerate(found):
        for size, span in zip(shape, box, strict=True):
            if span and not (span[0] >= 0 and span[-1] < size):
                raise ValueError(f"a part leaves {tensor!r} of shape {shapes[tensor]}")
        for other_layer, *other in found[:at]:
            if all(_overlap(a, b) for a, b in zip(box, other, strict=True)):
                raise ValueError(f"elements of {tensor!r} are used twice")
            # unpack writes a slice from one record alone
            if layer != other_layer and _overlap(box[0], other[0]):
                raise ValueError(f"an expert's slice of {tensor!r} belongs to two layers")


def _overlap(a: range, b: range) -> bool:
    """Whether two ascending ranges share a number; no loop: lengths may come from a file."""
    common = math.gcd(a.step, b.step)
    apart = b.start - a.start
    if not a or not b or apart % common:
        return False
    period = b.step // common  # of b's numbers among a's
    first = a.start + a.step * (apart // common * pow(a.step // common, -1, period) % period)
    low = max(a.start, b.start)
    if first < low:
        first += -(-(low - first) // (a.step * period)) * a.step * period
    return first <= min(a[-1], b[-1])


def _as_slice(span: range) -> slice:
    return slice(span.start, span.stop, span.step)


def _triple(span: range) -> list[int]:
    return [span.start, span.stop, span.step]


def _span(triple: Any) -> range:
    if not isinstance(triple, list) or len(triple) != 3:
        raise ValueError(f"{triple!r} is not [start, stop, step]")
    if not all(type(v) is int and 0 <= v < _MAX for v in triple) or triple[2] < 1:
        raise ValueError(f"{triple!r} is not [start, stop, step]")
    return range(*triple)
