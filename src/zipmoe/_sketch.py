"""A checkpoint that is not packed → the store that packing would make, as far as headers tell.

Shapes and dtypes are certain. How far exponents shrink is not in a header: matrices are taken for
N(0, 0.02) in BF16, and a few rows of such weights are encoded to see.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from zipmoe import _core
from zipmoe._index import CODECS, ITEM_BYTES, NOBODY, PAGE, ceil_to
from zipmoe._pack_plan import make_plan
from zipmoe._safetensors import DTYPES
from zipmoe._source import Source, SourceFile
from zipmoe.conversion import plan_model
from zipmoe.store import DenseTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from zipmoe._pack_plan import PackPlan
    from zipmoe._shard import MatrixPlan, RecordPlan
    from zipmoe.checkpoint import Checkpoint
    from zipmoe.conversion import ExpertLayer

__all__ = ["StoreSketch", "sketch_store"]

_SAMPLED_GROUPS = 64  # row groups that are encoded to see how far a matrix shrinks


@dataclass(frozen=True)
class _Coded:
    """A matrix as it would be stored. Lengths in bytes, without padding."""

    codec: str
    row_group: int
    k_tile: int
    lengths: tuple[int, int]

    @property
    def padded(self) -> int:
        return sum(int(ceil_to(length, PAGE)) for length in self.lengths)


@dataclass(frozen=True)
class StoreSketch:
    """What is asked of a store (`zipmoe.store.Store`) before its weights are read."""

    plan: PackPlan

    @property
    def layers(self) -> tuple[ExpertLayer, ...]:
        """Modules with routed experts, in the model's order."""
        return self.plan.model.layers

    @property
    def dtype(self) -> str:
        """Name the dtype that transformers loads it in by itself."""
        return self.plan.model.dtype

    @cached_property
    def source(self) -> Source:
        """Where each tensor lies in the checkpoint."""
        shards = self.plan.checkpoint.shards
        files = tuple(
            SourceFile(shard.name, shard.num_bytes, "", header=shard.header.text.decode())
            for shard in shards
        )
        return Source(files, dict.fromkeys(self.plan.checkpoint.tensors, ""), (), ())

    @cached_property
    def store_bytes(self) -> int:
        """About what the shards of the store will take."""
        records = (record for shard in self.plan.shards for record in shard.records)
        return sum(self._coded(record, m).padded for record in records for m in record.matrices)

    def expert_dtypes(self, layer: int) -> tuple[str, ...]:
        """Name the dtype of each matrix of a layer's experts (the first expert's)."""
        first = next(record for record in self._records("experts") if record.layer == layer)
        return tuple(matrix.dtype for matrix in first.matrices)

    def dense_tensors(self) -> list[DenseTensor]:
        """List the dense tensors, in order of name."""
        found = []
        for record in self._records("dense"):
            (matrix,) = record.matrices
            place = self.plan.checkpoint.tensors[record.name].place
            coded = self._coded(record, matrix)
            size = place.num_bytes
            found.append(
                DenseTensor(
                    *(record.name, place.dtype, place.shape, coded.codec, coded.padded, size),
                    coded.lengths,
                )
            )
        return found

    def expert_table(self) -> tuple[list[str], NDArray[np.uint64]]:
        """One row of 16 numbers per matrix, as ExpertCache wants; there are no paths yet."""
        rows = []
        for number, shard in enumerate(s for s in self.plan.shards if s.kind == "experts"):
            offset = 0
            for record in shard.records:
                for at, matrix in enumerate(record.matrices):
                    coded = self._coded(record, matrix)
                    codec, (signs, exponents) = CODECS.index(coded.codec), coded.lengths
                    item = int(ITEM_BYTES[DTYPES[matrix.dtype][0]])
                    shape = (matrix.rows, matrix.columns, coded.row_group, coded.k_tile)
                    middle = offset + int(ceil_to(signs, PAGE))
                    places = (offset, signs, 0, middle, exponents, 0)
                    rows.append(
                        (record.layer, record.expert, at, number, codec, item, *shape, *places)
                    )
                    offset += coded.padded
        return [], np.array(rows, np.uint64).reshape(-1, 16)

    def _records(self, kind: str) -> Iterator[RecordPlan]:
        return (r for shard in self.plan.shards if shard.kind == kind for r in shard.records)

    def _coded(self, record: RecordPlan, matrix: MatrixPlan) -> _Coded:
        dense = record.layer == NOBODY
        vector = dense and len(self.plan.checkpoint.tensors[record.name].place.shape) < 2
        codec = self.plan.codecs["dense" if dense else "experts"]
        if matrix.dtype != "BF16" or vector or codec == "raw":
            return _Coded("raw", 0, 0, (matrix.raw_bytes, 0))
        return _expected(codec, matrix.rows, matrix.columns)


def sketch_store(checkpoint: Checkpoint, codec: str = "rank223") -> StoreSketch:
    """Say what packing a checkpoint with this codec would make.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        It cannot be packed.
    """
    return StoreSketch(make_plan(checkpoint, plan_model(checkpoint), codec))


@lru_cache(maxsize=4096)
def _expected(codec: str, rows: int, columns: int) -> _Coded:
    """Encode as many rows of random weights as show how far a matrix of this shape shrinks."""
    row_group, k_tile = _core.geometry(rows, columns)
    sampled = min(rows, row_group * _SAMPLED_GROUPS)
    values = np.random.default_rng(0).standard_normal((sampled, columns), np.float32) * 0.02
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    coded: Any = _core.encode(codec, bits, row_group=row_group, k_tile=k_tile)
    if coded.codec == "raw":
        return _Coded("raw", 0, 0, (2 * rows * columns, 0))
    signs, exponents = (extent.size for extent in coded.extents)
    whole = int(ceil_to(rows, 4)) * int(ceil_to(columns, 64))  # docs/format.md section 6
    return _Coded(coded.codec, row_group, k_tile, (whole, exponents * whole // signs))
