"""A folder or an id on the Hugging Face hub → a local checkpoint folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE

from zipmoe._errors import CheckpointError, UnsupportedModelError, ZipmoeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata

__all__ = ["checkpoint_headers", "is_hub_id", "resolve_checkpoint"]

_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WEIGHTS = (".safetensors",)
# Text that a tokenizer, a processor or a config is made of.
_SMALL = (".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt", ".vocab")


def resolve_checkpoint(source: str | os.PathLike[str]) -> Path:
    """Give the folder itself, or download `org/name` or `org/name@revision` from the hub.

    Raises
    ------
    CheckpointError
        No such folder, and no such repository, or the hub cannot be reached.
    UnsupportedModelError
        The repository has no safetensors.
    """
    path = Path(source)
    if path.exists():
        return path
    with _asking(source) as (repo, revision, names):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_wanted(repo, names)))


def is_hub_id(source: str) -> bool:
    """Tell whether a name is one of a repository and not of something here."""
    return not Path(source).exists() and _ID.fullmatch(source) is not None


def checkpoint_headers(source: str, folder: Path) -> None:
    """Make a folder that looks like a checkpoint on the hub, and holds its headers alone.

    Its config and index are downloaded, of each weight file nothing but the header: the files here
    have the length that it says, and a hole where the weights would be.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        As `resolve_checkpoint`.
    """
    with _asking(source) as (repo, revision, names):
        _wanted(repo, names)
        for name in {"config.json", SAFETENSORS_INDEX_FILE} & {*names}:
            shutil.copy(hf_hub_download(repo, name, revision=revision), folder / name)
        metadata = HfApi().get_safetensors_metadata(repo, revision=revision)
        for name, file in metadata.files_metadata.items():
            _write_hollow(folder / Path(name).name, file)


@contextmanager
def _asking(source: str | os.PathLike[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Give repository, commit and file names of an id; what goes wrong inside gets a type."""
    name = os.fspath(source)
    if not isinstance(source, str) or not _ID.fullmatch(name):
        raise CheckpointError(f"{name} does not exist, and is not an id on the hub (org/name)")
    repo, _, revision = name.partition("@")
    try:
        info = HfApi().model_info(repo, revision=revision or None)
        yield repo, str(info.sha), [sibling.rfilename for sibling in info.siblings or ()]
    except ZipmoeError:
        raise
    except Exception as error:  # the client raises its own kinds and those of its HTTP library
        raise CheckpointError(f"cannot get {name} from the hub: {error}") from error


def _write_hollow(path: Path, file: SafetensorsFileMetadata) -> None:
    tensors = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for name, info in file.tensors.items()
    }
    text = json.dumps({"__metadata__": file.metadata, **tensors}).encode()
    end = max((info.data_offsets[1] for info in file.tensors.values()), default=0)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def _wanted(repo: str, names: list[str]) -> list[str]:
    """Files to download: those at the top that a checkpoint consists of, each by its full name."""
    top = [name for name in names if "/" not in name and not name.startswith(".")]
    weights = [name for name in top if name.endswith(_WEIGHTS)]
    weights = [name for name in weights if name.startswith("model")] or weights
    if not weights:
        formats = sorted({Path(name).suffix for name in names} & {".bin", ".gguf", ".pt"})
        raise UnsupportedModelError(
            f"{repo} has no safetensors{' but ' + ' and '.join(formats) if formats else ''}: "
            "zipmoe packs safetensors checkpoints only, because they hold the weights as they "
            "were published"
        )
    return weights + [name for name in top if name.endswith(_SMALL)]
