"""Attention and MoE blocks in one call of the engine: which, when, and what they compute."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from families import families
from invariance import alone, dependencies, prompts
from torch import nn
from transformers import StaticCache

import zipmoe
from zipmoe import _core
from zipmoe._forwards import ATTENTIONS, DECODERS, LAYERS, MOE_BLOCKS, ROUTERS, fingerprint
from zipmoe._native_block import NativeBlock
from zipmoe.blocks import NativeAttention, NativeMoe
from zipmoe.decoder import NativeDecoder
from zipmoe.kv import GrowingLayer
from zipmoe.layers import NativeLayer

ALL = {family.name: family for family in families()}
# Biases, norms of heads, norms of all heads at once, part of a head turned; shared experts with and
# without a gate, groups, softmax before and after the choice.
BOTH = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe", "granitemoe"]
MOE_ONLY = ["deepseek_v2", "deepseek_v3"]


def blocks(model: nn.Module, kind: type[Any]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def part_by_part(model: nn.Module, kind: type[Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits where blocks of a kind do what transformers wrote."""
    kept = [
        (block, block.native)
        for block in blocks(model, NativeBlock)
        if isinstance(block, kind | NativeLayer | NativeDecoder)
    ]
    for block, _ in kept:
        block.native = None
    logits = alone(model, ids)
    for block, native in kept:
        block.native = native
    return logits


@pytest.mark.parametrize("name", [*BOTH, *MOE_ONLY])
def test_a_layer_is_one_call_or_two_and_its_bits_depend_on_nothing_else(
    name: str, family_store: Any
) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        model, engine = loaded.model, loaded.runtime.source.engine
        layers = model.config.get_text_config().num_hidden_layers
        attentions, moes = blocks(model, NativeAttention), blocks(model, NativeMoe)
        assert moes
        assert len(attentions) == (layers if name in BOTH else 0)
        with torch.no_grad():
            ids = prompts(model, 1)
            past = model(ids, use_cache=True).past_key_values
            before = engine.counters()["calls"]
            model(ids[:, :1], past_key_values=past)
        grows = all(type(layer) is GrowingLayer for layer in past.layers)
        dense = layers - len(moes)
        assert dense == (name in {"glm4_moe", *MOE_ONLY})
        whole = grows and len(attentions) == layers and (not dense or blocks(model, NativeLayer))
        assert whole or name not in {"qwen2_moe", "qwen3_moe", "glm4_moe"}
        if whole:
            calls = layers if blocks(model, NativeLayer) else 2 * layers
            assert engine.counters()["calls"] - before == calls + 2  # embedding and head
            assert loaded.runtime.engaged()["in_parts"] == "nothing"
        assert dependencies(model) == []


@pytest.mark.parametrize("name", BOTH)
def test_a_layer_in_one_call_gives_the_bits_of_its_halves(name: str, family_store: Any) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        ids = prompts(loaded.model, 1)[0]
        expected = alone(loaded.model, ids)
        assert bool(blocks(loaded.model, NativeLayer)) == (name != "granitemoe")
        assert torch.equal(part_by_part(loaded.model, NativeLayer, ids), expected)


def test_only_a_layer_with_experts_can_be_asked_beforehand(family_store: Any) -> None:
    with zipmoe.load(family_store("glm4_moe"), memory="64GB") as loaded:
        dense, sparse = blocks(loaded.model, NativeLayer)[:2]
        assert dense.number is None
        dense.native.followed_by(sparse.native, sparse.number)
        with pytest.raises(ValueError, match="router"):
            sparse.native.followed_by(dense.native, 0)


@pytest.mark.parametrize("name", BOTH)
def test_attention_in_one_call_gives_the_bits_of_its_parts(name: str, family_store: Any) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded, torch.no_grad():
        ids = prompts(loaded.model, 1)[0]
        expected = part_by_part(loaded.model, NativeAttention, ids)
        past, pieces = None, []
        for piece in ids.split([9, 1, 1, 8, 4]):  # the first makes the cache
            out = loaded.model(piece[None], past_key_values=past, use_cache=True)
            past = out.past_key_values
            pieces.append(out.logits[0])
        assert torch.equal(torch.cat(pieces), expected)


