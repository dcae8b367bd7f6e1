"""A Hugging Face folder → its files, shards and tensors. Knows nothing of models or of the store.

Everything read from a file is checked before use; what cannot be packed is refused by name.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipmoe._errors import CheckpointError, UnsupportedModelError
from zipmoe._safetensors import Header, HeaderError, TensorPlace, read_header, unique_keys

__all__ = ["Checkpoint", "Shard", "SmallFile", "TensorSource", "open_checkpoint"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Weights in other formats: they repeat what the shards say, or are refused where there are none.
OTHER_WEIGHTS = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".pdparams",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
)
MAX_JSON_BYTES = 1 << 30
MAX_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file of the checkpoint that holds no weights."""

    name: str
    path: Path
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file of the checkpoint."""

    name: str
    path: Path
    num_bytes: int
    header: Header


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where a tensor lies."""

    shard: int
    place: TensorPlace


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that passed every check. `tensors` maps keys to places over all shards."""

    folder: Path
    shards: tuple[Shard, ...]  # by name
    small_files: tuple[SmallFile, ...]  # by name; config.json among them
    left_out: tuple[str, ...]  # names of files and folders that a store does not keep
    tensors: dict[str, TensorSource]
    config: dict[str, Any]


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint's file list, headers and config.

    Raises
    ------
    CheckpointError
        A file is missing, malformed, or leads out of the folder.
    UnsupportedModelError
        The weights are in another format or already quantised.
    """
    root = Path(folder)
    if root.is_file() and root.suffix == ".gguf":
        raise UnsupportedModelError(f"{root} is a GGUF file: {_ONLY_SAFETENSORS}")
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a folder")
    root = root.resolve()
    files, left_out = _list_files(root)
    _refuse_other_formats(root, files, left_out)
    config = _read_config(root, files)
    names = _shard_names(root, files)
    shards = tuple(_open_shard(files[name]) for name in names)
    tensors = _tensor_table(shards)
    _check_index(files, tensors, shards)
    small = []
    for name, file in sorted(files.items()):
        if name in names:
            continue
        if name.endswith(OTHER_WEIGHTS):
            left_out.append(name)
        else:
            small.append(file)
    return Checkpoint(root, shards, tuple(small), tuple(sorted(left_out)), tensors, config)


def read_bytes(file: SmallFile) -> bytes:
    """Whole content of a small file."""
    if file.num_bytes > MAX_JSON_BYTES:
        raise CheckpointError(f"{file.path} is over the limit of {MAX_JSON_BYTES} bytes")
    try:
        return file.path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {file.path}: {error}") from error


_ONLY_SAFETENSORS = (
    "zipmoe packs safetensors checkpoints only, because they hold the weights as they were "
    "published; use the model's safetensors version"
)


def _list_files(root: Path) -> tuple[dict[str, SmallFile], list[str]]:
    """Regular files by name, and the names of everything else. Links must stay inside."""
    files: dict[str, SmallFile] = {}
    left_out = []
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.name.startswith(".") or entry.is_dir():
            left_out.append(entry.name)
            continue
        if entry.is_symlink():
            _refuse_foreign_link(root, Path(entry.path))
        try:
            status = entry.stat()
        except OSError as error:
            raise CheckpointError(f"cannot read {entry.path}: {error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{entry.path} is not a regular file")
        if "\\" in entry.name or len(os.fsencode(entry.name)) > MAX_NAME_BYTES:
            raise CheckpointError(f"{entry.path} has a name that a store cannot hold")
        files[entry.name] = SmallFile(entry.name, Path(entry.path), status.st_size)
    return files, left_out


def _refuse_foreign_link(root: Path, link: Path) -> None:
    # A hub cache keeps the files in blobs/ beside snapshots/<revision>/, of the same repository.
    in_cache = root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
    allowed = root.parent.parent if in_cache else root
    target = Path(os.path.realpath(link))
    if not target.is_relative_to(allowed):
        raise CheckpointError(f"{link} leads out of the checkpoint, to {target}: refused")


