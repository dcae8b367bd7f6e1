"""What a module's forward does, by its code: the families of transformers share most of theirs.

A module may be run in another way only if its code is known word for word, with the functions of
its own file that it calls. `fingerprint` makes one name of that; `ATTENTIONS`, `MOE_BLOCKS`,
`LAYERS`, `DECODERS` and `ROUTERS` say what each known one computes. An unknown one runs as
transformers wrote it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

from zipmoe._core import GroupScore, RouterScore

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ATTENTIONS",
    "DECODERS",
    "LAYERS",
    "MOE_BLOCKS",
    "ROUTERS",
    "MoeForward",
    "fingerprint",
]

_DIGITS = 16


def fingerprint(kind: Any) -> str:
    """Name the code of a class's forward, without comments and annotations; "" if there is none."""
    return _fingerprint(kind)


@functools.cache
def _fingerprint(kind: Any) -> str:
    try:
        parts = _sources(inspect.unwrap(kind.forward), set())
    except (AttributeError, OSError, TypeError):
        return ""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_DIGITS]


def _sources(function: FunctionType, seen: set[str]) -> list[str]:
    """Bare source of a function, then of the functions of the same file that it names."""
    parts = [_bare(function)]
    for name in sorted({*function.__code__.co_names} - seen):
        called: Any = function.__globals__.get(name)
        called = inspect.unwrap(called) if callable(called) else None
        if isinstance(called, FunctionType) and called.__module__ == function.__module__:
            seen.add(name)
            parts += [name, *_sources(called, seen)]
    return parts


def _bare(function: FunctionType) -> str:
    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    tree.name, tree.returns, tree.decorator_list = "_", None, []
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return ast.unparse(tree)


def _has_norms(module: Any) -> bool | None:
    """Tell of an attention whether queries and keys are normed; None where it cannot be said."""
    clips = getattr(module.config, "clip_qkv", None) is not None
    return None if clips else getattr(module, "use_qk_norm", True)


# Queries, keys and values by one product each; norms of queries and keys, if so; rotation by
# halves, of the first words of a head; attention; one product more.
ATTENTIONS: dict[str, Callable[[Any], bool | None]] = {
    "1ae7510d35d407be": lambda _: False,  # Qwen2MoeAttention
    "f60eba4e8cdd5d43": lambda _: False,  # MixtralAttention
    "76d5e8d666a316b1": _has_norms,  # Qwen3MoeAttention
    "e515bf371db10c98": _has_norms,  # Qwen3VLMoeTextAttention
    "67fc64f4af137c5f": _has_norms,  # OlmoeAttention
    "bdeca46436927ec8": _has_norms,  # FlexOlmoAttention
    "50823e396df1d983": _has_norms,  # MiniMaxM2Attention
    "5003f11cc4e7fd52": _has_norms,  # Glm4MoeAttention
}


@dataclass(frozen=True)
class MoeForward:
    """Names of a block's parts: experts(x, *router(x)), and what all tokens visit is added."""

    router: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None


MOE_BLOCKS = {
    "71b391d5d5f92858": MoeForward(shared="shared_expert", shared_gate="shared_expert_gate"),
    "114209186934d096": MoeForward(),  # Qwen3MoeSparseMoeBlock
    "8c82b262c5fb5428": MoeForward(),  # MixtralSparseMoeBlock
    "a32c450b0121f1f3": MoeForward(),  # OlmoeSparseMoeBlock
    "c6866b29ff06b220": MoeForward(shared="shared_experts"),  # DeepseekV3MoE
    "6e2e6947de01bec2": MoeForward(router="router"),  # GraniteMoeMoE
}


# x + self_attn(input_layernorm(x)), then the same with post_attention_layernorm and mlp.
LAYERS = {
    "f634ba73a07f0b8d",  # Qwen2MoeDecoderLayer, and those of thirty others
    "4956a53a8ffe1928",  # MixtralDecoderLayer
}


# embed_tokens; rotary_emb of the positions; each of the layers; norm. Whether all layers, by the
# configuration, show a token the whole sequence before it.
DECODERS: dict[str, Callable[[Any], bool]] = {
    "d55a8e340fae3cb8": lambda _: True,  # OlmoeModel, Glm4MoeModel
    "9cd1bbe5c0e4010f": lambda config: config.sliding_window is None,  # MixtralModel, Qwen3MoeModel
    "3a923e0e528b0f68": lambda config: {*config.layer_types} == {"full_attention"},  # Qwen2MoeModel
}


def _softmax(module: Any, **more: Any) -> dict[str, Any]:
    """Take the best k of the softmax of the logits."""
    return {
        "k": module.top_k,
        "score": RouterScore.softmax,
        "normalises": getattr(module, "norm_topk_prob", True),
    } | more


def _deepseek(module: Any, **more: Any) -> dict[str, Any]:
    """Take the best k scores in the best groups."""
    return {
        "k": module.top_k,
        "scaling": module.routed_scaling_factor,
        "num_groups": module.num_group or 1,
        "kept_groups": module.topk_group or 1,
    } | more


def _deepseek_v2(module: Any) -> dict[str, Any]:
    rule = _deepseek(module, score=RouterScore.softmax)
    return rule if module.topk_method != "greedy" else rule | {"num_groups": 1, "kept_groups": 1}


# What the core's RouterRule is made of besides the number of experts. `correction` is a tensor.
ROUTERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "175f5740ddc731a9": _softmax,  # Qwen2MoeTopKRouter
    "9cc919dcf1ce4087": lambda module: _softmax(
        module, normalises=True
    ),  # Qwen3VLMoeTextTopKRouter
    "04e7f3aa83612719": lambda module: _softmax(module, normalises=True),  # MixtralTopKRouter
    # A softmax of the chosen logits alone is the softmax of all, normalised: GraniteMoeTopKRouter.
    "be544c207a9f5332": lambda module: _softmax(module, normalises=True),
    "68a4432a3794c153": lambda module: _deepseek(  # DeepseekV3TopkRouter
        module,
        score=RouterScore.sigmoid,
        normalises=module.norm_topk_prob,
        least_sum=1e-20,
        correction=module.e_score_correction_bias,
        group_score=GroupScore.two_best,
    ),
    "1455d7c3055f7f95": _deepseek_v2,
}
