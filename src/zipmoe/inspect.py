"""A store → a summary of what it holds, from its manifest and indexes alone. Data only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zipmoe._index import CODECS, NOBODY, PAGE, ROLES, ceil_to
from zipmoe._outside import OUTSIDE
from zipmoe.store import DTYPE_NAMES, Store, decoded_bytes, open_store

if TYPE_CHECKING:
    import os

    from zipmoe._manifest import Manifest
    from zipmoe._shard import OpenShard

__all__ = ["KindSummary", "StoreSummary", "inspect_store", "summarise"]


@dataclass(frozen=True, slots=True)
class KindSummary:
    """All matrices of one kind: gate, up, down or dense."""

    kind: str
    matrices: int
    source_bytes: int
    stored_bytes: int  # padding included
    ratio: float  # stored_bytes / source_bytes
    bits_per_weight: float
    codecs: dict[str, int]  # codec → matrices
    dtypes: dict[str, int]  # dtype → matrices


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What a store holds. Sizes are in bytes."""

    model: dict[str, str]  # model_type, architecture, dtype
    tool: str
    format_version: str
    codec: dict[str, str]  # what was asked for: "experts", "dense"
    layers: int  # modules with routed experts
    experts: int  # in all layers
    source_bytes: int
    store_bytes: int
    ratio: float  # store_bytes / source_bytes
    bits_per_weight: float  # of the routed experts, padding included
    kinds: list[KindSummary]
    raw: list[tuple[str, str]]  # (tensor or expert matrix, why it is stored raw)
    left_out: list[str]  # of the checkpoint, not kept
    lossy: dict[str, Any] | None  # None: every bit is there
    # What native bits of a token depend on besides its own past: "batch", "cuts", "padding".
    depends_on: list[str]


def inspect_store(store: str | os.PathLike[str]) -> StoreSummary:
    """Open a store, checked as for a load, and summarise it."""
    with open_store(store) as opened:
        return summarise(opened)


def summarise(store: Store) -> StoreSummary:
    """Summarise an open store."""
    manifest = store.manifest
    rows = [(shard, entry) for shard in store.shards for entry in shard.entries]
    kinds = []
    for kind in ROLES:
        chosen = [entry for _, entry in rows if ROLES[entry["role"]] == kind]
        if chosen:
            kinds.append(_kind(kind, chosen))
    routed = [entry for _, entry in rows if entry["layer"] != NOBODY]
    return StoreSummary(
        model=dict(manifest.model),
        tool=manifest.tool,
        format_version=manifest.format_version,
        codec=dict(manifest.codec),
        layers=len(manifest.layers),
        experts=sum(layer.experts for layer in manifest.layers),
        source_bytes=manifest.source_bytes,
        store_bytes=manifest.store_bytes,
        ratio=manifest.store_bytes / max(1, manifest.source_bytes),
        bits_per_weight=_bits_per_weight(routed),
        kinds=kinds,
        raw=[(_name(shard, entry), _why_raw(store, entry)) for shard, entry in rows if _raw(entry)],
        left_out=list(store.source.left_out),
        lossy=_lossy(manifest),
        depends_on=list(OUTSIDE.get(_family(manifest.model["model_type"]), ())),
    )


def _lossy(manifest: Manifest) -> dict[str, Any] | None:
    """Say how many experts of all and of each layer have which width, and what it costs."""
    lossy = manifest.lossy
    if lossy is None:
        return None
    return lossy.brief() | {"summary": lossy.summary(), "layers": lossy.counts_by_layer()}


def _family(model_type: str) -> str:
    return model_type.replace("-", "_").removesuffix("_text")


def _kind(kind: str, entries: list[Any]) -> KindSummary:
    source = sum(decoded_bytes(entry) for entry in entries)
    stored = sum(_stored_bytes(entry) for entry in entries)
    return KindSummary(
        kind=kind,
        matrices=len(entries),
        source_bytes=source,
        stored_bytes=stored,
        ratio=stored / max(1, source),
        bits_per_weight=_bits_per_weight(entries),
        codecs=dict(Counter(CODECS[entry["codec"]] for entry in entries)),
        dtypes=dict(Counter(DTYPE_NAMES[int(entry["dtype"])] for entry in entries)),
    )


def _stored_bytes(entry: Any) -> int:
    return int(ceil_to(entry["extents"][:2, 1], PAGE).sum())


def _bits_per_weight(entries: list[Any]) -> float:
    weights = sum(int(entry["rows"]) * int(entry["columns"]) for entry in entries)
    return 8 * sum(_stored_bytes(entry) for entry in entries) / max(1, weights)


def _raw(entry: Any) -> bool:
    return bool(entry["codec"] == 0)


def _name(shard: OpenShard, entry: Any) -> str:
    name = shard.records[int(entry["record"])].name
    return name if entry["layer"] == NOBODY else f"{name}.{ROLES[entry['role']]}"


def _why_raw(store: Store, entry: Any) -> str:
    dtype = DTYPE_NAMES[int(entry["dtype"])]
    dense = entry["layer"] == NOBODY
    if dtype != "BF16":
        return f"dtype {dtype} has no codec"
    if store.manifest.codec["dense" if dense else "experts"] == "raw":
        return "the codec raw was chosen"
    if dense and entry["rows"] == 1:
        return "a vector"
    return "it would not shrink"
