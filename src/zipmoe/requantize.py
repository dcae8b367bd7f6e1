"""A lossless store → a lossy one: experts at fewer bits, everything else byte for byte.

Written as a pack is: streaming, resumable, the manifest last; the same bytes whatever interrupts
it. docs/decisions/0015-lossy-codecs.md.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipmoe import __version__, _core
from zipmoe._disk import typed_write_errors, write_all
from zipmoe._errors import CorruptError, MismatchError, QuantizationError, SpaceError
from zipmoe._folder import JOURNAL, read_verified
from zipmoe._index import CODECS, ROLES
from zipmoe._journal import Journal
from zipmoe._lossy import LOSSLESS_BITS, Loss, Lossy
from zipmoe._manifest import LOSSY_VERSION, MANIFEST, FileInfo, Manifest, ShardInfo
from zipmoe._safetensors import read_exactly
from zipmoe._shard import CodedMatrix, MatrixPlan, RecordPlan, ShardPlan, plan_shards
from zipmoe._write import StoreWriter, copy_file, publish, write_file
from zipmoe.store import DTYPE_NAMES, Store, open_store, read_extent, read_padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zipmoe._shard import OpenShard
    from zipmoe._write import Progress

__all__ = ["RequantizeReport", "requantize_store"]

CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class RequantizeReport:
    """What was written. Sizes are in bytes."""

    source_bytes: int  # of the checkpoint
    store_bytes: int
    expert_bytes: int  # weights of the experts as they were, in BF16
    stored_expert_bytes: int  # the shards that hold them now
    experts: dict[str, int]  # width → experts
    seconds: float


def requantize_store(
    store: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    bits: Sequence[Sequence[int]],
    *,
    loss: Loss | None = None,
    scale_group: int = 64,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> RequantizeReport:
    """Write a lossless store anew, each expert with the bits it is given.

    bits: by layer (as in the manifest), by expert: 8, 4 or 2, or 16 for an expert that stays as it
    is. scale_group: weights of a row that share a scale, 64, or 0 for all of it. loss: what was
    measured, for the manifest. jobs: threads, default: all cores. progress: called with bytes of
    experts done and in total.

    Killed at any moment and called again, it continues.

    Raises
    ------
    QuantizationError
        A weight is infinite or NaN, or not BF16.
    MismatchError
        The store is lossy already, the destination holds something else, or `bits` is not for it.
    SpaceError
        There is not enough free disk.
    CorruptError
        The store is damaged.
    """
    started = time.monotonic()
    target = Path(folder)
    with open_store(store) as opened:
        if opened.manifest.lossy:
            raise MismatchError(f"{opened.path} is lossy already: take the lossless store")
        if [len(layer) for layer in bits] != [layer.experts for layer in opened.layers]:
            raise MismatchError("`bits` must have a number for each expert of each layer")
        lossy = Lossy(tuple(tuple(layer) for layer in bits), scale_group, loss or Loss())
        with typed_write_errors(target, "run the same again, it continues where it stopped"):
            manifest = _write_store(opened, target, lossy, jobs or _cores(), progress)
    experts = sum(shard.num_bytes for shard in manifest.shards if shard.kind == "experts")
    return RequantizeReport(
        source_bytes=manifest.source_bytes,
        store_bytes=manifest.store_bytes,
        expert_bytes=sum(
            2 * layer.experts * sum(m.rows * m.columns for m in layer.matrices)
            for layer in manifest.layers
        ),
        stored_expert_bytes=experts,
        experts=lossy.counts(),
        seconds=time.monotonic() - started,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _write_store(
    store: Store, folder: Path, lossy: Lossy, jobs: int, progress: Progress | None
) -> Manifest:
    if (folder / MANIFEST).exists():
        return _require_same(store, folder, lossy)
    _prepare(store, folder)
    identity = {
        "store": store.manifest.identity,
        "lossy": lossy.dump(),
        "versions": {"zipmoe": __version__},
    }
    with Journal.open(folder, identity) as journal:
        encoder = _Requantizer(store, lossy)
        shards = plan_shards("experts", encoder.records())
        _check_space(folder, store, shards)
        writer = StoreWriter(folder, shards, journal, encoder.encode, progress)
        infos = writer.run(jobs)
        dense = [shard for shard in store.shards if shard.info.kind == "dense"]
        infos += [_copy_shard(shard, folder) for shard in dense]
        manifest = _manifest(store, folder, lossy, infos)
        publish(folder, manifest, journal)
    return manifest


def _prepare(store: Store, folder: Path) -> None:
    if folder.is_file():
        raise MismatchError(f"{folder} is a file")
    if folder.resolve().is_relative_to(store.path.resolve()):
        raise MismatchError(f"{folder} must not lie inside the store {store.path}")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / JOURNAL).exists() and (held := [entry.name for entry in folder.iterdir()]):
        raise MismatchError(
            f"{folder} is neither empty nor unfinished (it holds {min(held)}): use a new folder"
        )


def _require_same(store: Store, folder: Path, lossy: Lossy) -> Manifest:
    """Accept a finished store only if it was made from this one with these bits."""
    with open_store(folder) as made:
        (folder / JOURNAL).unlink(missing_ok=True)
        same = [s for s in made.manifest.shards if s.kind == "dense"] == [
            s for s in store.manifest.shards if s.kind == "dense"
        ]
        if made.manifest.lossy != lossy or not same or made.source != store.source:
            raise MismatchError(
                f"{folder} is a finished store of other weights or bits: delete it, or use another"
            )
        return made.manifest


def _check_space(folder: Path, store: Store, shards: Sequence[ShardPlan]) -> None:
    """Experts take half their bits at most, or what they take now."""
    there = sum(entry.stat().st_size for entry in os.scandir(folder))
    experts = sum(info.num_bytes for info in store.manifest.shards if info.kind == "experts")
    most = min(sum(shard.most_bytes for shard in shards), 2 * experts)
    needed = store.manifest.store_bytes - experts + most - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SpaceError(f"this takes up to {needed:,} bytes in {folder} and {free:,} are free")


class _Requantizer:
    """The records of a store's experts, each decoded and encoded anew, or kept."""

    def __init__(self, store: Store, lossy: Lossy) -> None:
        self._store, self._lossy = store, lossy
        self._places = {
            (layer, expert): (shard, rows) for layer, expert, shard, rows in store.expert_records()
        }

    def records(self) -> list[RecordPlan]:
        """Plan the experts' records, in order."""
        plans = []
        for (layer, expert), (shard, rows) in self._places.items():
            entries = shard.entries[rows.start : rows.stop]
            matrices = tuple(
                MatrixPlan(
                    ROLES[entry["role"]],
                    DTYPE_NAMES[int(entry["dtype"])],
                    int(entry["rows"]),
                    int(entry["columns"]),
                )
                for entry in entries
            )
            name = shard.records[int(entries[0]["record"])].name
            plans.append(RecordPlan(name, matrices, layer, expert))
        return plans

    def encode(self, record: RecordPlan, threads: int) -> list[CodedMatrix]:
        """Make an expert's matrices; the bytes do not depend on `threads`."""
        shard, rows = self._places[record.layer, record.expert]
        bits = self._lossy.bits[record.layer][record.expert]
        if bits == LOSSLESS_BITS:
            return [_kept(shard, row) for row in rows]
        coded = []
        for row, plan in zip(rows, record.matrices, strict=True):
            try:
                coded.append(self._quantised(f"int{bits}", shard, row, threads))
            except ValueError as error:
                where = f"{plan.role} of layer {record.layer}, expert {record.expert}"
                raise QuantizationError(f"{record.name}: {where}: {error}") from error
        return coded

    def _quantised(self, codec: str, shard: OpenShard, row: int, threads: int) -> CodedMatrix:
        dtype = DTYPE_NAMES[int(shard.entries[row]["dtype"])]
        if dtype != "BF16":
            raise ValueError(f"{dtype} weights do not become integers, only BF16")
        weights = self._store.read_matrix(shard, row, threads=threads)
        group = self._lossy.scale_group
        coded = _core.encode(codec, weights, threads=threads, scale_group=group)
        return CodedMatrix.of(coded.codec, (coded.row_group, coded.k_tile), coded.extents)


