"""Attention of a transformers model by the native core: every query row alone, in one fixed order.

`register` adds "zipmoe" to transformers' attention and mask interfaces. What the core does not do
goes to transformers' own functions, and `FALLBACKS` counts why: `engaged` shows it, because the
guarantee that a row's bits depend on nothing but its own keys does not hold there.

Masks are transformers' own boolean ones. None means what it means for its `sdpa`, with one
exception: here more keys than queries always come with a mask, unless there is one query only.
"""

from __future__ import annotations

import atexit
import math
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from zipmoe import _core

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "FALLBACKS",
    "IMPLEMENTATION",
    "IRRELEVANT",
    "MASK_TYPES",
    "Fallbacks",
    "attention_forward",
    "mask",
    "mask_strides",
    "register",
]

IMPLEMENTATION = "zipmoe"

# What passes through the attention interface without a meaning for it, or with one for flash
# attention only: masks say the same.
IRRELEVANT = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "shared_kv_states",
        "sliding_window",
        "token_type_ids",
        "use_cache",
    }
)
_SDPA = {"dropout", "scaling", "is_causal", "position_bias", "cache"}
_KNOWN = {*_SDPA - {"cache"}, "output_attentions", "softcap", "s_aux", "sinks"}
MASK_TYPES = {torch.bool: "bool", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Fallbacks:
    """Why calls went to transformers' own functions, and how many did. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """Count one call."""
        with self._lock:
            self._counts[reason] += 1

    def reasons(self) -> dict[str, int]:
        """Return reason -> calls since the start, or since `clear`."""
        with self._lock:
            return dict(self._counts)

    def clear(self) -> None:
        """Forget them."""
        with self._lock:
            self._counts.clear()


FALLBACKS = Fallbacks()
_engine: Any = None


def engine() -> Any:
    """Return the core's attention that all models of this process share."""
    global _engine  # noqa: PLW0603
    if _engine is None:
        _engine = _core.Attention()
        atexit.register(_forget_engine)  # transformers' tables keep this module until the very end
    return _engine


def _forget_engine() -> None:
    global _engine  # noqa: PLW0603
    _engine = None


def register() -> None:
    """Make "zipmoe" known to transformers as an attention implementation. Idempotent."""
    # Not at import, as in zipmoe._quantizer.validate_environment.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: PLC0415
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415

    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, mask)


def mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """Build the boolean mask [batch, 1, queries, keys], or None where causality says it all.

    As transformers' `sdpa_mask`, but not None where a cache has room for more keys than there are
    queries: a model that cuts queries off afterwards (gemma4) would lose which ones are left.
    """
    from transformers.masking_utils import sdpa_mask  # noqa: PLC0415

    if q_length not in {1, kv_length}:
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(batch_size, q_length, kv_length, **kwargs)


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend, as transformers' attention interface wants it: [batch, queries, heads, width].

    A row that may see no key gives zeros.
    """
    given = {
        name: argument
        for name, argument in kwargs.items()
        if argument is not None and name not in IRRELEVANT
    }
    attention_mask = _with_selection(module, key, attention_mask, given, kwargs.get("position_ids"))
    reason = _why_not(module, (query, key, value), attention_mask, given)
    if reason is not None:
        FALLBACKS.add(reason)
        return _transformers(module, (query, key, value), attention_mask, given)
    scaling = given.pop("scaling", None)
    if scaling is None:
        scaling = _default_scaling(module, query)
    softcap = given.pop("softcap", 0.0)
    causal = _is_causal(module, query, key, attention_mask, given.pop("is_causal", None))
    bias = given.pop("position_bias", None)
    sinks = _sinks(module, given)
    return attend(
        query,
        _rows(key),
        _rows(value),
        scaling=scaling,
        softcap=softcap,
        causal=causal,
        mask=attention_mask,
        bias=bias,
        sinks=sinks,
    ), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float = 0.0,
    causal: bool = False,
    offset: int = 0,
    window: int = 0,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    core: Any = None,
) -> torch.Tensor:
    """Attend natively: BF16 [batch, heads, rows, width] in, [batch, queries, heads, width] out.

    key, value: fewer heads than `query` if groups share them. mask: boolean, or added (lowest of
    its type: not allowed); bias: added. Either broadcasts to [batch, heads, queries, keys]. sinks:
    FP32, broadcasts to [batch, heads, queries]. causal: query t sees keys up to t + offset, and of
    those the last `window` if that is not 0. core: an instance of `_core.Attention`.
    """
    query = _rows(query)
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    batch = max(batch, key.shape[0])
    out = query.new_empty((batch, queries, heads, value.shape[3]))
    o = out.stride()
    (core or engine()).run(
        (batch, heads, kv_heads, queries, keys),
        (width, value.shape[3]),
        _tensor(query, batch),
        _tensor(key, batch),
        _tensor(value, batch),
        (out.data_ptr(), (o[0], o[2], o[1])),
        scaling=scaling,
        softcap=softcap,
        causal=causal,
        offset=offset,
        window=window,
        mask=mask_strides(mask, (batch, heads, queries, keys)),
        bias=mask_strides(bias, (batch, heads, queries, keys)),
        sinks=None if sinks is None else _sinks_tensor(sinks, (batch, heads, queries)),
    )
    return out


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Words of a row side by side; nothing is copied where they are already."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _tensor(tensor: torch.Tensor, batch: int) -> tuple[int, tuple[int, int, int]]:
    first, second, third, _ = tensor.stride()
    return tensor.data_ptr(), (first if tensor.shape[0] == batch else 0, second, third)


def mask_strides(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> Any:
    """Describe a mask, broadcast to [batch, heads, queries, keys], to the core."""
    if tensor is None:
        return None
    strides = tensor.expand(shape).stride()
    return tensor.data_ptr(), strides, MASK_TYPES[tensor.dtype]


def _sinks_tensor(tensor: torch.Tensor, shape: tuple[int, ...]) -> Any:
    return tensor.data_ptr(), tensor.expand(shape).stride()


def _with_selection(
    module: Any,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    given: dict[str, Any],
    positions: torch.Tensor | None,
) -> torch.Tensor | None:
    """Put what a sparse model selected into the mask, as its own code does for sdpa and eager."""
    indices = given.pop("indices", None)
    if indices is not None:
        shape = (*indices.shape[:2], key.shape[2])
        chosen = (
            torch.zeros(shape, dtype=torch.bool).scatter_(-1, indices.long(), True).unsqueeze(1)
        )
        attention_mask = _both(chosen, attention_mask)
    blocks = given.get("block_indices")
    if blocks is not None and positions is not None and hasattr(module, "indexer"):
        del given["block_indices"]
        positions = positions if positions.ndim > 1 else positions.unsqueeze(0)
        attention_mask = module.indexer.build_block_mask(
            blocks,
            attention_mask,
            key.shape[2],
            key.dtype,
            key.device,
            positions.expand(blocks.shape[0], -1),
        )
    return attention_mask


def _both(chosen: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return chosen
    if attention_mask.dtype == torch.bool:
        return attention_mask & chosen
    return attention_mask.masked_fill(~chosen, torch.finfo(attention_mask.dtype).min)


def _why_not(
    module: Any,
    tensors: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None,
    given: dict[str, Any],
) -> str | None:
    """Say why the core cannot do this call, or return None."""
    query, key, value = tensors
    if torch.compiler.is_compiling():
        return "torch.compile"
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        return "heads that do not fit"
    return (
        next(filter(None, map(_why_not_tensor, tensors)), None)
        or _why_not_mask("mask", attention_mask)
        or _why_not_mask("position_bias", given.get("position_bias"))
        or _why_not_argument(module, query.shape[1], given)
    )


def _why_not_tensor(tensor: torch.Tensor) -> str | None:
    if tensor.dtype != torch.bfloat16:
        return f"{tensor.dtype}".removeprefix("torch.")
    if tensor.device.type != "cpu":
        return f"device {tensor.device.type}"
    return "gradients" if tensor.requires_grad and torch.is_grad_enabled() else None


def _why_not_mask(name: str, mask: torch.Tensor | None) -> str | None:
    if mask is None or (mask.ndim == 4 and mask.dtype in MASK_TYPES):
        return None
    return f"{name} of {mask.ndim} dimensions, {mask.dtype}"


def _why_not_argument(module: Any, heads: int, given: dict[str, Any]) -> str | None:
    for name in ("dropout", "output_attentions"):
        if given.get(name):
            return name
    sinks = given.get("s_aux", getattr(module, "sinks", None))
    if "sinks" not in given and sinks is not None and sinks.numel() != heads:
        return "sinks that are not one for each head"
    unknown = [name for name, value in given.items() if name not in _KNOWN and value is not False]
    return f"argument {min(unknown)}" if unknown else None


def _default_scaling(module: Any, query: torch.Tensor) -> float:
    """Follow transformers where a model gives no scaling."""
    return 1 / math.sqrt(getattr(module, "head_dim", None) or query.shape[3])


def _is_causal(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    asked: bool | None,
) -> bool:
    causal = getattr(module, "is_causal", True) if asked is None else asked
    if not causal or attention_mask is not None or query.shape[2] == 1:
        return False
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"causal attention of {query.shape[2]} queries to {key.shape[2]} keys without a mask: "
            f"which keys are whose is not known; {type(module).__name__} has to pass a mask"
        )
    return True


def _sinks(module: Any, given: dict[str, Any]) -> torch.Tensor | None:
    """Return the sinks as FP32, broadcasting to [batch, heads, queries].

    inkling2 passes one per query, the others one per head; mimo_v2_flash keeps them in its module.
    """
    per_query = given.get("sinks")
    if per_query is not None:
        return per_query.squeeze(-1).float()
    per_head = given.get("s_aux", getattr(module, "sinks", None))
    return None if per_head is None else per_head.detach().float().view(1, -1, 1)


def _transformers(
    module: Any,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    given: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let transformers do it: by the model's eager function where sdpa would leave out a part."""
    query, key, value = tensors
    beyond_sdpa = given.keys() - _SDPA
    if not beyond_sdpa and getattr(module, "sinks", None) is None:
        from transformers.integrations.sdpa_attention import (  # noqa: PLC0415
            sdpa_attention_forward,
        )

        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"{type(module).__name__} passes {sorted(beyond_sdpa)} to its attention, which neither "
            "zipmoe nor transformers' sdpa knows; load it with another attn_implementation"
        )
    if _is_causal(module, query, key, attention_mask, given.get("is_causal")):
        length = query.shape[2]
        attention_mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.where(attention_mask, torch.zeros((), dtype=query.dtype), lowest)
    given.setdefault("scaling", None)
    eager_function: Callable[..., Any] = eager
    return eager_function(module, query, key, value, attention_mask, **given)
