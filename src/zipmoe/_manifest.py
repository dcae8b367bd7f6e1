"""The manifest `zipmoe.json` ↔ plain objects, with its own checksum. No other file is looked at."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from zipmoe._errors import CorruptError, FormatError
from zipmoe._index import CODECS, LOSSLESS, MAX_EXPERTS
from zipmoe._lossy import Lossy
from zipmoe._safetensors import HeaderError, unique_keys
from zipmoe.recipe import ROLES, Matrix

__all__ = [
    "FORMAT_VERSION",
    "LOSSY_VERSION",
    "MANIFEST",
    "FileInfo",
    "Layer",
    "Manifest",
    "ShardInfo",
]

MANIFEST = "zipmoe.json"
FORMAT_VERSION = "1.0"
LOSSY_VERSION = "1.1"  # of stores with integers
MAX_BYTES = 1 << 30
_TAIL = re.compile(rb',\n "xxh3": "([0-9a-f]{16})"\n}\n\Z')


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one module."""

    module: str
    experts: int
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard and the checksums of its two descriptions."""

    name: str
    num_bytes: int
    kind: str  # "dense" or "experts"
    header_xxh3: int
    index_xxh3: int


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Any other file of the store."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a store consists of."""

    tool: str
    codec: dict[str, str]  # "experts", "dense"
    model: dict[str, str]  # "model_type", "architecture", "dtype"
    layers: tuple[Layer, ...]
    shards: tuple[ShardInfo, ...]
    files: tuple[FileInfo, ...]
    source_bytes: int
    store_bytes: int
    lossy: Lossy | None = None

    @property
    def format_version(self) -> str:
        """Which version of docs/format.md it takes to read the store."""
        return LOSSY_VERSION if self.lossy else FORMAT_VERSION

    @property
    def identity(self) -> str:
        """Tell this store from every other: a checksum of all that it consists of."""
        return xxhash.xxh3_64_hexdigest(self.dump())

    def dump(self) -> bytes:
        """Give the bytes of zipmoe.json."""
        content = {
            "format": "zipmoe",
            "format_version": self.format_version,
            "tool": self.tool,
            "codec": self.codec,
            "model": self.model,
            "layers": [asdict(layer) for layer in self.layers],
            "shards": [
                {
                    "name": shard.name,
                    "bytes": shard.num_bytes,
                    "kind": shard.kind,
                    "header_xxh3": f"{shard.header_xxh3:016x}",
                    "index_xxh3": f"{shard.index_xxh3:016x}",
                }
                for shard in self.shards
            ],
            "files": [
                {"name": file.name, "bytes": file.num_bytes, "sha256": file.sha256}
                for file in self.files
            ],
            "source_bytes": self.source_bytes,
            "store_bytes": self.store_bytes,
        }
        if self.lossy:
            content["lossy"] = self.lossy.dump()
        body = json.dumps(content, indent=1).encode().removesuffix(b"\n}")
        return body + f',\n "xxh3": "{xxhash.xxh3_64_hexdigest(body)}"\n}}\n'.encode()

    @staticmethod
    def parse(data: bytes) -> Manifest:
        """Check and read zipmoe.json.

        Raises FormatError for another format or version, CorruptError for anything malformed.
        """
        tail = _TAIL.search(data[-64:])
        body = data[: -len(tail.group(0))] if tail else b""
        sound = tail is not None and xxhash.xxh3_64_hexdigest(body).encode() == tail.group(1)
        try:
            content = json.loads(data.decode(), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError, HeaderError) as error:
            raise CorruptError(f"the manifest is not JSON: {error}", file=MANIFEST) from error
        if not isinstance(content, dict) or content.get("format") != "zipmoe":
            raise FormatError(f"{MANIFEST} is not the manifest of a zipmoe store")
        if content.get("format_version") not in (FORMAT_VERSION, LOSSY_VERSION):
            raise FormatError(
                f"{MANIFEST} has format version {content.get('format_version')!r}, this zipmoe "
                f"reads {FORMAT_VERSION} and {LOSSY_VERSION}: use the zipmoe that wrote it, or "
                "pack again"
            )
        if not sound:
            raise CorruptError("the manifest does not have its checksum", file=MANIFEST)
        try:
            return _read(content)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"the manifest is malformed: {error!r}", file=MANIFEST) from error


def is_plain_name(name: Any) -> bool:
    """Whether a store may hold a file of this name (docs/format.md section 2)."""
    return (
        isinstance(name, str)
        and name not in ("", MANIFEST)
        and not name.startswith(".")
        and not set(name) & {"/", "\\", "\0"}
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )


def _read(content: dict[str, Any]) -> Manifest:
    of_experts = CODECS if "lossy" in content else LOSSLESS
    codec = {
        "experts": _choice(content["codec"]["experts"], of_experts),
        "dense": _choice(content["codec"]["dense"], LOSSLESS),
    }
    model = {key: _text(content["model"][key]) for key in ("model_type", "architecture", "dtype")}
    layers = tuple(_layer(entry) for entry in content["layers"])
    if len(layers) > MAX_EXPERTS:
        raise ValueError("too many layers")
    shards = tuple(
        ShardInfo(
            _name(entry["name"]),
            _count(entry["bytes"]),
            _choice(entry["kind"], ("dense", "experts")),
            _checksum(entry["header_xxh3"], 16),
            _checksum(entry["index_xxh3"], 16),
        )
        for entry in content["shards"]
    )
    files = []
    for entry in content["files"]:
        _checksum(entry["sha256"], 64)
        files.append(FileInfo(_name(entry["name"]), _count(entry["bytes"]), entry["sha256"]))
    names = [shard.name for shard in shards] + [file.name for file in files]
    if len(set(names)) != len(names):
        raise ValueError("a file is listed twice")
    if ("lossy" in content) != (content["format_version"] == LOSSY_VERSION):
        raise ValueError(f"`lossy` stands in format version {LOSSY_VERSION}, and in no other")
    lossy = Lossy.parse(content["lossy"]) if "lossy" in content else None
    if lossy and [len(bits) for bits in lossy.bits] != [layer.experts for layer in layers]:
        raise ValueError("`lossy.bits` does not have a number for each expert")
    return Manifest(
        tool=_text(content["tool"]),
        codec=codec,
        model=model,
        layers=layers,
        shards=shards,
        files=tuple(files),
        source_bytes=_count(content["source_bytes"]),
        store_bytes=_count(content["store_bytes"]),
        lossy=lossy,
    )


def _layer(entry: dict[str, Any]) -> Layer:
    matrices = tuple(
        Matrix(_choice(m["role"], ROLES), _count(m["rows"]), _count(m["columns"]))
        for m in entry["matrices"]
    )
    experts = _count(entry["experts"])
    if experts > MAX_EXPERTS or not matrices:
        raise ValueError("too many experts, or none of their matrices")
    return Layer(_text(entry["module"]), experts, matrices)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _name(value: Any) -> str:
    if not is_plain_name(value):
        raise ValueError(f"{value!r} is not a plain file name")
    return str(value)


def _choice(value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return str(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a count")
    return value


def _checksum(value: Any, digits: int) -> int:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        raise ValueError(f"{value!r} is not a checksum of {digits} digits")
    return int(value, 16)
