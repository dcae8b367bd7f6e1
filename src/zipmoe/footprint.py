"""A model's skeleton → what it will need in memory besides its weights.

The skeleton is on the meta device: shapes without data. Running it for a few tokens shows what
its KV cache and recurrent states hold, for every family alike; reading a config can only guess at
that.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from zipmoe import _rehearsal
from zipmoe.budget import Activations

__all__ = ["activations", "dense_bytes", "forward_bytes", "kv_bytes", "step_bytes"]

_log = logging.getLogger(__name__)


def dense_bytes(model: nn.Module, plan: dict[str, torch.dtype]) -> int:
    """Bytes of all parameters and buffers that the skeleton will hold, tied ones once.

    `plan` is transformers' own: parts of names, and the dtype that these parameters are kept in.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    held = [pair for pair in model.named_parameters() if pair[0] not in tied]
    held += list(model.named_buffers())  # type: ignore[arg-type]
    total = 0
    for name, tensor in held:
        kept = [dtype.itemsize for part, dtype in plan.items() if part.strip("*.") in name]
        total += tensor.numel() * max([tensor.element_size(), *kept])
    return total


def kv_bytes(model: Any, context: int) -> int:
    """Bytes of the KV cache and the recurrent states after `context` tokens, batch 1.

    Sliding windows are counted in full: a prompt fills them before they slide. One layer is
    counted twice, as a cache grows by making a larger copy.
    """
    sizes = []
    for tokens in (5, 9):
        try:
            sizes.append(_state_sizes(model, tokens))
        except (RuntimeError, NotImplementedError) as error:  # control flow that depends on data
            _log.info("KV cache estimated from the config: %s", error)
            return _kv_from_config(model.config.get_text_config(decoder=True), context)
    short, long = sum(sizes[0]), sum(sizes[1])
    per_token = max(long - short, 0) / 4
    fixed = max(short - 5 * per_token, 0)
    total = fixed + per_token * context
    layers = max(len(sizes[1]), 1)
    return int(total + 2 * total / layers) + 1


@torch.no_grad()
def _state_sizes(model: Any, tokens: int) -> list[int]:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    cache = model(input_ids=ids, use_cache=True).past_key_values
    if cache is None:
        raise NotImplementedError("the model keeps no cache")
    layers = list(getattr(cache, "layers", None) or [cache])
    seen: set[int] = set()
    return [_tensor_bytes(layer, seen, depth=0) for layer in layers]


def _tensor_bytes(value: Any, seen: set[int], depth: int) -> int:
    if id(value) in seen or depth > 6:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_tensor_bytes(item, seen, depth + 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(item, seen, depth + 1) for item in value)
    if type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        return _tensor_bytes(vars(value), seen, depth + 1)
    return 0


def _kv_from_config(config: Any, context: int) -> int:
    """Bound it where the skeleton cannot run: all heads in every layer, keys and values, FP32."""
    get = vars(config).get
    heads = max(get("num_key_value_heads") or 0, get("num_attention_heads") or 1)
    rope_and_rest = (get("qk_rope_head_dim") or 0) + (get("qk_nope_head_dim") or 0)
    width = max(get("head_dim") or 0, rope_and_rest, get("v_head_dim") or 0)
    width = width or -(-config.hidden_size // heads)
    layers = get("num_hidden_layers") or get("num_layers") or 1
    attentions = 2 if get("num_layers") else 1  # longcat_flash: two attentions in a layer
    return int((layers * attentions + 1) * 2 * heads * width * 4 * context)


def activations(
    model: Any, *, expert_width: int, element_bytes: int, whole_experts: bool, one_call: bool
) -> Activations:
    """Widths that the size of a forward pass follows from."""
    config = model.config.get_text_config(decoder=True)
    output = model.get_output_embeddings()
    widest = max(
        (m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m is not output),
        default=config.hidden_size,
    )
    get = vars(config).get
    top_k = max(
        get(name) or 1
        for name in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "top_k")
    )
    return Activations(
        hidden=config.hidden_size,
        widest=widest,
        top_k=int(top_k),
        expert_width=expert_width,
        vocabulary=config.vocab_size,
        element_bytes=element_bytes,
        quadratic_heads=_heads_with_whole_scores(config),
        masked=True,
        whole_experts=whole_experts,
        one_call=one_call,
    )


def forward_bytes(model: Any, shape: Activations, context: int) -> int:
    """Bytes that a forward pass over a whole context holds at once.

    Rehearsed on the skeleton, with a margin for what operators take inside; from the widths where
    it cannot run.
    """
    try:
        rehearsed = _rehearsal.peak_bytes(model, context)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        _log.info("activations estimated from the widths: %s", error)
        return shape.bytes(context)
    mask = context * context * 4 * shape.masked  # a mask of bool is copied to a float one
    return int(rehearsed * 1.15) + mask + shape.experts_bytes(context) + (32 << 20)


def step_bytes(model: Any, shape: Activations, streams: int) -> int:
    """Bytes that one token more of each of some streams holds at once, all their logits too."""
    if not streams:
        return 0
    return forward_bytes(model, shape, streams) + streams * shape.vocabulary * 8


def _heads_with_whole_scores(config: Any) -> int:
    """Heads whose scores [tokens, tokens] are held whole, by eager attention, or by torch's own.

    torch's fused attention on the CPU wants keys and values of one width; latent attention has
    two. Indexers of sparse attention score all pairs as well.
    """
    get = vars(config).get
    latent = (get("qk_nope_head_dim") or 0) + (get("qk_rope_head_dim") or 0)
    unequal = (get("v_head_dim") or 0) not in {0, latent or get("head_dim")}
    eager = getattr(config, "_attn_implementation", None) == "eager"
    heads = (get("num_attention_heads") or 1) if eager or unequal else 0
    return heads + (get("index_n_heads") or get("indexer_n_heads") or 0)