def _kept(shard: OpenShard, row: int) -> CodedMatrix:
    """Take a matrix as it is, verified."""
    entry = shard.entries[row]
    return CodedMatrix(
        CODECS[entry["codec"]],
        int(entry["row_group"]),
        int(entry["k_tile"]),
        (read_extent(shard, row, 0), read_extent(shard, row, 1)),
        (int(entry["extents"][0][2]), int(entry["extents"][1][2])),
    )


def _copy_shard(shard: OpenShard, folder: Path) -> ShardInfo:
    """Copy a shard byte for byte; its extents are verified on the way."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    fd = os.open(folder / shard.info.name, flags, 0o644)
    try:
        end = shard.data_start
        for row in range(len(shard.entries)):
            for plane in (0, 1):
                padded = read_padded(shard, row, plane)
                offset = int(shard.entries[row]["extents"][plane][0])
                write_all(fd, [padded], offset)
                end = max(end, offset + padded.size)
        for start, stop in ((0, shard.data_start), (end, shard.info.num_bytes)):
            write_all(fd, [read_exactly(shard.fd, stop - start, start)], start)
        os.fsync(fd)
    finally:
        os.close(fd)
    return shard.info


def _manifest(store: Store, folder: Path, lossy: Lossy, shards: list[ShardInfo]) -> Manifest:
    """Write the small files; give the manifest that lists everything."""
    old = store.manifest
    files = []
    for info in old.files:
        if info.name == CONFIG:
            files.append(_write_config(store, folder, info, lossy))
            continue
        copied = copy_file(store.path / info.name, folder, info.name)
        if copied != info:
            raise CorruptError("the file does not have its SHA-256", file=info.name)
        files.append(copied)
    codec = old.codec | {"experts": lossy.codec()}
    return Manifest(
        tool=f"zipmoe {__version__}",
        codec=codec,
        model=old.model,
        layers=old.layers,
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
        files=tuple(files),
        source_bytes=old.source_bytes,
        store_bytes=sum(s.num_bytes for s in shards) + sum(f.num_bytes for f in files),
        lossy=lossy,
    )


def _write_config(store: Store, folder: Path, info: FileInfo, lossy: Lossy) -> FileInfo:
    """Write config.json, which says to every loader that the store is lossy."""
    config: dict[str, Any] = json.loads(read_verified(store.path, info))
    config["quantization_config"] |= {"format_version": LOSSY_VERSION, "lossy": lossy.brief()}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return write_file(folder, CONFIG, text.encode("utf-8", "surrogatepass"))
