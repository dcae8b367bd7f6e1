"""Decoder layers in one call of the engine, or their halves, where their code is known.

`replace_blocks` is the door: it puts native modules in the places of attention, MoE blocks and
whole layers. docs/decisions/0011-blocks-in-one-call.md says how they are known.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from zipmoe import _core
from zipmoe._forwards import LAYERS, fingerprint
from zipmoe._native_block import NativeBlock, in_place_of, takes
from zipmoe.blocks import (
    NativeAttention,
    NativeMoe,
    experts_of,
    native_attention,
    native_moe,
    norm_rule,
)
from zipmoe.norm import RMSNorm

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NativeLayer", "replace_blocks"]

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class NativeLayer(NativeBlock):
    """Norm, attention, sum; norm, experts, sum: the same bits as its two halves."""

    self_attn: NativeAttention
    mlp: NativeMoe

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the layer: [batch, queries, hidden] to the same."""
        x = hidden_states
        modules: Any = self._modules
        half, moe = modules["self_attn"], modules["mlp"]
        if self.is_intact(looked_at=False) and takes(x) and moe.is_chosen():
            step = half.step(x, position_embeddings, attention_mask, past_key_values, kwargs)
            if step is not None:
                x = x.contiguous()
                out = torch.empty_like(x)
                source = moe.source
                self.native.run(
                    source.engine, source.cache, moe.layer, x.data_ptr(), out.data_ptr(), step
                )
                return out
        return super().forward(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )


def replace_blocks(
    model: nn.Module, *, lookahead: bool = True
) -> tuple[list[NativeBlock], list[nn.Module]]:
    """Put native modules in the places of what can be run in one call.

    Norms and gated blocks must have been replaced before. With lookahead, each layer asks the next
    one's router beforehand. Returns the new modules, and attentions and MoE blocks that run part by
    part.
    """
    replaced: list[NativeBlock] = []
    left: list[nn.Module] = []
    for name, module in list(model.named_modules()):
        is_attention = type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
        if not is_attention and experts_of(module) is None:
            continue
        native = native_attention(module) if is_attention else native_moe(module)
        if native is None:
            left.append(module)
        else:
            _put(model, name, native)
            replaced.append(native)
    layers: list[NativeLayer] = []
    for name, module in list(model.named_modules()):
        layer = _native_layer(module)
        if layer is not None:
            _put(model, name, layer)
            layers.append(layer)
    for layer, following in pairwise(layers) if lookahead else ():
        layer.native.followed_by(following.native, following.mlp.layer)
    return [*replaced, *layers], left


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)


def _native_layer(module: Any) -> NativeLayer | None:
    if fingerprint(type(module)) not in LAYERS:
        return None
    norms, attention, moe = (
        [module.input_layernorm, module.post_attention_layernorm],
        module.self_attn,
        module.mlp,
    )
    if (
        not isinstance(attention, NativeAttention)
        or not isinstance(moe, NativeMoe)
        or not all(type(norm) is RMSNorm for norm in norms)
    ):
        return None
    before_attention, before_moe = map(norm_rule, norms)
    layer: NativeLayer = in_place_of(module, NativeLayer)
    layer.made_of(
        _core.DecoderLayer(
            attention=attention.native,
            moe=moe.native,
            before_attention=before_attention,
            before_moe=before_moe,
        ),
        _PARTS,
    )
    return layer
