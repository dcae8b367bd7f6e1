"""`source.json`, the way back to the checkpoint ↔ plain objects. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zipmoe._errors import CorruptError
from zipmoe._manifest import is_plain_name
from zipmoe._safetensors import Header, HeaderError, TensorPlace, parse_header, unique_keys
from zipmoe.recipe import Part, Recipe, check_coverage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zipmoe._manifest import Layer

__all__ = ["SOURCE", "Source", "SourceFile", "prove_recipes"]

SOURCE = "source.json"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the checkpoint: restored from `header` or `text`, or else copied."""

    name: str
    num_bytes: int
    sha256: str
    header: str | None = None
    text: str | None = None

    def parsed_header(self) -> Header:
        """Tensors of the file and their places."""
        return parse_header((self.header or "").encode(), self.num_bytes)


@dataclass(frozen=True, slots=True)
class Source:
    """What is needed to restore the checkpoint."""

    files: tuple[SourceFile, ...]
    tensors: dict[str, str]  # key → SHA-256
    recipes: tuple[Recipe, ...]  # by (layer, matrix)
    left_out: tuple[str, ...]

    def dump(self) -> bytes:
        """Give the bytes of source.json."""
        files = []
        for file in self.files:
            entry: dict[str, Any] = {"name": file.name, "bytes": file.num_bytes}
            entry["sha256"] = file.sha256
            if file.header is not None:
                entry["header"] = file.header
            if file.text is not None:
                entry["text"] = file.text
            files.append(entry)
        content = {
            "files": files,
            "tensors": dict(sorted(self.tensors.items())),
            "recipes": [recipe.to_json() for recipe in self.recipes],
            "left_out": list(self.left_out),
        }
        return json.dumps(content, indent=1).encode() + b"\n"

    @staticmethod
    def parse(data: bytes) -> Source:
        """Read source.json, whose SHA-256 has been checked; CorruptError where it is malformed."""
        try:
            content = json.loads(data.decode(), object_pairs_hook=unique_keys)
            files = tuple(_file(entry) for entry in content["files"])
            tensors = {str(key): _digest(value) for key, value in content["tensors"].items()}
            recipes = tuple(_recipe(entry) for entry in content["recipes"])
            left_out = tuple(str(name) for name in content.get("left_out", []))
        except (
            AttributeError,
            HeaderError,
            KeyError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise CorruptError(f"malformed: {error!r}", file=SOURCE) from error
        return Source(files, tensors, recipes, left_out)

    def places(self) -> dict[str, tuple[str, TensorPlace]]:
        """Key → (file, place) of every tensor of the checkpoint; CorruptError where they clash."""
        found: dict[str, tuple[str, TensorPlace]] = {}
        for file in self.files:
            if file.header is None:
                continue
            try:
                header = file.parsed_header()
            except (HeaderError, UnicodeError) as error:
                raise CorruptError(f"{file.name}: {error}", file=SOURCE) from error
            found.update({place.name: (file.name, place) for place in header.tensors})
        if found.keys() != self.tensors.keys():
            raise CorruptError("headers and checksums name different tensors", file=SOURCE)
        return found


def prove_recipes(source: Source, layers: Sequence[Layer]) -> set[str]:
    """Check that the recipes lead back exactly; gives the keys of the experts' tensors.

    Raises CorruptError where they do not fit the manifest's layers or the headers.
    """
    expected = [(at, m) for at, layer in enumerate(layers) for m in range(len(layer.matrices))]
    if [(recipe.layer, recipe.matrix) for recipe in source.recipes] != expected:
        raise CorruptError("there is not one recipe for each matrix", file=SOURCE)
    of_layers = [[r for r in source.recipes if r.layer == at] for at in range(len(layers))]
    shapes = {key: place.shape for key, (_, place) in source.places().items()}
    described = [
        (layer.experts, layer.matrices, recipes)
        for layer, recipes in zip(layers, of_layers, strict=True)
    ]
    try:
        check_coverage(described, shapes)
    except ValueError as error:
        raise CorruptError(f"the recipes are wrong: {error}", file=SOURCE) from error
    return {
        part.key(expert)[0]
        for layer, recipes in zip(layers, of_layers, strict=True)
        for recipe in recipes
        for part in recipe.parts
        for expert in range(layer.experts)
    }


def _file(entry: dict[str, Any]) -> SourceFile:
    header, text = entry.get("header"), entry.get("text")
    if not all(value is None or isinstance(value, str) for value in (header, text)):
        raise TypeError("header and text are text")
    if type(entry["bytes"]) is not int or not is_plain_name(entry["name"]):
        raise ValueError("bytes is a number, name a plain file name")
    return SourceFile(entry["name"], entry["bytes"], _digest(entry["sha256"]), header, text)


def _digest(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{value!r} is not a SHA-256")
    return value


def _recipe(entry: dict[str, Any]) -> Recipe:
    layer, matrix = entry["layer"], entry["matrix"]
    if type(layer) is not int or type(matrix) is not int:
        raise TypeError("layer and matrix are numbers")
    return Recipe(layer, matrix, tuple(Part.from_json(part) for part in entry["parts"]))
