"""Checkpoint → store: streaming, resumable, crash-safe. The same bytes whatever interrupts it.

Records are encoded by a pool of threads and written in order. What is on the disk is noted in a
journal; the manifest comes last, by rename. docs/decisions/0007-packing-and-resume.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipmoe import __version__
from zipmoe._disk import sync_folder, typed_write_errors, write_all
from zipmoe._encode import Encoder
from zipmoe._errors import CheckpointError, MismatchError, SpaceError
from zipmoe._folder import JOURNAL
from zipmoe._hashing import HashThread, hash_shard
from zipmoe._index import PAGE, ceil_to
from zipmoe._journal import FileHashes, Journal
from zipmoe._manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileInfo,
    Layer,
    Manifest,
    ShardInfo,
    is_plain_name,
)
from zipmoe._plan import PackPlan, make_plan
from zipmoe._process import peak_rss_bytes
from zipmoe._shard import CodedMatrix, RecordPlan, ShardPlan, ShardWriter
from zipmoe._source import SOURCE, Source, SourceFile
from zipmoe.checkpoint import INDEX_NAME, SmallFile, open_checkpoint, read_bytes
from zipmoe.conversion import plan_model
from zipmoe.hub import resolve_checkpoint
from zipmoe.inspect import summarise
from zipmoe.store import open_store

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PackReport", "pack_checkpoint"]

Progress = Callable[[int, int], None]

BATCH_BYTES = 128 << 20  # weights between two waits for the disk
IN_FLIGHT_BYTES = 192 << 20  # weights being read, encoded or waiting to be written
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a pack did."""

    source_bytes: int
    store_bytes: int
    ratio: float  # store_bytes / source_bytes
    bits_per_weight: float  # of the routed experts, padding included
    experts: int
    tensors: int
    seconds: float
    peak_rss_bytes: int  # of this process, since it started
    raw: list[tuple[str, str]]  # (tensor or expert matrix, why it is raw)


