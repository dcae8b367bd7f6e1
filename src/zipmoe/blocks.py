"""The two halves of a decoder layer, attention and MoE, in one call of the engine each.

`native_attention` and `native_moe` take modules whose code is known (`_forwards`) and whose parts
are what the core can run. Attention gives the same bits in one call as part by part; an MoE block
rounds once where it runs in one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zipmoe import _core, _expert_engine, attention, experts
from zipmoe._expert_source import ExpertMatrix, ExpertSource
from zipmoe._forwards import ATTENTIONS, MOE_BLOCKS, ROUTERS, MoeForward, fingerprint
from zipmoe._native_block import NativeBlock, in_place_of, takes
from zipmoe.gated import GatedBlock
from zipmoe.kv import GrowingLayer, SharedLayer
from zipmoe.linear import PackedWeight
from zipmoe.norm import RMSNorm

__all__ = [
    "NativeAttention",
    "NativeMoe",
    "asks_more",
    "experts_of",
    "native_attention",
    "native_moe",
    "norm_rule",
    "placing_layer",
]


class NativeAttention(NativeBlock):
    """Self-attention with rotary position embeddings, cache included, in one call."""

    layer_idx: int
    config: Any
    engine: Any
    heads: tuple[int, int, int, int]  # of queries, of keys; width; outputs

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Attend, as the class does that this one stands for."""
        x = hidden_states
        if self.is_intact() and takes(x):
            step = self.step(x, position_embeddings, attention_mask, past_key_values, kwargs)
            if step is not None:
                x = x.contiguous()
                out = torch.empty(*x.shape[:-1], self.heads[3], dtype=torch.bfloat16)
                self.native.run(self.engine, x.data_ptr(), out.data_ptr(), step)
                return out, None
        return super().forward(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    def step(
        self,
        x: torch.Tensor,
        embeddings: Any,
        mask: torch.Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Any, ...] | None:
        """Make room in the cache for the tokens of x [batch, queries, hidden].

        Returns what the core must know of them, None where it cannot do it.
        """
        layer = placing_layer(cache, self.layer_idx)
        if layer is None or asks_more(kwargs) or not self.is_chosen():
            return None
        batch, queries, _ = x.shape
        heads, kv_heads, width, _ = self.heads
        rotations = _rotations(embeddings, batch, width)
        is_causal = mask is None and queries > 1
        if (
            rotations is None
            or (is_causal and layer.get_seq_length())
            or not (mask is None or _is_mask_of(mask, layer))
        ):
            return None
        at = layer.place((batch, kv_heads, queries, width), x)
        if mask is not None:
            mask = attention.mask_strides(mask, (batch, heads, queries, layer.get_seq_length()))
        return batch, queries, *rotations, at, is_causal, mask

    def is_chosen(self) -> bool:
        """Tell whether the model's attention is still to be run by zipmoe."""
        chosen: bool = self.config._attn_implementation == attention.IMPLEMENTATION
        return chosen


def _is_mask_of(mask: torch.Tensor, layer: GrowingLayer | SharedLayer) -> bool:
    """Tell whether the core can use a mask: sequences of a shared step have no common columns."""
    return type(layer) is GrowingLayer and mask.dim() == 4 and mask.dtype in attention.MASK_TYPES


def placing_layer(cache: Any, number: int) -> GrowingLayer | SharedLayer | None:
    """Return the layer of a cache if the core can put keys and values into it."""
    layers = getattr(cache, "layers", ())
    layer = layers[number] if number < len(layers) else None
    if type(layer) is SharedLayer:
        return layer
    if type(layer) is not GrowingLayer or (
        layer.is_initialized and layer.dtype is not torch.bfloat16
    ):
        return None
    return layer


def asks_more(kwargs: dict[str, Any]) -> bool:
    """Tell whether arguments of a block ask for something else than its states."""
    return any(
        value is not None and value is not False and name not in attention.IRRELEVANT
        for name, value in kwargs.items()
    )


def _rotations(embeddings: Any, batch: int, width: int) -> Any:
    """Address and strides [batch, -, query] of cosines and sines, and how many words they turn."""
    if embeddings is None:
        return None
    found = []
    for tensor in embeddings:
        if tensor.dtype is not torch.bfloat16 or tensor.dim() != 3 or tensor.stride(2) != 1:
            return None
        if tensor.shape[0] not in {1, batch} or tensor.shape[2] > width or tensor.shape[2] % 2:
            return None
        stride = tensor.stride(0) if tensor.shape[0] == batch else 0
        found.append((tensor.data_ptr(), (stride, 0, tensor.stride(1))))
    return (*found, embeddings[0].shape[2])


class NativeMoe(NativeBlock):
    """Router, shared expert and routed experts in one call, rounded once."""

    source: ExpertSource
    layer: int  # ordinal of the experts in the store
    router_name: str
    experts: Any

    def forward(self, hidden_states: torch.Tensor) -> Any:
        """Run it: [..., hidden] to the same."""
        x = hidden_states
        if not self.is_intact() or not takes(x) or not self.is_chosen():
            return super().forward(x)
        router: Any = self._modules[self.router_name]
        if router._forward_hooks:
            router(x.view(-1, x.shape[-1]))  # somebody looks at what it gives
        x = x.contiguous()
        out = torch.empty_like(x)
        tokens = x.numel() // x.shape[-1]
        source = self.source
        self.native.run(
            source.engine, source.cache, self.layer, x.data_ptr(), tokens, out.data_ptr()
        )
        return out

    def is_chosen(self) -> bool:
        """Tell whether the model's experts are still to be run by zipmoe."""
        return experts.is_chosen(self.experts.config)


def native_attention(module: Any) -> NativeAttention | None:
    """Make the native form of an attention; None where its code or its parts are not known."""
    has_norms = ATTENTIONS.get(fingerprint(type(module)), lambda _: None)(module)
    parts: list[Any] = [getattr(module, f"{part}_proj", None) for part in "qkvo"]
    if has_norms is None or not module.is_causal or not all(map(_is_packed_linear, parts)):
        return None
    norms: list[Any] = [module.q_norm, module.k_norm] if has_norms else []
    if not all(type(norm) is RMSNorm for norm in norms):
        return None
    query, key, value, output = ((part.weight.matrix, _address(part.bias)) for part in parts)
    width = module.head_dim
    block: NativeAttention = in_place_of(module, NativeAttention)
    block.heads = (query[0].rows // width, key[0].rows // width, width, output[0].rows)
    block.engine = parts[0].weight.engine
    query_norm, key_norm = map(norm_rule, norms) if norms else (None, None)
    native = _core.AttentionBlock(
        query=query,
        key=key,
        value=value,
        output=output,
        heads=block.heads[0],
        kv_heads=block.heads[1],
        width=width,
        scaling=module.scaling,
        query_norm=query_norm,
        key_norm=key_norm,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", *(["q_norm", "k_norm"] if norms else [])]
    block.made_of(native, names)
    return block


def _is_packed_linear(part: Any) -> bool:
    bias = getattr(part, "bias", None)
    return (
        type(part) is nn.Linear
        and isinstance(part.weight, PackedWeight)
        and (bias is None or (bias.dtype is torch.bfloat16 and bias.is_contiguous()))
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def norm_rule(norm: RMSNorm) -> Any:
    """Describe a norm to the core."""
    weight = norm.weight
    assert weight is not None
    return norm.kind, norm.eps, weight.numel(), weight.data_ptr(), weight.dtype is torch.float32


def experts_of(module: nn.Module) -> Any:
    """Return the experts module whose parent this one is, if it is one."""
    found = module._modules.get("experts")
    down = getattr(found, "down_proj", None)
    return found if isinstance(down, ExpertMatrix) and hasattr(found, "has_gate") else None


def native_moe(module: Any) -> NativeMoe | None:
    """Make the native form of an MoE block; None where its code or its parts are not known."""
    form = MOE_BLOCKS.get(fingerprint(type(module)))
    if form is None:
        return None
    routed = experts_of(module)
    router = getattr(module, form.router)
    make_rule = ROUTERS.get(fingerprint(type(router)))
    standin: ExpertMatrix = routed.down_proj
    probe = torch.empty(0, dtype=torch.bfloat16)
    if (
        make_rule is None
        or not isinstance(getattr(router, "weight", None), PackedWeight)
        or not _expert_engine.is_one_call(routed, standin, probe)
    ):
        return None
    shared, gate = _shared(module, form), standin.source.gates[type(routed)]
    if shared is None or gate is None:
        return None
    rule = make_rule(router)
    correction = rule.pop("correction", None)
    if correction is not None and correction.dtype is not torch.float32:
        return None
    native = _core.MoeBlock(
        router=router.weight.matrix,
        rule=_core.RouterRule(routed.num_experts, correction=_address(correction), **rule),
        gate=gate,
        **shared,
    )
    block: NativeMoe = in_place_of(module, NativeMoe)
    block.source = standin.source
    block.layer = standin.layer.ordinal
    block.router_name = form.router
    names = filter(None, (form.router, "experts", form.shared, form.shared_gate))
    block.made_of(native, names)
    return block


def _shared(module: Any, form: MoeForward) -> dict[str, Any] | None:
    """Describe the expert that all tokens visit for the core; None where it cannot run it."""
    if form.shared is None:
        return {}
    expert = getattr(module, form.shared)
    if type(expert) is not GatedBlock:
        return None
    found: dict[str, Any] = {"shared": expert.parts}
    if form.shared_gate is not None:
        gate = getattr(module, form.shared_gate)
        if not _is_packed_linear(gate) or gate.bias is not None:
            return None
        found["shared_gate"] = gate.weight.matrix
    return found
