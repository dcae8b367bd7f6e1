"""Which experts the next layer will want, told from a dictionary of recorded paths.

EdgeMoE (arXiv 2308.14352): *key*, the experts that a token chose in two layers that follow each
other; *value*, how likely each expert of the layer after them is then chosen. Where a pair of
choices was never recorded, the dictionary falls back on the nearer layer's choice alone, and where
that was not either, on how popular the experts are. Knows traces only, like `routing`.

A key is a set of k of n experts, twice: of 4 of 60, 2.4e11 pairs, of which a trace of some thousand
tokens holds some thousand. So coverage is part of what `judge` says.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zipmoe._errors import TraceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zipmoe.routing import Trace

    Choices = NDArray[np.int64]  # [layers, k], of one token
    Key = tuple[int, bytes]  # layer, and the choices before it

__all__ = ["KEYS", "PathDictionary", "Verdict", "judge"]

KEYS = ("two layers", "one layer", "popularity")
"""What a prediction can rest on, the first that is known."""


@dataclass(frozen=True)
class Verdict:
    """How well a dictionary foretold a trace.

    recall: part of a token's experts that were among the k foretold, in layers that have two before
    them. coverage: part of the predictions that rests on each of `KEYS`. recall_by_key: recall of
    those. popular, repeated: what the k most popular experts would have recalled, and those that
    the token before chose in the layer.
    """

    recall: float
    coverage: dict[str, float]
    recall_by_key: dict[str, float]
    popular: float
    repeated: float
    entries: int  # of two layers
    tokens: int


class PathDictionary:
    """Built from the tokens of a trace, each by itself."""

    def __init__(self, trace: Trace) -> None:
        if trace.num_layers < 3:
            raise TraceError("paths of two layers need a third one: the trace has fewer")
        self.top_k, self._experts = trace.top_k, trace.num_experts
        self._pairs: dict[Key, Counter[int]] = defaultdict(Counter)
        self._singles: dict[Key, Counter[int]] = defaultdict(Counter)
        self._popular = np.zeros((trace.num_layers, trace.num_experts))
        chosen = np.sort(trace.experts, axis=2)
        for token in chosen:
            for layer in range(2, trace.num_layers):
                self._pairs[layer, _key(token, layer, 2)].update(token[layer].tolist())
                self._singles[layer, _key(token, layer, 1)].update(token[layer].tolist())
        for layer in range(trace.num_layers):
            counts = np.bincount(chosen[:, layer].reshape(-1), minlength=trace.num_experts)
            self._popular[layer] = counts / len(chosen)

    @property
    def entries(self) -> int:
        """Keys of two layers that it holds."""
        return len(self._pairs)

    def likely(self, layer: int, token: Choices) -> tuple[NDArray[np.int64], str]:
        """Name the k experts that `layer` most likely wants, the likeliest first.

        `token`: [layers, k], of which the two before `layer` are looked at. Equals are told apart
        by popularity. Also says on which of `KEYS` it rests.
        """
        near = np.sort(token, axis=1)
        for key, table, depth in ((KEYS[0], self._pairs, 2), (KEYS[1], self._singles, 1)):
            found = table.get((layer, _key(near, layer, depth)))
            if found is not None:
                counts = np.zeros(self._experts)
                counts[list(found)] = list(found.values())
                return self._most(counts + self._popular[layer] / 2), key
        return self._most(self._popular[layer]), KEYS[2]

    def popular(self, layer: int) -> NDArray[np.int64]:
        """Name the k most popular experts of a layer."""
        return self._most(self._popular[layer])

    def _most(self, scores: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.argsort(-scores, kind="stable")[: self.top_k]


def _key(token: Choices, layer: int, depth: int) -> bytes:
    return token[layer - depth : layer].astype(np.uint16).tobytes()


def judge(known: Trace, unknown: Trace) -> Verdict:
    """Build a dictionary from one trace and foretell the decoded tokens of another.

    Raises
    ------
    TraceError
        There are fewer than three layers, or no decoded tokens.
    """
    dictionary = PathDictionary(known)
    is_decode = np.repeat(unknown.is_decode, unknown.tokens)
    request = np.repeat(unknown.request, unknown.tokens)
    last: dict[int, Choices] = {}
    recalled: dict[str, list[float]] = {key: [] for key in KEYS}
    popular, repeated = [], []
    for token, decode, whose in zip(unknown.experts, is_decode, request, strict=True):
        if decode:
            for layer in range(2, unknown.num_layers):
                foretold, key = dictionary.likely(layer, token)
                recalled[key].append(np.isin(token[layer], foretold).mean())
                popular.append(np.isin(token[layer], dictionary.popular(layer)).mean())
                repeated.append(np.isin(token[layer], last[int(whose)][layer]).mean())
        last[int(whose)] = token
    if not popular:
        raise TraceError("the trace has no decode step")
    every = [value for values in recalled.values() for value in values]
    return Verdict(
        recall=float(np.mean(every)),
        coverage={key: len(values) / len(every) for key, values in recalled.items()},
        recall_by_key={key: float(np.mean(v)) for key, v in recalled.items() if v},
        popular=float(np.mean(popular)),
        repeated=float(np.mean(repeated)),
        entries=dictionary.entries,
        tokens=int(is_decode.sum()),
    )
