"""All layers of a model in one call: when, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from invariance import prompts
from transformers import DynamicCache, StaticCache
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

import zipmoe
from zipmoe.blocks import NativeAttention
from zipmoe.decoder import NativeDecoder

KNOWN = ["qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"]  # the first layer of the last is dense


class Calls:
    """Whether attentions were asked one by one; for all layers at once, the first one is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        step = NativeAttention.step

        def counted(half: NativeAttention, *args: Any) -> Any:
            self.count += half.layer_idx != 0
            return step(half, *args)

        monkeypatch.setattr(NativeAttention, "step", counted)

    def of(self, model: Any, **kwargs: Any) -> tuple[bool, Any]:
        before, result = self.count, model(**kwargs)
        return self.count > before, result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def read(model: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
    """All but the last token; the cache."""
    return model(ids[:, :-1], use_cache=True, **kwargs).past_key_values


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_one_more_token_is_one_call_and_the_bits_are_those_of_the_layers(
    name: str, family_store: Any, calls: Calls
) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        model = loaded.model
        decoder = model.model
        assert isinstance(decoder, NativeDecoder)
        for batch in (1, 3):
            ids = prompts(model, batch)
            caches = [read(model, ids) for _ in range(3)]
            given: dict[str, Any] = {"input_ids": ids[:, -1:]}
            more = {
                "attention_mask": torch.ones_like(ids),
                "position_ids": torch.full((batch, 1), ids.shape[1] - 1),
                "use_cache": True,
            }
            native, decoder.native = decoder.native, None
            by_layers = calls.of(model, **given, past_key_values=caches[0])
            decoder.native = native
            plain = calls.of(model, **given, past_key_values=caches[1])
            told = calls.of(model, **given, **more, past_key_values=caches[2])
            assert by_layers[0]
            for one_by_one, out in (plain, told):
                assert not one_by_one
                assert torch.equal(out.logits, by_layers[1].logits)
                assert out.past_key_values.get_seq_length() == ids.shape[1]
            for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
                assert torch.equal(ours.keys, theirs.keys)
                assert torch.equal(ours.values, theirs.values)


@torch.no_grad()
def test_whatever_else_is_asked_for_goes_layer_by_layer(family_store: Any, calls: Calls) -> None:
    with zipmoe.load(family_store("qwen2_moe"), memory="64GB") as loaded:
        model, config = loaded.model, loaded.model.config
        ids, layers = prompts(model, 2), config.num_hidden_layers
        token = ids[:, -1:]
        expected = model(token, past_key_values=read(model, ids)).logits

        def step(*, by_layers: bool = True, **kwargs: Any) -> Any:
            given = {"input_ids": token, "past_key_values": read(model, ids)}
            one_by_one, out = calls.of(model, **given | kwargs)
            assert one_by_one == by_layers
            return out

        assert torch.equal(step(by_layers=False).logits, expected)
        mask = torch.ones_like(ids)
        assert torch.equal(step(attention_mask=mask, by_layers=False).logits, expected)
        mask[1, :3] = 0
        assert not torch.equal(step(attention_mask=mask).logits[1], expected[1])
        embedded = model.get_input_embeddings()(token)
        out = step(input_ids=None, inputs_embeds=embedded)
        assert torch.equal(out.logits, expected)
        assert torch.equal(step(return_dict=False, by_layers=False)[0], expected)  # of the head
        assert torch.equal(step(use_cache=False).logits, expected)
        cache = StaticCache(config=config, max_cache_len=64)
        read(model, ids, past_key_values=cache)
        assert torch.equal(step(past_key_values=cache).logits, expected)
        cache = DynamicCache()  # knows no configuration
        read(model, ids, past_key_values=cache)
        assert torch.equal(step(past_key_values=cache, by_layers=False).logits, expected)

        seen: list[torch.Tensor] = []
        layer = model.model.layers[0]
        handle = layer.register_forward_hook(lambda _, __, out: seen.append(out))
        assert torch.equal(step().logits, expected)
        assert len(seen) == 2  # the prompt and the token
        handle.remove()
        layer.mlp.forward = lambda x: 0 * x
        assert not torch.equal(step().logits, expected)
        del layer.mlp.forward
        assert torch.equal(step(by_layers=False).logits, expected)

        out = step(output_hidden_states=True)
        assert torch.equal(out.logits, expected)
        assert len(out.hidden_states) == layers + 1
        assert out.hidden_states[-1].shape == (2, 1, config.hidden_size)


def test_a_model_keeps_its_name_and_others_are_not_taken(family_store: Any) -> None:
    with zipmoe.load(family_store("qwen3_moe"), memory="64GB") as loaded:
        kind = type(loaded.model.model)
        assert kind.__name__ == "Qwen3MoeModel"
        assert kind is not Qwen3MoeModel
        assert str(kind) == str(Qwen3MoeModel)
    for name in ("deepseek_v3", "mixtral"):  # latent attention; a window
        with zipmoe.load(family_store(name), memory="64GB") as loaded:
            assert not any(isinstance(module, NativeDecoder) for module in loaded.model.modules())
