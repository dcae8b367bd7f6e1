"""A model's native parts, up to all of its decoder layers in one call for each token.

`replace_blocks` is the door: it puts native modules in the places of attention, MoE blocks, layers
and the model that they belong to. docs/decisions/0011-blocks-in-one-call.md says how they are
known.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from zipmoe import _core, experts
from zipmoe._forwards import DECODERS, fingerprint
from zipmoe._native_block import NativeBlock, in_place_of, takes
from zipmoe.blocks import (
    NativeMoe,
    asks_more,
    experts_of,
    native_attention,
    native_moe,
    placing_layer,
)
from zipmoe.layers import NativeLayer, native_layer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NativeDecoder", "replace_blocks"]

# What a configuration may ask of every pass, and what it would have to be.
_DEFAULTS = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
    "is_causal": None,
}


class NativeDecoder(NativeBlock):
    """Embedding, all decoder layers and the norm: the layers in one call for one more token each.

    Between two layers Python takes as long as a small product, with caches full of weights. Bits
    are those of the layers one by one. Several tokens of a sequence go layer by layer: then Python
    does not count, and who gives up a sequence need not wait for its end.
    """

    layers: Any
    embed_tokens: Any
    rotary_emb: Any
    norm: Any
    config: Any

    def forward(self, input_ids: torch.Tensor | None = None, *rest: Any, **kwargs: Any) -> Any:
        """Run the model, as the class does that this one stands for."""
        hidden = None if rest else self._step(input_ids, **kwargs)
        if hidden is None:
            return super().forward(input_ids, *rest, **kwargs)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=kwargs["past_key_values"]
        )

    def _step(
        self,
        ids: torch.Tensor | None,
        *,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Take each sequence a token further: the states [batch, 1, hidden] after the last layer.

        None where this cannot be done so; then nothing has happened.
        """
        if (
            ids is None
            or ids.shape[1:] != (1,)
            or inputs_embeds is not None
            or not (self.config.use_cache if use_cache is None else use_cache)
            or not _shows_all(attention_mask)
            or not self._asks_nothing(kwargs)
            or not self.is_intact(looked_at=False)
        ):
            return None
        layers: list[Any] = [*self.layers]
        found = [placing_layer(past_key_values, layer.self_attn.layer_idx) for layer in layers]
        caches = [cache for cache in found if cache is not None]
        half, source = layers[0].self_attn, layers[0].source
        are_chosen = half.is_chosen() and experts.is_chosen(self.config)
        if len(caches) != len(found) or not are_chosen:
            return None
        x = self.embed_tokens(ids)
        if not takes(x):
            return None
        if position_ids is None:
            position_ids = torch.tensor([[past_key_values.get_seq_length()]])
        embeddings = self.rotary_emb(x, position_ids)  # kept: the core is given addresses
        step = half.step(x, embeddings, None, past_key_values, {})
        if step is None:
            return None
        _, kv_heads, width, _ = half.heads
        others = [cache.place((len(ids), kv_heads, 1, width), x) for cache in caches[1:]]
        x = x.contiguous()
        out = torch.empty_like(x)
        self.native.run(source.engine, source.cache, x.data_ptr(), out.data_ptr(), step, others)
        return out

    def _asks_nothing(self, kwargs: dict[str, Any]) -> bool:
        """Tell whether nothing is asked for but states."""
        config = self.config
        return (
            not asks_more(kwargs)
            and all(kwargs.get(name) in {None, value} for name, value in _DEFAULTS.items())
            and all(getattr(config, name, value) == value for name, value in _DEFAULTS.items())
        )


def _shows_all(mask: Any) -> bool:
    """Tell whether a mask of tokens hides none."""
    return mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool(mask.all()))


def native_decoder(module: Any) -> NativeDecoder | None:
    """Make the native form of a model without its head; None where it is not known throughout."""
    sees_all = DECODERS.get(fingerprint(type(module)))
    if sees_all is None or not sees_all(module.config):
        return None
    config, layers = module.config, list(module.layers)
    if (
        len(layers) != config.num_hidden_layers
        or not all(isinstance(layer, NativeLayer) for layer in layers)
        or len({layer.self_attn.heads for layer in layers}) != 1
        or any(config is not layer.self_attn.config for layer in layers)
        or any(config is not x.mlp.experts.config for x in layers if x.number is not None)
    ):
        return None
    decoder: NativeDecoder = in_place_of(module, NativeDecoder)
    native = _core.DecoderLayers([(layer.native, layer.number or 0) for layer in layers])
    decoder.made_of(native, ("layers",))
    return decoder


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
    source = next((block.source for block in replaced if isinstance(block, NativeMoe)), None)
    layers: list[NativeLayer] = []
    for name, module in list(model.named_modules()):
        layer = native_layer(module, source)
        if layer is not None:
            _put(model, name, layer)
            layers.append(layer)
    for layer, following in pairwise(layers) if lookahead else ():
        if following.number is not None:
            layer.native.followed_by(following.native, following.number)
    replaced += layers
    for name, module in list(model.named_modules()):
        decoder = native_decoder(module)
        if name and decoder is not None:
            _put(model, name, decoder)
            replaced.append(decoder)
    return replaced, left


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
