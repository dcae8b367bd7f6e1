"""Checkpoint and model → what a pack will write, before it writes anything. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import xxhash

from zipmoe import __version__
from zipmoe._errors import CheckpointError
from zipmoe._index import LOSSLESS
from zipmoe._manifest import FORMAT_VERSION
from zipmoe._shard import MatrixPlan, RecordPlan, ShardPlan, as_matrix, plan_shards

if TYPE_CHECKING:
    from zipmoe.checkpoint import Checkpoint
    from zipmoe.conversion import ExpertLayer, ModelPlan
    from zipmoe.recipe import SliceKey

__all__ = ["PackPlan", "make_plan"]


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Everything that decides the bytes of a store."""

    checkpoint: Checkpoint
    model: ModelPlan
    codecs: dict[str, str]  # kind of shard → codec
    shards: tuple[ShardPlan, ...]  # experts, then dense

    @property
    def weight_bytes(self) -> int:
        """All weights as they are."""
        return sum(record.raw_bytes for shard in self.shards for record in shard.records)

    @property
    def most_bytes(self) -> int:
        """The most that the store can take: nothing shrinks."""
        small = sum(file.num_bytes for file in self.checkpoint.small_files)
        headers = sum(len(shard.header.text) for shard in self.checkpoint.shards)
        described = 4 * (headers + small) + 1024 * len(self.checkpoint.tensors)
        return sum(shard.most_bytes for shard in self.shards) + small + described + (1 << 20)

    def identity(self) -> dict[str, Any]:
        """Collect what must be equal for a pack to be continued."""
        files = []
        for shard in self.checkpoint.shards:
            header = xxhash.xxh3_64_hexdigest(shard.header.text)
            files.append([shard.name, shard.num_bytes, shard.path.stat().st_mtime_ns, header])
        files += [
            [file.name, file.num_bytes, file.path.stat().st_mtime_ns, ""]
            for file in self.checkpoint.small_files
        ]
        return {
            "format": FORMAT_VERSION,
            "codecs": self.codecs,
            "files": files,
            "versions": {
                "zipmoe": __version__,
                "torch": version("torch"),
                "transformers": version("transformers"),
            },
        }


def make_plan(checkpoint: Checkpoint, model: ModelPlan, codec: str) -> PackPlan:
    """Lay out the shards. Where bytes decide (experts) `codec`; where speed does (dense) rank3."""
    if codec not in LOSSLESS:
        raise ValueError(f"codec {codec!r} is none of {', '.join(LOSSLESS)}")
    codecs = {"experts": codec, "dense": "rank3" if codec == "rank223" else codec}
    used: set[str] = set()
    experts = []
    for number, layer in enumerate(model.layers):
        for expert in range(layer.experts):
            experts.append(_expert_record(checkpoint, number, layer, expert))
            used.update(key for key, _ in _sources(layer, expert))
    dense = [
        _dense_record(checkpoint, name)
        for name in sorted(checkpoint.tensors, key=str.encode)
        if name not in used
    ]
    shards = (*plan_shards("experts", experts), *plan_shards("dense", dense))
    return PackPlan(checkpoint, model, codecs, shards)


def _sources(layer: ExpertLayer, expert: int) -> set[SliceKey]:
    return {part.key(expert) for recipe in layer.recipes for part in recipe.parts}


def _expert_record(
    checkpoint: Checkpoint, number: int, layer: ExpertLayer, expert: int
) -> RecordPlan:
    matrices = []
    for matrix, recipe in zip(layer.matrices, layer.recipes, strict=True):
        keys = {part.key(expert)[0] for part in recipe.parts}
        dtype, *others = {checkpoint.tensors[key].place.dtype for key in keys}
        if others:
            raise CheckpointError(f"{', '.join(sorted(keys))} have different dtypes")
        matrices.append(MatrixPlan(matrix.role, dtype, matrix.rows, matrix.columns))
    return RecordPlan(f"{layer.module}.{expert}", tuple(matrices), number, expert)


def _dense_record(checkpoint: Checkpoint, name: str) -> RecordPlan:
    place = checkpoint.tensors[name].place
    rows, columns = as_matrix(place.shape)
    return RecordPlan(name, (MatrixPlan("dense", place.dtype, rows, columns),))
