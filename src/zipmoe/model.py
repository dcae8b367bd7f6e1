"""A store → an ordinary transformers model bound to the expert cache.

`load` is the library's door. What happens behind `from_pretrained` is in `_quantizer.py`; what a
forward pass does with experts is in `experts.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils.generic import ContextManagers

from zipmoe import budget
from zipmoe._errors import FormatError
from zipmoe._quantizer import LoadOptions, Runtime, loading, make_known
from zipmoe._skeleton import bind_skeleton
from zipmoe.store import open_store
from zipmoe.tiers import parse_tiers

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from zipmoe._skeleton import Skeleton

__all__ = ["Loaded", "load", "skeleton_of"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
# glibc gives blocks of this size and more back to the system when they are freed, and keeps few
# arenas: what torch frees after a step must not stay with the process. See
# docs/decisions/0009-memory-budget.md.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENAS = 1 << 20, 1 << 20, 2


class Loaded:
    """A loaded model and its tokenizer (None if the checkpoint has none). Unpacks into these two.

    It owns threads, files and memory: close it, or use it in a `with` block. A model that nobody
    refers to any more frees them too.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def runtime(self) -> Runtime:
        """The expert cache and what is at work (`model.zipmoe`)."""
        return self.model.zipmoe

    @property
    def memory(self) -> budget.MemoryReport:
        """How the memory granted is shared out."""
        return self.runtime.report

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together that the memory was counted for."""
        return self.runtime.context

    def close(self) -> None:
        """Free threads, files and memory. Idempotent; the model cannot run afterwards."""
        self.runtime.close()
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            tensor.data = tensor.data.new_empty(0)


def load(
    store: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    compute: str = "native",
    context: int | None = None,
    conversations: int = 0,
    streams: int = 0,
    policy: str = "",
    batch: int = 1,
    lookahead: bool = True,
    tiers: str | Sequence[int | float] | None = None,
) -> Loaded:
    """Load a packed model.

    Parameters
    ----------
    store : the folder that `zipmoe pack` made.
    memory : what the whole process may take: "2GB", "1500MB", "2GiB" or bytes. None: what the
    machine or the
        cgroup has available, less a reserve.
    compute : "native": straight from the packed weights, each row in one fixed order. "torch":
        decoded weights through torch's own operators, bit for bit as stock transformers. Of a
        lossy store either computes with what it holds; `runtime.lossy` and the model's
        `config.quantization_config.lossy` say what that is.
    context : most tokens of prompt and answer together; their KV cache is counted in the memory.
        None: 4096, or the model's maximum if that is less.
    conversations : how many of that length are held side by side, through `zipmoe.streams`; 0: one,
        by the model's own `generate`.
    streams : how many answers are written while a prompt is read.
    policy : which expert goes when memory for one is needed: "request" (the default), or "lru",
        "lfu", "fifo", "marking", "edgemoe" to compare with. No result depends on it.
    batch : sequences that run together in one call of the model, each of `context` tokens at most.
        More than were counted for are refused with a BudgetError where they do not fit.
    lookahead : whether experts that the next layer will probably want are read while the drive
        would be idle. No result depends on it.
    tiers : "F,C,S,E": how much the expert cache holds decoded, compressed, as
        sign-mantissas alone and as exponents alone, each a number of experts or, with %, a share of
        its memory. Whoever is worth most is in the first. Experts being used count as compressed.
        None: all compressed. No result depends on it.

    Returns
    -------
    Loaded
        Unpacks into (model, tokenizer). The model is an ordinary transformers model.

    Raises
    ------
    FormatError, CorruptError, MismatchError
        The store cannot be used.
    BudgetError
        The memory is below the floor of this model and context, or too little for the tiers.
    ZipmoeError
        The experts' codec does not have these tiers.
    ValueError
        An option that does not exist.
    """
    options = LoadOptions(
        memory=None if memory is None else budget.parse_memory(memory),
        context=context,
        conversations=conversations,
        streams=streams,
        compute=compute,
        policy=policy,
        batch=batch,
        lookahead=lookahead,
        tiers=None if tiers is None else parse_tiers(tiers),
    )
    folder = Path(store)
    open_store(folder).close()  # transformers reads nothing that has not been verified
    config = AutoConfig.from_pretrained(folder)
    _tell_malloc()
    tokenizer = None
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with loading(options), _without_progress_bar():
        model = _model_class(config).from_pretrained(folder, dtype="auto")
    return Loaded(model, tokenizer)


def skeleton_of(folder: Path, store: Any, options: LoadOptions) -> Skeleton:
    """Count what a model would need, and load nothing.

    `store` is an open store, or a sketch of one; `folder` has its config.json, or the checkpoint's.
    The skeleton is made as `from_pretrained` makes it.

    Raises
    ------
    MismatchError, FormatError
        transformers has no such language model, or one with other experts.
    """
    make_known()
    config = AutoConfig.from_pretrained(folder)
    dtype = getattr(torch, store.dtype)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype
    model_class = _model_class(config)
    context = model_class.get_init_context(dtype, True, False, None)
    base = budget.base_bytes(budget.rss_bytes())
    with ContextManagers(context):
        model = model_class(config).eval()
        return bind_skeleton(model, store, options, base)


def _model_class(config: Any) -> Any:
    """Find the class that the checkpoint was saved from, if it is one that generates text."""
    classes = [
        found
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        if (found := mapping.get(type(config), None)) is not None
    ]
    named = [found for found in classes if found.__name__ in (config.architectures or ())]
    if not classes:
        raise FormatError(
            f"transformers {transformers.__version__} has no language model for {config.model_type}"
        )
    return (named or classes)[0]


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing: only the commands show progress."""
    drawn = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            transformers.logging.enable_progress_bar()


def _tell_malloc() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; other C libraries have no such habit to break
        for parameter, value in ((-3, _MMAP_THRESHOLD), (-1, _TRIM_THRESHOLD), (-8, _ARENAS)):
            libc.mallopt(parameter, value)