def exact_moe(block: Any, x: torch.Tensor) -> torch.Tensor:
    """The block in float64 from decoded weights: what it would be without any rounding."""
    parts, experts = block._modules, block.experts
    router = parts[block.router_name]
    rule = ROUTERS[fingerprint(type(router))](router)
    weight = router.weight.to_dense().double()
    logits = x.double() @ weight.T
    ids, weights = chosen_by(rule, experts.num_experts, logits.float())
    source, layer = experts.down_proj.source, experts.down_proj.layer

    def gated(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, h: torch.Tensor) -> Any:
        inner = experts.act_fn(h @ gate.double().T) * (h @ up.double().T)
        return inner @ down.double().T

    total = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        h = x[token].double()
        for expert, share in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            matrices = [
                source.single(layer, expert, role, own=True) for role in ("gate", "up", "down")
            ]
            total[token] += share * gated(*matrices, h)
        for name in ("shared_expert", "shared_experts"):
            if name in parts:
                shared = [w.to_dense() for w in parts[name]._weights]
                by = parts.get("shared_expert_gate")
                share = 1.0 if by is None else torch.sigmoid(by.weight.to_dense().double() @ h)
                total[token] += share * gated(*shared, h)
    return total


def chosen_by(rule: dict[str, Any], experts: int, logits: torch.Tensor) -> Any:
    rule = dict(rule)
    correction = rule.pop("correction", None)
    core = _core.RouterRule(
        experts, correction=0 if correction is None else correction.data_ptr(), **rule
    )
    logits = logits.contiguous()
    ids = torch.empty(len(logits), rule["k"], dtype=torch.long)
    weights = torch.empty(len(logits), rule["k"])
    core.choose(logits.data_ptr(), len(logits), ids.data_ptr(), weights.data_ptr())
    return ids, weights


@pytest.mark.parametrize("name", [*BOTH, *MOE_ONLY])
def test_an_moe_block_is_as_exact_as_one_rounding_allows(name: str, family_store: Any) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded, torch.no_grad():
        block = blocks(loaded.model, NativeMoe)[0]
        hidden = loaded.model.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(1, 19, hidden, generator=generator).bfloat16()
        exact = exact_moe(block, x[0])
        # One rounding of the sum, and one of each value between two products.
        assert (block(x)[0].double() - exact).abs().max() <= exact.abs().max() * 2**-7


@pytest.mark.parametrize("name", [*BOTH, *MOE_ONLY])
def test_a_router_chooses_as_the_family_s_own(name: str, family_store: Any) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded, torch.no_grad():
        block = blocks(loaded.model, NativeMoe)[0]
        router, experts = block._modules[block.router_name], block.experts.num_experts
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(2000, router.weight.shape[1], generator=generator).bfloat16()
        logits, weights, ids = router(x)
        ours, by = chosen_by(ROUTERS[fingerprint(type(router))](router), experts, logits.float())
        ranked = logits.float().sort(dim=1).values
        distinct = (ranked.diff(dim=1) > 0).all(dim=1)  # BF16 logits are often equal
        assert distinct.float().mean() > 0.9
        dense = torch.zeros(2000, experts)
        stock, native = dense.scatter(1, ids, weights.float()), dense.scatter(1, ours, by)
        assert torch.equal((stock != 0)[distinct], (native != 0)[distinct])
        assert (stock - native)[distinct].abs().max() <= stock.max() * 2**-8


def test_groups_drop_experts_and_of_equals_the_lower_number_is_taken() -> None:
    logits = torch.tensor([[3.0, -9.0, 1.0, 1.0, 2.0, 2.0, 0.0, 0.0]])
    rule: dict[str, Any] = {"k": 2, "score": _core.RouterScore.softmax}
    assert chosen_by(rule, 8, logits)[0].tolist() == [[0, 4]]
    groups = rule | {"num_groups": 4, "kept_groups": 1}
    assert chosen_by(groups, 8, logits)[0].tolist() == [[0, 1]]
    two = groups | {"group_score": _core.GroupScore.two_best, "score": _core.RouterScore.sigmoid}
    assert chosen_by(two, 8, logits)[0].tolist() == [[4, 5]]
    correction = torch.zeros(8)
    correction[6] = 9.0
    ids, weights = chosen_by(rule | {"correction": correction, "normalises": True}, 8, logits)
    assert ids.tolist() == [[6, 0]]
    assert weights[0, 0] < weights[0, 1]  # the correction chooses, and does not weigh
    assert chosen_by(rule, 8, torch.full((1, 8), torch.nan))[0].unique().numel() >= 1
    for wrong in ({"k": 9}, {"num_groups": 3}, {"num_groups": 4, "kept_groups": 5}):
        with pytest.raises(ValueError, match="more experts"):
            chosen_by(rule | wrong, 8, logits)


