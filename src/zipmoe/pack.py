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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zipmoe import __version__
from zipmoe._disk import typed_write_errors
from zipmoe._encode import Encoder
from zipmoe._errors import CheckpointError, MismatchError, SpaceError
from zipmoe._folder import JOURNAL
from zipmoe._hashing import HashThread, hash_shard
from zipmoe._index import PAGE, ceil_to
from zipmoe._journal import Journal
from zipmoe._manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Layer,
    Manifest,
    ShardInfo,
    is_plain_name,
)
from zipmoe._pack_plan import PackPlan, make_plan
from zipmoe._process import peak_rss_bytes
from zipmoe._source import SOURCE, Source, SourceFile
from zipmoe._write import StoreWriter, copy_file, publish, write_file
from zipmoe.checkpoint import INDEX_NAME, SmallFile, open_checkpoint, read_bytes
from zipmoe.conversion import plan_model
from zipmoe.hub import resolve_checkpoint
from zipmoe.inspect import summarise
from zipmoe.store import open_store

if TYPE_CHECKING:
    from zipmoe._write import Progress

__all__ = ["PackReport", "pack_checkpoint"]


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
        encoder = Encoder(plan)
        try:
            writer = StoreWriter(
                folder, plan.shards, journal, encoder.encode, progress, poll=hashing.poll
            )
            infos = writer.run(jobs)
        finally:
            encoder.close()
        for found in hashing.wait():
            journal.add_hashes(found)
    finally:
        hashing.close()
    if plan.identity() != journal.identity:
        raise CheckpointError(f"{plan.checkpoint.folder} changed while it was packed: pack again")
    _finish(folder, plan, journal, infos)


def _finish(folder: Path, plan: PackPlan, journal: Journal, shards: list[ShardInfo]) -> None:
    """Write the small files and, last and at once, the manifest."""
    files = [
        copy_file(file.path, folder, file.name)
        for file in plan.checkpoint.small_files
        if file.name not in (INDEX_NAME, "config.json")
    ]
    config = dict(plan.checkpoint.config)
    config["quantization_config"] = {"quant_method": "zipmoe", "format_version": FORMAT_VERSION}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    files.append(write_file(folder, "config.json", text.encode("utf-8", "surrogatepass")))
    source = _source(plan, journal)
    files.append(write_file(folder, SOURCE, source.dump()))
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
    publish(folder, manifest, journal)


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