def pack_checkpoint(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    codec: str = "rank223",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Pack a checkpoint (a folder, or an id on the hub) into a store.

    Killed at any moment and started again, it continues; the store does not depend on that, nor
    on `jobs` (threads; default: all cores). `progress` is called with bytes done and in total.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be packed (UnsupportedModelError: nor could a sound one of its kind).
    MismatchError
        The destination holds something else.
    SpaceError
        There is not enough free disk, before or during the pack.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(resolve_checkpoint(source))
    plan = make_plan(checkpoint, plan_model(checkpoint), codec)
    folder = Path(store)
    if not (folder / MANIFEST).exists():
        then = "run the same command again, it continues where it stopped"
        with typed_write_errors(folder, then):
            _prepare(folder, plan)
            with Journal.open(folder, plan.identity()) as journal:
                _check_space(folder, plan)
                _write_store(folder, plan, journal, jobs or _cores(), progress)
    else:
        _require_same(folder, plan)
    (folder / JOURNAL).unlink(missing_ok=True)
    return _report(folder, plan, time.monotonic() - started)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _prepare(folder: Path, plan: PackPlan) -> None:
    """Make the folder; refuse one that holds something else, or names a store cannot hold."""
    names = {shard.name for shard in plan.shards} | {SOURCE, MANIFEST}
    for file in plan.checkpoint.small_files:
        if not is_plain_name(file.name) or file.name in names:
            raise CheckpointError(f"{file.path} has a name that a store needs for itself")
    if folder.is_file():
        raise MismatchError(f"{folder} is a file")
    if folder.resolve().is_relative_to(plan.checkpoint.folder):
        raise MismatchError(f"the store {folder} must not lie inside the checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / JOURNAL).exists() and (held := [entry.name for entry in folder.iterdir()]):
        raise MismatchError(
            f"{folder} is neither empty nor an unfinished pack (it holds {min(held)}): "
            "pack into a new folder"
        )


def _check_space(folder: Path, plan: PackPlan) -> None:
    there = sum(entry.stat().st_size for entry in os.scandir(folder))
    free = shutil.disk_usage(folder).free
    if plan.most_bytes - there <= free:
        return
    needed = _expected_bytes(plan) - there
    if needed > free:
        raise SpaceError(
            f"packing will take about {needed:,} bytes in {folder} and {free:,} are free: "
            "make room or choose another disk"
        )


def _expected_bytes(plan: PackPlan) -> int:
    """Estimate the store: all experts shrink as the first does, less 5 % of that saving."""
    experts = [r for shard in plan.shards if shard.kind == "experts" for r in shard.records]
    encoder = Encoder(plan)
    try:
        coded = encoder.encode(experts[0], _cores())
    finally:
        encoder.close()
    stored = sum(int(ceil_to(extent.size, PAGE)) for matrix in coded for extent in matrix.extents)
    saved = 1 - stored / max(1, experts[0].most_bytes)
    return plan.most_bytes - int(0.95 * saved * sum(record.most_bytes for record in experts))


def _write_store(
    folder: Path, plan: PackPlan, journal: Journal, jobs: int, progress: Progress | None
) -> None:
    shards = plan.checkpoint.shards
    hashing = HashThread([shard for shard in shards if shard.name not in journal.hashes])
    try:
        writer = _Writer(folder, plan, journal, hashing, progress)
        infos = writer.run(jobs)
        for found in hashing.wait():
            journal.add_hashes(found)
    finally:
        hashing.close()
    if plan.identity() != journal.identity:
        raise CheckpointError(f"{plan.checkpoint.folder} changed while it was packed: pack again")
    _finish(folder, plan, journal, infos)


class _Writer:
    """Encodes in a pool, writes in order, notes in the journal what is on the disk."""

    def __init__(
        self,
        folder: Path,
        plan: PackPlan,
        journal: Journal,
        hashing: HashThread,
        progress: Progress | None,
    ) -> None:
        self._folder, self._plan, self._journal = folder, plan, journal
        self._hashing, self._progress = hashing, progress
        self._done_bytes, self._total_bytes = 0, plan.weight_bytes
        self._noter = ThreadPoolExecutor(1, "zipmoe-journal")
        self._noting: list[Future[None]] = []

    def run(self, jobs: int) -> list[ShardInfo]:
        """Write all shards; returns them in order."""
        encoder = Encoder(self._plan)
        try:
            with ThreadPoolExecutor(jobs, "zipmoe-encode") as pool, self._noter:
                try:
                    coded = self._encoded(encoder, pool, jobs)
                    return [self._write_shard(shard, coded) for shard in self._plan.shards]
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)
        finally:
            encoder.close()

    def _encoded(
        self, encoder: Encoder, pool: ThreadPoolExecutor, jobs: int
    ) -> Iterator[tuple[RecordPlan, list[CodedMatrix]]]:
        """Encode all records that are not done yet, in order, a bounded number at once."""
        waiting: deque[tuple[RecordPlan, Future[list[CodedMatrix]]]] = deque()
        in_flight = 0
        for shard in self._plan.shards:
            for record in shard.records[len(self._journal.records.get(shard.name, ())) :]:
                while waiting and in_flight + record.raw_bytes > IN_FLIGHT_BYTES:
                    first, future = waiting.popleft()
                    in_flight -= first.raw_bytes
                    yield first, future.result()
                # A large record runs alone, so it gets all threads.
                threads = jobs if record.raw_bytes * jobs > IN_FLIGHT_BYTES else 1
                waiting.append((record, pool.submit(encoder.encode, record, threads)))
                in_flight += record.raw_bytes
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()

    def _write_shard(
        self, shard: ShardPlan, coded: Iterator[tuple[RecordPlan, list[CodedMatrix]]]
    ) -> ShardInfo:
        done = self._journal.records.get(shard.name, [])
        self._advance(sum(record.raw_bytes for record in shard.records[: len(done)]))
        writer = ShardWriter(self._folder, shard, done)
        try:
            batch: list[NDArray[Any]] = []
            batch_bytes = 0
            for planned in shard.records[len(done) :]:
                record, matrices = next(coded)
                if record is not planned:
                    raise AssertionError("records are encoded and written in different orders")
                batch.append(writer.append(matrices))
                batch_bytes += record.raw_bytes
                if batch_bytes >= BATCH_BYTES:
                    self._note_later(writer, batch)
                    batch, batch_bytes = [], 0
                self._advance(record.raw_bytes)
            self._note_later(writer, batch)
            self._wait_for_notes()
            return writer.finish()
        finally:
            wait(self._noting)
            writer.close()

    def _note_later(self, writer: ShardWriter, batch: list[NDArray[Any]]) -> None:
        """Wait for the disk and write the journal in a thread beside; one batch at a time."""
        self._wait_for_notes()
        hashes = self._hashing.poll()
        self._noting = [self._noter.submit(self._note, writer, batch, hashes)]

    def _wait_for_notes(self) -> None:
        for note in self._noting:
            note.result()
        self._noting = []

    def _note(
        self, writer: ShardWriter, batch: list[NDArray[Any]], hashes: list[FileHashes]
    ) -> None:
        writer.sync()
        self._journal.add_records(writer.plan.name, batch)
        for found in hashes:
            self._journal.add_hashes(found)

    def _advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


def _finish(folder: Path, plan: PackPlan, journal: Journal, shards: list[ShardInfo]) -> None:
    """Write the small files and, last and at once, the manifest."""
    files = [
        _copy(file, folder)
        for file in plan.checkpoint.small_files
        if file.name not in (INDEX_NAME, "config.json")
    ]
    config = dict(plan.checkpoint.config)
    config["quantization_config"] = {"quant_method": "zipmoe", "format_version": FORMAT_VERSION}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    files.append(_write(folder, "config.json", text.encode("utf-8", "surrogatepass")))
    source = _source(plan, journal)
    files.append(_write(folder, SOURCE, source.dump()))
    files.sort(key=lambda file: file.name)
    model = plan.model
    manifest = Manifest(
        tool=f"zipmoe {__version__}",
        codec=plan.codecs,
        model={
            "model_type": model.model_type,
            "architecture": model.architecture,
            "dtype": model.dtype,
        },
        layers=tuple(Layer(x.module, x.experts, x.matrices) for x in model.layers),
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
        files=tuple(files),
        source_bytes=sum(file.num_bytes for file in source.files),
        store_bytes=sum(s.num_bytes for s in shards) + sum(f.num_bytes for f in files),
    )
    temporary = f".{MANIFEST}.tmp"
    _write(folder, temporary, manifest.dump())
    sync_folder(folder)
    (folder / temporary).rename(folder / MANIFEST)
    sync_folder(folder)
    journal.remove()


def _source(plan: PackPlan, journal: Journal) -> Source:
    files, tensors = [], {}
    for shard in plan.checkpoint.shards:
        found = journal.hashes[shard.name]
        tensors.update(found.tensors)
        header = shard.header.text.decode()
        files.append(SourceFile(shard.name, shard.num_bytes, found.sha256, header=header))
    files += [_source_file(file) for file in plan.checkpoint.small_files]
    files.sort(key=lambda file: file.name)
    recipes = tuple(recipe for layer in plan.model.layers for recipe in layer.recipes)
    return Source(tuple(files), tensors, recipes, plan.checkpoint.left_out)


def _source_file(file: SmallFile) -> SourceFile:
    """Describe a small file; those that a store changes or must not show are kept as text."""
    if file.name in (INDEX_NAME, "config.json"):
        data = read_bytes(file)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file.path} is not UTF-8") from error
        return SourceFile(file.name, len(data), hashlib.sha256(data).hexdigest(), text=text)
    with file.path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return SourceFile(file.name, file.num_bytes, digest)


