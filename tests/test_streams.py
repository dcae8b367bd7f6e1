"""Streams: each one's logits are those it has alone, whoever comes, goes or waits beside it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import zipmoe
from zipmoe.streams import Streams

RAGGED = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe", "granitemoe"]
IN_TURNS = ["deepseek_v3", "gpt_oss", "qwen3_next"]
MANY = 17


def texts(loaded: zipmoe.Loaded, count: int, seed: int = 0) -> list[list[int]]:
    """Token ids of several lengths."""
    rng = random.Random(seed)
    most = loaded.model.config.get_text_config(decoder=True).vocab_size
    return [[rng.randrange(3, most) for _ in range(rng.randrange(9, 60))] for _ in range(count)]


@torch.no_grad()
def alone(loaded: zipmoe.Loaded, ids: list[int], begin: int) -> torch.Tensor:
    """Logits [tokens, vocabulary] from token begin - 1 on, of the model itself, token by token."""
    out = loaded.model(torch.tensor([ids[:begin]]), use_cache=True)
    rows = [out.logits[0, -1]]
    for token in ids[begin:]:
        out = loaded.model(torch.tensor([[token]]), past_key_values=out.past_key_values)
        rows.append(out.logits[0, -1])
    return torch.stack(rows).float()


@pytest.mark.parametrize("name", RAGGED + IN_TURNS)
def test_a_stream_has_the_logits_that_it_has_alone(name: str, family_store: Any) -> None:
    with zipmoe.load(family_store(name), memory="64GB") as loaded:
        streams = Streams(loaded)
        for count in (1, 2, 5, MANY):
            ids = texts(loaded, count, seed=count)
            expected = [alone(loaded, text, len(text) - 4) for text in ids]
            opened = [streams.open() for _ in ids]
            for stream, text, logits in zip(opened, ids, expected, strict=True):
                assert torch.equal(streams.prefill(stream, text[:-4]), logits[0])
            for step in (1, 2, 3, 4):
                rows = streams.decode(opened, [text[step - 5] for text in ids])
                assert torch.equal(rows, torch.stack([logits[step] for logits in expected]))
            assert [stream.tokens for stream in opened] == ids
            for stream in opened:
                streams.close(stream)
