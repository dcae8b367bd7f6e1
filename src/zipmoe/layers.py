"""Decoder layers in one call of the engine each, where their code and their halves are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zipmoe import _core
from zipmoe._forwards import LAYERS, fingerprint
from zipmoe._native_block import NativeBlock, in_place_of, takes
from zipmoe.blocks import NativeAttention, NativeMoe, norm_rule
from zipmoe.gated import GatedBlock
from zipmoe.norm import RMSNorm

if TYPE_CHECKING:
    from zipmoe._expert_source import ExpertSource

__all__ = ["NativeLayer", "native_layer"]

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class NativeLayer(NativeBlock):
    """Norm, attention, sum; norm, experts or dense block, sum: the same bits as its two halves."""

    self_attn: NativeAttention
    mlp: NativeMoe | GatedBlock
    source: ExpertSource
    number: int | None  # ordinal of its experts in the store; None: it has none

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
        half, mlp = modules["self_attn"], modules["mlp"]
        is_chosen = self.number is None or mlp.is_chosen()
        if self.is_intact(looked_at=False) and takes(x) and is_chosen:
            step = half.step(x, position_embeddings, attention_mask, past_key_values, kwargs)
            if step is not None:
                x = x.contiguous()
                out = torch.empty_like(x)
                source, number = self.source, self.number or 0
                self.native.run(
                    source.engine, source.cache, number, x.data_ptr(), out.data_ptr(), step
                )
                return out
        return super().forward(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )


def native_layer(module: Any, source: ExpertSource | None) -> NativeLayer | None:
    """Make the native form of a layer; None where its code or its parts are not known.

    source: of the model's experts, if any of them are run in one call.
    """
    if source is None or fingerprint(type(module)) not in LAYERS:
        return None
    norms, attention, mlp = (
        [module.input_layernorm, module.post_attention_layernorm],
        module.self_attn,
        module.mlp,
    )
    if (
        not isinstance(attention, NativeAttention)
        or not isinstance(mlp, NativeMoe | GatedBlock)
        or not all(type(norm) is RMSNorm for norm in norms)
    ):
        return None
    before_attention, before_mlp = map(norm_rule, norms)
    layer: NativeLayer = in_place_of(module, NativeLayer)
    layer.source = source
    layer.number = mlp.layer if isinstance(mlp, NativeMoe) else None
    layer.made_of(
        _core.DecoderLayer(
            attention=attention.native,
            mlp=mlp.native if isinstance(mlp, NativeMoe) else mlp.parts,
            before_attention=before_attention,
            before_mlp=before_mlp,
        ),
        _PARTS,
    )
    return layer
