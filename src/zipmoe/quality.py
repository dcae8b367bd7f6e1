"""How good a causal language model is on a calibration: perplexity, and accuracy on tasks.

Deterministic: the same tokens run in the same passes every time, and their losses are summed in
float64 in one order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from zipmoe.calibration import Calibration

__all__ = ["METRICS", "Quality", "loss_of", "measure", "passes", "token_losses"]

METRICS = ("perplexity", "accuracy")
PASS_TOKENS = 2048  # of the windows that run together


@dataclass(frozen=True)
class Quality:
    """Mean negative log-likelihood of a token in nats, and the share of tasks answered right."""

    nll: float
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        """What the loss of a token amounts to: so many tokens equally likely."""
        return math.exp(self.nll)


def loss_of(now: Quality, before: Quality, metric: str) -> float:
    """Say what was lost: of perplexity in proportion (0.02: 2 % more), of accuracy in points."""
    if metric == "perplexity":
        return math.expm1(now.nll - before.nll)
    assert now.accuracy is not None
    assert before.accuracy is not None
    return before.accuracy - now.accuracy


def passes(windows: Tensor, tokens: int = PASS_TOKENS) -> tuple[Tensor, ...]:
    """Part windows [windows, tokens] into those that run together, at most so many tokens."""
    return torch.split(windows, max(1, tokens // windows.shape[1]))


@torch.no_grad()
def token_losses(model: Any, windows: Tensor) -> Tensor:
    """Negative log-likelihood of every token but each window's first: [windows, tokens - 1]."""
    return torch.cat(
        [_losses(model(some, use_cache=False).logits, some) for some in passes(windows)]
    )


def _losses(logits: Tensor, windows: Tensor) -> Tensor:
    """Of one pass, one window after the other, as logits in float32 take much memory."""
    return torch.stack(
        [
            cross_entropy(one[:-1].float(), ids[1:], reduction="none").double()
            for one, ids in zip(logits, windows, strict=True)
        ]
    )


def measure(
    model: Any, calibration: Calibration, *, after_pass: Callable[[], object] | None = None
) -> Quality:
    """Measure a model. `after_pass` is called now and then, so that progress can be shown."""
    total, count = 0.0, 0
    for some in passes(calibration.windows):
        losses = token_losses(model, some)
        total, count = total + float(losses.sum()), count + losses.numel()
        if after_pass:
            after_pass()
    right = 0
    for item in calibration.items:
        right += _is_answered(model, item.prompt, item.answer)
        if after_pass:
            after_pass()
    items = len(calibration.items)
    return Quality(total / count, right / items if items else None)


@torch.no_grad()
def _is_answered(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> bool:
    """Tell whether greedy decoding gives the answer: each of its tokens is the likeliest there."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    likeliest = model(ids, use_cache=False).logits[0, len(prompt) - 1 :].argmax(dim=-1)
    return likeliest.tolist() == list(answer)
