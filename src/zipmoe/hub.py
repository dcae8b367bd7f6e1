"""A folder or an id on the Hugging Face hub → a local checkpoint folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from zipmoe._errors import CheckpointError, UnsupportedModelError, ZipmoeError

__all__ = ["resolve_checkpoint"]

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
    name = os.fspath(source)
    if not isinstance(source, str) or not _ID.fullmatch(name):
        raise CheckpointError(f"{name} does not exist, and is not an id on the hub (org/name)")
    repo, _, revision = name.partition("@")
    try:
        info = HfApi().model_info(repo, revision=revision or None)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        return Path(snapshot_download(repo, revision=info.sha, allow_patterns=_wanted(repo, names)))
    except ZipmoeError:
        raise
    except Exception as error:  # the client raises its own kinds and those of its HTTP library
        raise CheckpointError(f"cannot get {name} from the hub: {error}") from error


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
