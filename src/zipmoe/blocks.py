"""The two halves of a decoder layer, attention and MoE, in one call of the engine each.

`replace_blocks` finds modules whose code is known (`_forwards`) and whose parts are what the core
can run, and puts native ones in their places: subclasses of the same class, with the same parts
under the same names. What such a module cannot do in one call (gradients, a foreign cache, parts
that somebody has changed or hooked) it does as transformers wrote it, part by part. Attention gives
the same bits either way; an MoE block rounds once where it runs in one call.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zipmoe import _core, _expert_engine, attention, experts
from zipmoe._expert_source import ExpertMatrix, ExpertSource
from zipmoe._forwards import ATTENTIONS, MOE_BLOCKS, ROUTERS, MoeForward, fingerprint
from zipmoe.gated import GatedBlock
from zipmoe.kv import GrowingLayer
from zipmoe.linear import PackedWeight
from zipmoe.norm import RMSNorm

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["NativeAttention", "NativeBlock", "NativeMoe", "replace_blocks"]

# Hooks of transformers that only look at what a module gives.
_LOOKING = "transformers.utils.output_capturing"


class NativeBlock(nn.Module):
    """What the native forms of both halves share: the core's block, and what it was made of."""

    native: Any = None  # None: it has been closed
    _parts: tuple[tuple[dict[str, Any], str, nn.Module, Any], ...] = ()
    _tensors: tuple[tuple[dict[str, Any], str, int], ...] = ()

    def made_of(self, native: Any, names: Iterable[str]) -> None:
        """Remember the core's block, and the parts and tensors that it refers to."""
        owners = [(self, name, getattr(self, name)) for name in names]
        owners += [
            (module, name, child)
            for _, _, part in owners
            for module in part.modules()
            for name, child in module.named_children()
        ]
        self.native = native
        self._parts = tuple(
            (owner._modules, name, part, vars(part).get("weight")) for owner, name, part in owners
        )
        self._tensors = tuple(
            (tensors, name, tensor.data_ptr())
            for _, _, part in owners
            for tensors in (part._parameters, part._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        )

    def close(self) -> None:
        """Give back the weights."""
        self.native = None

    def _is_intact(self) -> bool:
        """Tell whether the parts are still those that the core's block was made of."""
        for modules, name, part, weight in self._parts:
            if modules.get(name) is not part or part.__dict__.get("weight") is not weight:
                return False
            if (part._forward_hooks or part._forward_pre_hooks) and not _only_looked_at(part):
                return False
        for tensors, name, address in self._tensors:
            tensor = tensors.get(name)
            if tensor is None or tensor.data_ptr() != address:
                return False
        return self.native is not None and not self.training


def _only_looked_at(part: nn.Module) -> bool:
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    return all(getattr(hook, "__module__", "") == _LOOKING for hook in hooks)


def _takes(x: torch.Tensor) -> bool:
    """Tell whether the core can compute with these states."""
    return (
        x.dtype is torch.bfloat16
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


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
        layer = _growing_layer(past_key_values, self.layer_idx)
        call = (
            self._run(hidden_states, position_embeddings, attention_mask, layer)
            if layer is not None
            and self._is_intact()
            and _takes(hidden_states)
            and not _asks_more(kwargs)
            and self.config._attn_implementation == attention.IMPLEMENTATION
            else None
        )
        if call is not None:
            return call, None
        return super().forward(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _run(
        self, x: torch.Tensor, embeddings: Any, mask: torch.Tensor | None, layer: GrowingLayer
    ) -> torch.Tensor | None:
        """Run it natively: [batch, queries, hidden] to the same; None where the core cannot."""
        batch, queries, _ = x.shape
        heads, kv_heads, width, outputs = self.heads
        rotations = _rotations(embeddings, batch, width)
        held = layer.get_seq_length()
        is_causal = mask is None and queries > 1
        if rotations is None or (is_causal and held) or not _is_known_mask(mask):
            return None
        x = x.contiguous()
        shape = (batch, kv_heads, queries, width)
        begin = layer.extend(shape, shape, x)
        keys, values = layer.keys, layer.values
        out = torch.empty(batch, queries, outputs, dtype=torch.bfloat16)
        cos, sin, rotated = rotations
        self.native.run(
            self.engine,
            batch,
            queries,
            x.data_ptr(),
            cos,
            sin,
            rotated,
            (keys.data_ptr(), keys.stride()[:3]),
            (values.data_ptr(), values.stride()[:3]),
            begin,
            out.data_ptr(),
            is_causal,
            None
            if mask is None
            else attention.mask_strides(mask, (batch, heads, queries, begin + queries)),
        )
        return out


def _growing_layer(cache: Any, number: int) -> GrowingLayer | None:
    layers = getattr(cache, "layers", ())
    layer = layers[number] if number < len(layers) else None
    if type(layer) is not GrowingLayer or (
        layer.is_initialized and layer.dtype is not torch.bfloat16
    ):
        return None
    return layer


def _asks_more(kwargs: dict[str, Any]) -> bool:
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


def _is_known_mask(mask: torch.Tensor | None) -> bool:
    return mask is None or (mask.dim() == 4 and mask.dtype in attention.MASK_TYPES)


class NativeMoe(NativeBlock):
    """Router, shared expert and routed experts in one call, rounded once."""

    engine: Any
    source: ExpertSource
    layer: int  # ordinal of the experts in the store
    router_name: str
    experts: Any

    def forward(self, hidden_states: torch.Tensor) -> Any:
        """Run it: [..., hidden] to the same."""
        x = hidden_states
        chosen = self.experts.config._experts_implementation
        if not self._is_intact() or not _takes(x) or chosen != experts.IMPLEMENTATION:
            return super().forward(x)
        router: Any = self._modules[self.router_name]
        if router._forward_hooks:
            router(x.view(-1, x.shape[-1]))  # somebody looks at what it gives
        x = x.contiguous()
        out = torch.empty_like(x)
        tokens = x.numel() // x.shape[-1]
        self.native.run(
            self.engine, self.source.cache, self.layer, x.data_ptr(), tokens, out.data_ptr()
        )
        return out


def replace_blocks(model: nn.Module) -> tuple[list[NativeBlock], list[nn.Module]]:
    """Put native blocks in the places of those that can be run in one call.

    Norms and gated blocks must have been replaced before. Returns the new blocks, and the modules
    of the same kinds that run part by part.
    """
    replaced: list[NativeBlock] = []
    left: list[nn.Module] = []
    for name, module in list(model.named_modules()):
        is_attention = type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
        if not is_attention and _experts_of(module) is None:
            continue
        native = _native_attention(module) if is_attention else _native_moe(module)
        if native is None:
            left.append(module)
            continue
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, native)
        replaced.append(native)
    return replaced, left


@functools.cache
def _class_of(kind: Any, native: Any) -> Any:
    return type(f"Native{kind.__name__}", (native, kind), {"__module__": __name__})


def _in_place_of(module: nn.Module, native: Any) -> Any:
    """Make a module of the native class that shares everything with the one it stands for."""
    own: Any = type(module)
    kind = _class_of(own, native)
    block = kind.__new__(kind)
    block.__dict__ = module.__dict__
    return block


def _native_attention(module: Any) -> NativeAttention | None:
    has_norms = ATTENTIONS.get(fingerprint(type(module)), lambda _: None)(module)
    parts: list[Any] = [getattr(module, f"{part}_proj", None) for part in "qkvo"]
    if has_norms is None or not module.is_causal or not all(map(_is_packed_linear, parts)):
        return None
    norms: list[Any] = [module.q_norm, module.k_norm] if has_norms else []
    if not all(type(norm) is RMSNorm for norm in norms):
        return None
    query, key, value, output = ((part.weight.matrix, _address(part.bias)) for part in parts)
    width = module.head_dim
    block: NativeAttention = _in_place_of(module, NativeAttention)
    block.heads = (query[0].rows // width, key[0].rows // width, width, output[0].rows)
    block.engine = parts[0].weight.engine
    query_norm, key_norm = map(_norm, norms) if norms else (None, None)
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


def _norm(norm: RMSNorm) -> Any:
    weight = norm.weight
    assert weight is not None
    return norm.kind, norm.eps, weight.numel(), weight.data_ptr(), weight.dtype is torch.float32


def _experts_of(module: nn.Module) -> Any:
    """Return the experts module whose parent this one is, if it is one."""
    found = module._modules.get("experts")
    down = getattr(found, "down_proj", None)
    return found if isinstance(down, ExpertMatrix) and hasattr(found, "has_gate") else None


def _native_moe(module: Any) -> NativeMoe | None:
    form = MOE_BLOCKS.get(fingerprint(type(module)))
    if form is None:
        return None
    routed = _experts_of(module)
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
    block: NativeMoe = _in_place_of(module, NativeMoe)
    block.engine, block.source = standin.source.engine, standin.source
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
    found = {"shared": expert.matrices, "gate_of_shared": expert.kind}
    if form.shared_gate is not None:
        gate = getattr(module, form.shared_gate)
        if not _is_packed_linear(gate) or gate.bias is not None:
            return None
        found["shared_gate"] = gate.weight.matrix
    return found
