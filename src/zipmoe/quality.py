"""How good a causal language model is on a calibration: perplexity, and accuracy on tasks.

Deterministic: the same tokens run in the same passes every time, and their losses are summed in
float64 in one order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from zipmoe.calibration import Calibration

__all__ = ["Quality", "QualityLoss", "loss_of", "measure", "passes", "token_losses"]

_CONFIDENT = 1.645  # standard errors: 95 % of a normal distribution lie below
PASS_TOKENS = 2048  # of the windows that run together


@dataclass(frozen=True)
class Quality:
    """Mean negative log-likelihood of a token in nats, window by window, and tasks answered."""

    windows: tuple[float, ...]
    answered: tuple[bool, ...] = ()

    @property
    def nll(self) -> float:
        """Of all windows, which have the same number of tokens."""
        return fmean(self.windows)

    @property
    def perplexity(self) -> float:
        """What the loss of a token amounts to: so many tokens equally likely."""
        return math.exp(self.nll)

    @property
    def accuracy(self) -> float | None:
        """Share of tasks answered right; None where there are none."""
        return fmean(self.answered) if self.answered else None


@dataclass(frozen=True)
class QualityLoss:
    """What was lost: of perplexity in proportion (0.02: 2 % more), of accuracy in points.

    bound: what it is at most on texts of this kind, with a confidence of 95 %, as far as windows
    (or tasks) that differ from each other tell.
    """

    mean: float
    bound: float


def loss_of(now: Quality, before: Quality, metric: str) -> QualityLoss:
    """Compare two measurements on the same calibration."""
    if metric == "perplexity":
        mean, bound = _bounded(now.windows, before.windows)
        return QualityLoss(math.expm1(mean), math.expm1(bound))
    return QualityLoss(*_bounded(before.answered, now.answered))


def _bounded(more: Sequence[float], less: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, and the upper end of its one-sided confidence interval."""
    differences = [one - other for one, other in zip(more, less, strict=True)]
    mean = fmean(differences)
    if len(differences) < 2:
        return mean, mean
    return mean, mean + _CONFIDENT * stdev(differences) / math.sqrt(len(differences))


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
    windows: list[float] = []
    for some in passes(calibration.windows):
        windows += token_losses(model, some).mean(dim=1).tolist()
        if after_pass:
            after_pass()
    answered = []
    for item in calibration.items:
        answered.append(_is_answered(model, item.prompt, item.answer))
        if after_pass:
            after_pass()
    return Quality(tuple(windows), tuple(answered))


@torch.no_grad()
def _is_answered(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> bool:
    """Tell whether greedy decoding gives the answer: each of its tokens is the likeliest there."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    likeliest = model(ids, use_cache=False).logits[0, len(prompt) - 1 :].argmax(dim=-1)
    return likeliest.tolist() == list(answer)
