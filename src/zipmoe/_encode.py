"""One planned record → its coded matrices: reads the sources, follows the recipe, encodes.

What was encoded is decoded again and compared before anything of it is written: a checksum alone
would vouch for a wrong coding as well as for a right one. Runs in worker threads; shares nothing
but open files.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from zipmoe import _core
from zipmoe._errors import CheckpointError, CorruptError
from zipmoe._index import NOBODY
from zipmoe._safetensors import DTYPES
from zipmoe._shard import CodedMatrix, MatrixPlan, RecordPlan
from zipmoe.recipe import SliceKey, build

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zipmoe._pack_plan import PackPlan

__all__ = ["Encoder"]


class Encoder:
    """Encodes the records of a plan. Owns the checkpoint's open files; close it."""

    def __init__(self, plan: PackPlan) -> None:
        self._plan = plan
        self._fds: list[int] = []
        try:
            for shard in plan.checkpoint.shards:
                self._fds.append(os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            self.close()
            raise

    def encode(self, record: RecordPlan, threads: int) -> list[CodedMatrix]:
        """Read and encode a record; the bytes do not depend on `threads`.

        Raises
        ------
        CheckpointError
            The checkpoint cannot be read any more.
        CorruptError
            The coding does not decode to the weights: a fault of zipmoe or of the machine.
        """
        if record.layer == NOBODY:
            place = self._plan.checkpoint.tensors[record.name].place
            (plan,) = record.matrices
            matrices = [self._read((record.name, None)).reshape(plan.rows, plan.columns)]
            # A vector has no rows to share tables, and takes part in no product.
            codec = "raw" if len(place.shape) < 2 else self._plan.codecs["dense"]
        else:
            matrices = self._expert_matrices(record)
            codec = self._plan.codecs["experts"]
        coded = [
            self._code(codec, plan, matrix, threads)
            for plan, matrix in zip(record.matrices, matrices, strict=True)
        ]
        # Afterwards, since matrices may share a source that is decoded over.
        for matrix, one in zip(matrices, coded, strict=True):
            if one.codec != "raw" and not _decodes_to(one, matrix, threads):
                is_dense = record.layer == NOBODY
                raise CorruptError(
                    f"what {one.codec} made of the weights does not decode to them: nothing of "
                    "this record was written; a fault of zipmoe or of this machine's memory",
                    tensor=record.name,
                    layer=None if is_dense else record.layer,
                    expert=None if is_dense else record.expert,
                )
        return coded

    def close(self) -> None:
        """Close the checkpoint's files. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def _expert_matrices(self, record: RecordPlan) -> list[NDArray[Any]]:
        layer = self._plan.model.layers[record.layer]
        sources: dict[SliceKey, NDArray[Any]] = {}

        def fetch(key: SliceKey) -> NDArray[Any]:
            if key not in sources:  # gate and up may share a source
                sources[key] = self._read(key)
            return sources[key]

        return [
            build(matrix, recipe, record.expert, fetch)
            for matrix, recipe in zip(layer.matrices, layer.recipes, strict=True)
        ]

    def _read(self, key: SliceKey) -> NDArray[Any]:
        """Read a tensor, or one expert's slice of a fused one."""
        name, number = key
        source = self._plan.checkpoint.tensors[name]
        place = source.place
        shape, start, stop = place.shape, place.start, place.stop
        if number is not None:
            step = place.num_bytes // shape[0] if shape[0] else 0
            shape, start = shape[1:], start + number * step
            stop = start + step
        out = np.empty(shape, DTYPES[place.dtype][1])
        flat = out.reshape(-1).view(np.uint8)
        done = 0
        while done < flat.size:
            path = self._plan.checkpoint.shards[source.shard].path
            try:
                got = os.preadv(self._fds[source.shard], [flat[done:].data], start + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error}") from error
            if got == 0:
                raise CheckpointError(f"{path} became shorter while it was packed")
            done += got
        if start + done != stop:
            raise AssertionError(f"{name}: place and shape disagree")
        return out

    @staticmethod
    def _code(codec: str, plan: MatrixPlan, matrix: NDArray[Any], threads: int) -> CodedMatrix:
        if plan.dtype == "BF16" and codec != "raw":
            coded = _core.encode(codec, matrix, threads=threads)
            return CodedMatrix.of(coded.codec, (coded.row_group, coded.k_tile), coded.extents)
        plain = np.ascontiguousarray(matrix).reshape(-1).view(np.uint8)
        return CodedMatrix.of("raw", (0, 0), (plain, np.empty(0, np.uint8)))


def _decodes_to(coded: CodedMatrix, matrix: NDArray[Any], threads: int) -> bool:
    """Decode and compare. A matrix that lies whole in memory is decoded over, by its hash."""
    bits = matrix.view(np.uint16)
    is_whole = bits.flags.c_contiguous  # the largest are: no second copy of those
    again = bits if is_whole else np.empty(bits.shape, np.uint16)
    before = _core.xxh3(bits) if is_whole else 0
    try:
        _core.decode(
            coded.codec,
            coded.extents,
            again,
            row_group=coded.row_group,
            k_tile=coded.k_tile,
            threads=threads,
        )
    except CorruptError:
        return False
    return _core.xxh3(bits) == before if is_whole else np.array_equal(again, bits)
