"""Logits → the next token of one answer: the likeliest, or drawn from a seed of its own.

A function of the logits, the answer so far and the seed, and of nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from zipmoe.sampling import draw

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from zipmoe.serve.constrain import Grammar

__all__ = ["Choice", "Chooser", "Sampling", "likeliest"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in the terms of OpenAI's API. top_k below 1: no such limit."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A chosen token. logprob, top (token, its logprob): of the model's own logits, if asked."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def likeliest(logits: Tensor) -> int:
    """Give the first of the greatest. A tenth of the time that torch takes."""
    return int(logits.numpy().argmax())


class Chooser:
    """Chooses the tokens of one answer, in order.

    index: of the answer among those of its request; each draws its own numbers. shown: how many
    alternatives are to be told of with each token; None: no log-probabilities.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        index: int = 0,
        shown: int | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self._sampling, self._shown, self._grammar = sampling, shown, grammar
        key = np.array([sampling.seed % 2**64, index], np.uint64)
        self._draws = np.random.Generator(np.random.Philox(key=key))

    @property
    def is_complete(self) -> bool:
        """Tell whether the grammar allows nothing more."""
        return self._grammar is not None and self._grammar.is_complete

    def choose(self, logits: Tensor, answer: Sequence[int]) -> Choice:
        """Choose by `logits` [vocabulary]; `answer` is what was chosen before."""
        own = logits.float()
        adjusted = self._adjusted(own, answer)
        token = self._drawn(adjusted) if self._sampling.temperature > 0 else likeliest(adjusted)
        if self._grammar is not None:
            self._grammar.take(token)
        if self._shown is None:
            return Choice(token)
        logprobs = own.double().log_softmax(0)
        top = logprobs.topk(self._shown)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Choice(token, float(logprobs[token]), tuple(pairs))

    def _adjusted(self, logits: Tensor, answer: Sequence[int]) -> Tensor:
        sampling = self._sampling
        biased = bool(sampling.logit_bias)
        punished = bool(answer) and bool(sampling.frequency_penalty or sampling.presence_penalty)
        if not biased and not punished and self._grammar is None:
            return logits
        logits = logits.clone()
        if punished:
            used, times = (torch.from_numpy(a) for a in np.unique(answer, return_counts=True))
            logits[used] -= sampling.presence_penalty + sampling.frequency_penalty * times.float()
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        if self._grammar is not None:
            logits[~self._grammar.allowed(len(logits))] = -torch.inf
        return logits

    def _drawn(self, logits: Tensor) -> int:
        sampling = self._sampling
        return draw(
            logits.numpy(),
            self._draws.random(),
            temperature=sampling.temperature,
            top_k=max(0, sampling.top_k),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
