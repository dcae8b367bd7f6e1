"""Whether a token's logits depend on anything but its own past: batch, padding, cuts, cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = 23
CUTS = (7, 8, PROMPT)  # pieces of the prompt, one of a single token


def prompts(model: Any, count: int) -> torch.Tensor:
    """Token ids [count, PROMPT]."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, (count, PROMPT), generator=generator)


@torch.no_grad()
def alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one prompt by itself."""
    return model(ids[None]).logits[0]


@torch.no_grad()
def in_batches(model: Any, ids: torch.Tensor, expected: torch.Tensor) -> bool:
    """Among others of the same length."""
    others = prompts(model, 17)
    for count in (2, 3, 5, 8, 17):
        batch = others[:count].clone()
        batch[count // 2] = ids
        if not torch.equal(model(batch).logits[count // 2], expected):
            return False
    return True


@torch.no_grad()
def in_pieces(model: Any, ids: torch.Tensor, expected: torch.Tensor) -> bool:
    """Cut into pieces, each after the cache of those before."""
    past, pieces, start = None, [], 0
    for end in CUTS:
        out = model(ids[None, start:end], past_key_values=past, use_cache=True)
        past, start = out.past_key_values, end
        pieces.append(out.logits[0])
    return torch.equal(torch.cat(pieces), expected)


@torch.no_grad()
def behind_padding(model: Any, ids: torch.Tensor, expected: torch.Tensor) -> bool:
    """Left-padded, beside longer prompts."""
    width = PROMPT + 7
    batch, mask = prompts(model, 3).repeat(1, 2)[:, :width], torch.ones(3, width, dtype=torch.long)
    batch[1, -PROMPT:], mask[1, :-PROMPT] = ids, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    return torch.equal(logits[1, -PROMPT:], expected)


CHECKS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], bool]] = {
    "batch": in_batches,
    "cuts": in_pieces,
    "padding": behind_padding,
}


def dependencies(model: Any) -> list[str]:
    """Name what a token's logits depend on besides its own past; empty where the contract holds."""
    ids = prompts(model, 1)[0]
    expected = alone(model, ids)
    assert expected.isfinite().all()
    return [name for name, check in CHECKS.items() if not check(model, ids, expected)]