class Doubled(nn.Module):
    """What an adapter does: another module around a part."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base(x)


def test_what_somebody_has_changed_is_seen(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        model = loaded.model
        ids = prompts(model, 1)[0]
        expected = alone(model, ids)
        layer = model.model.layers[0]

        original = layer.self_attn.v_proj
        layer.self_attn.v_proj = Doubled(original)
        assert not torch.equal(alone(model, ids), expected)
        layer.self_attn.v_proj = original
        assert torch.equal(alone(model, ids), expected)

        original = layer.mlp.shared_expert.up_proj
        layer.mlp.shared_expert.up_proj = Doubled(original)
        assert not torch.equal(alone(model, ids), expected)
        layer.mlp.shared_expert.up_proj = original
        assert torch.equal(alone(model, ids), expected)

        up = layer.mlp.shared_expert.up_proj
        packed = up.weight
        up.weight = nn.Parameter(2 * packed.to_dense(), requires_grad=False)
        assert not torch.equal(alone(model, ids), expected)
        del up.weight
        up.weight = packed
        assert torch.equal(alone(model, ids), expected)

        handle = layer.mlp.gate.register_forward_hook(
            lambda _, __, out: (out[0], 0 * out[1], out[2])
        )
        assert not torch.equal(alone(model, ids), expected)
        handle.remove()

        bias = layer.self_attn.q_proj.bias
        layer.self_attn.q_proj.bias = nn.Parameter(bias + 1, requires_grad=False)
        assert not torch.equal(alone(model, ids), expected)
        layer.self_attn.q_proj.bias = bias
        assert torch.equal(alone(model, ids), expected)


def test_outputs_that_somebody_asks_for_are_given_and_change_no_bit(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded, torch.no_grad():
        ids = prompts(loaded.model, 1)
        expected = loaded.model(ids).logits
        out = loaded.model(ids, output_router_logits=True, output_hidden_states=True)
        assert torch.equal(out.logits, expected)
        layers = loaded.model.config.num_hidden_layers
        assert len(out.router_logits) == layers
        assert len(out.hidden_states) == layers + 1
        assert torch.equal(loaded.model(ids).logits, expected)


def test_other_caches_and_gradients_go_part_by_part(family_store: Any) -> None:
    with zipmoe.load(family_store("mixtral"), memory="64GB") as loaded:
        model, ids = loaded.model, prompts(loaded.model, 1)
        expected = alone(model, ids[0])
        with torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=64)
            assert torch.equal(model(ids, past_key_values=cache).logits[0], expected)
        logits = model(ids).logits  # norms have weights that require gradients
        assert (logits[0] - expected).abs().max() < 0.2
    for block in blocks(model, NativeBlock):
        assert block.native is None  # nothing keeps the weights
    with pytest.raises((ValueError, RuntimeError)):
        alone(model, ids[0])


def test_every_known_code_is_that_of_a_family_and_another_code_is_unknown() -> None:
    known: set[str] = set()
    for name in ALL:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass)]
        known |= {fingerprint(kind) for kind in kinds if issubclass(kind, nn.Module)}
    assert {*ATTENTIONS, *DECODERS, *LAYERS, *MOE_BLOCKS, *ROUTERS} <= known

    class Same(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            """Say something else."""
            return helper(hidden_states)  # a comment

    class Other(nn.Module):
        def forward(self, hidden_states):
            return helper(hidden_states) + 0

    class Alike(nn.Module):
        def forward(self, hidden_states):
            return helper(hidden_states)

    assert fingerprint(Same) == fingerprint(Alike) != fingerprint(Other)
    assert fingerprint(object) == ""


def helper(x: torch.Tensor) -> torch.Tensor:
    return x


def test_parts_that_do_not_fit_are_refused(family_store: Any) -> None:
    with zipmoe.load(family_store("mixtral"), memory="64GB") as loaded:
        attention = loaded.model.model.layers[0].self_attn
        q, k, v, o = (
            (getattr(attention, f"{part}_proj").weight.matrix, 0) for part in ("q", "k", "v", "o")
        )
        good: dict[str, Any] = {"query": q, "key": k, "value": v, "output": o, "scaling": 1.0}
        heads, kv_heads, width, _ = attention.heads
        _core.AttentionBlock(**good, heads=heads, kv_heads=kv_heads, width=width)
        for wrong in ({"heads": heads + 1}, {"width": width * 2}, {"kv_heads": 0}):
            sizes = {"heads": heads, "kv_heads": kv_heads, "width": width} | wrong
            with pytest.raises(ValueError, match="do not fit"):
                _core.AttentionBlock(**good, **sizes)
        rule = _core.RouterRule(5, 2, score=_core.RouterScore.softmax)
        with pytest.raises(ValueError, match="router of other experts"):
            _core.MoeBlock(router=q[0], rule=rule, gate=_core.Gate.silu)