def _refuse_other_formats(root: Path, files: dict[str, SmallFile], left_out: list[str]) -> None:
    if any(name.endswith(".safetensors") for name in files) or INDEX_NAME in files:
        return
    if "zipmoe.json" in files:
        raise CheckpointError(f"{root} is a zipmoe store already")
    for suffix, name in ((".gguf", "GGUF"), (".bin", "pickled .bin"), (".pt", "pickled .pt")):
        if any(file.endswith((suffix, suffix + "h")) for file in files):
            raise UnsupportedModelError(f"{root} holds its weights as {name}: {_ONLY_SAFETENSORS}")
    hint = f" (it holds {', '.join([*files, *left_out][:5])})" if files or left_out else ""
    raise CheckpointError(f"{root} holds no safetensors file{hint}")


def _read_config(root: Path, files: dict[str, SmallFile]) -> dict[str, Any]:
    if "config.json" not in files:
        raise CheckpointError(f"{root} has no config.json")
    config = _read_json(files["config.json"])
    _refuse_quantised(config, root)
    return config


def _refuse_quantised(config: dict[str, Any], root: Path) -> None:
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        quantised = part.get("quantization_config") or part.get("compression_config")
        if quantised is None:
            continue
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        if method == "zipmoe":
            raise CheckpointError(f"{root} is a zipmoe store already")
        raise UnsupportedModelError(
            f"{root} is already quantised by {method or 'an unnamed method'}: its config.json has "
            "a quantization_config, which a store needs for itself; pack the model's BF16 version"
        )


def _read_json(file: SmallFile) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(file).decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError, HeaderError) as error:
        raise CheckpointError(f"{file.path} is not usable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.path} is not a JSON object")
    return content


def _weight_map(files: dict[str, SmallFile]) -> dict[str, str]:
    """Read the index: tensor key → shard name. Names must be plain names."""
    weight_map = _read_json(files[INDEX_NAME]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{files[INDEX_NAME].path} has no weight_map")
    for key, name in weight_map.items():
        plain = isinstance(name, str) and "/" not in name and "\\" not in name
        if not plain or name.startswith(".") or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{files[INDEX_NAME].path} places {key!r} in {name!r}, "
                "which is not the plain name of a safetensors file"
            )
    return weight_map


def _shard_names(root: Path, files: dict[str, SmallFile]) -> list[str]:
    """Names of the shards, by transformers' own order of preference."""
    if SINGLE_NAME in files:
        return [SINGLE_NAME]
    if INDEX_NAME not in files:
        found = ", ".join(name for name in files if name.endswith(".safetensors"))
        raise CheckpointError(
            f"{root} has neither {SINGLE_NAME} nor {INDEX_NAME}, which transformers needs "
            f"to find the weights (there is {found})"
        )
    names = sorted(set(_weight_map(files).values()))
    missing = [name for name in names if name not in files]
    if missing:
        raise CheckpointError(
            f"{root} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:10])}"
        )
    return names


def _open_shard(file: SmallFile) -> Shard:
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot read {file.path}: {error}") from error
    try:
        header = read_header(fd, file.num_bytes)
    except (HeaderError, OSError) as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    finally:
        os.close(fd)
    return Shard(file.name, file.path, file.num_bytes, header)


def _tensor_table(shards: tuple[Shard, ...]) -> dict[str, TensorSource]:
    tensors: dict[str, TensorSource] = {}
    for ordinal, shard in enumerate(shards):
        for place in shard.header.tensors:
            if place.name in tensors:
                other = shards[tensors[place.name].shard].name
                raise CheckpointError(f"tensor {place.name!r} is both in {other} and {shard.name}")
            if place.name == "zipmoe.index" or "{e}" in place.name:
                raise CheckpointError(
                    f"{shard.path}: the name {place.name!r} is reserved in a store"
                )
            tensors[place.name] = TensorSource(ordinal, place)
    return tensors


def _check_index(
    files: dict[str, SmallFile], tensors: dict[str, TensorSource], shards: tuple[Shard, ...]
) -> None:
    """Every tensor that the index promises must be in the shard that it names."""
    if INDEX_NAME not in files or SINGLE_NAME in files:
        return
    for key, name in _weight_map(files).items():
        if key not in tensors or shards[tensors[key].shard].name != name:
            raise CheckpointError(
                f"{files[INDEX_NAME].path} places {key!r} in {name}, which does not hold it"
            )