def _copy(file: SmallFile, folder: Path) -> FileInfo:
    digest, num_bytes = hashlib.sha256(), 0
    with file.path.open("rb") as source, (folder / file.name).open("wb") as target:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    return FileInfo(file.name, num_bytes, digest.hexdigest())


def _write(folder: Path, name: str, data: bytes) -> FileInfo:
    fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, [data], 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileInfo(name, len(data), hashlib.sha256(data).hexdigest())


def _require_same(folder: Path, plan: PackPlan) -> None:
    """Accept a finished store only if it was made from these very files with these codecs."""
    with open_store(folder) as opened:
        kept = {file.name: file.sha256 for file in opened.source.files}
        if opened.manifest.codec != plan.codecs:
            raise MismatchError(
                f"{folder} is a finished store with the codecs {opened.manifest.codec}: "
                "delete it, or pack into another folder"
            )
    found = {file.name: _source_file(file).sha256 for file in plan.checkpoint.small_files}
    for shard in plan.checkpoint.shards:
        hashes = hash_shard(shard)
        found[shard.name] = hashes.sha256 if hashes else ""
    if found != kept:
        raise MismatchError(
            f"{folder} is the finished store of another checkpoint: "
            "delete it, or pack into another folder"
        )


def _report(folder: Path, plan: PackPlan, seconds: float) -> PackReport:
    with open_store(folder) as opened:
        summary = summarise(opened)
    return PackReport(
        source_bytes=summary.source_bytes,
        store_bytes=summary.store_bytes,
        ratio=summary.ratio,
        bits_per_weight=summary.bits_per_weight,
        experts=summary.experts,
        tensors=len(plan.checkpoint.tensors),
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
        raw=summary.raw,
    )
