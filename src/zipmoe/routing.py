"""Recorded routing decisions: a trace and its file, popularity by rank, replay step by step.

A *trace* holds which experts every token chose in every layer, forward pass by forward pass, and
whose tokens they were. Experts are numbers here: nothing knows the model, the store or torch.

*Popularity* is a curve over ranks, not over experts: how likely a step activates the expert that
stands first, second, ... in some order. What a cache can know decides the order: the past
(`by_recency`), other prompts (`by_held_out_prompts`), or, as a limit that no cache reaches, the
same prompt's future (`in_hindsight`). docs/planning.md says what follows from each.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zipmoe._errors import TraceError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Popularity",
    "Recorder",
    "Step",
    "Trace",
    "by_held_out_prompts",
    "by_recency",
    "in_hindsight",
    "load_trace",
    "recency_ranks",
    "save_trace",
]

FORMAT = "zipmoe-routing"
VERSION = 1
_ARRAYS = ("experts", "step", "request", "tokens")


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass: the choices of its tokens, request after request."""

    number: int
    requests: NDArray[np.int64]  # [runs]: whose tokens
    tokens: NDArray[np.int64]  # [runs]: how many
    is_decode: bool  # every request has one token here, and not its first
    experts: NDArray[np.int64]  # [tokens, layers, k]

    def activated(self, layer: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the distinct experts of a layer in ascending order, and the tokens of each."""
        return np.unique(self.experts[:, layer], return_counts=True)


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing decisions. A *run* is the tokens that one request has in one forward pass.

    Raises
    ------
    TraceError
        The arrays do not describe a possible trace.
    """

    num_experts: int  # in a layer
    experts: NDArray[np.int64]  # [tokens, layers, k], run after run
    step: NDArray[np.int64]  # [runs], ascending: the forward pass
    request: NDArray[np.int64]  # [runs], once in a step
    tokens: NDArray[np.int64]  # [runs]

    def __post_init__(self) -> None:
        for is_so, why in _defects(self):
            if is_so:
                raise TraceError(f"not a routing trace: {why}")

    @property
    def num_layers(self) -> int:
        """Layers with routed experts."""
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        """Experts that a token chooses in a layer."""
        return self.experts.shape[2]

    @property
    def requests(self) -> NDArray[np.int64]:
        """Ids of the requests, ascending."""
        return np.unique(self.request)

    @property
    def is_decode(self) -> NDArray[np.bool_]:
        """Tell of each run whether it is decode: one token, and not its request's first run."""
        first = np.zeros(len(self.request), bool)
        first[np.unique(self.request, return_index=True)[1]] = True
        return (self.tokens == 1) & ~first

    def steps(self) -> Iterator[Step]:
        """Replay forward pass after forward pass."""
        decode, end_of_run = self.is_decode, np.cumsum(self.tokens)
        starts = np.flatnonzero(np.diff(self.step, prepend=-1))
        for first, last in zip(starts, [*starts[1:], len(self.step)], strict=True):
            begin = end_of_run[first] - self.tokens[first]
            yield Step(
                int(self.step[first]),
                self.request[first:last],
                self.tokens[first:last],
                bool(decode[first:last].all()),
                self.experts[begin : end_of_run[last - 1]],
            )

    def of(self, requests: ArrayLike) -> Trace:
        """Keep these requests only. Steps keep their numbers."""
        kept = np.isin(self.request, requests)
        rows = np.repeat(kept, self.tokens)
        return Trace(
            self.num_experts,
            self.experts[rows],
            self.step[kept],
            self.request[kept],
            self.tokens[kept],
        )

    def split(self, share: float, seed: int) -> tuple[Trace, Trace]:
        """Part the requests at random, so that one part can be judged by the other.

        `share` of them, rounded up, come first.
        """
        shuffled = np.random.default_rng(seed).permutation(self.requests)
        size = int(np.ceil(share * len(shuffled)))
        return self.of(shuffled[:size]), self.of(shuffled[size:])

    def counts(self) -> NDArray[np.int64]:
        """Count the decode choices of each expert: [requests, layers, experts]."""
        requests, number = np.unique(self.request, return_inverse=True)
        rows = np.repeat(self.is_decode, self.tokens)
        whose = np.repeat(number, self.tokens)[rows]
        total = np.zeros((len(requests), self.num_layers, self.num_experts), np.int64)
        layers = np.arange(self.num_layers)[None, :, None]
        np.add.at(total, (whose[:, None, None], layers, self.experts[rows]), 1)
        return total


def _defects(trace: Trace) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is so, what would be wrong); each relies on those before it."""
    experts, runs = trace.experts, len(trace.step)
    empty = experts.ndim != 3 or 0 in experts.shape or not runs
    yield empty, "it has no tokens, layers or choices"
    unlike = any(array.shape != (runs,) for array in (trace.request, trace.tokens))
    yield unlike, "its runs are not described alike"
    total = int(trace.tokens.sum())
    wrong = trace.tokens.min() < 1 or total != len(experts)
    yield wrong, f"its runs have {total} tokens and {len(experts)} are recorded"
    foreign = experts.min() < 0 or experts.max() >= trace.num_experts
    yield foreign, f"experts are not within 0 and {trace.num_experts - 1}"
    chosen = np.sort(experts, axis=2)
    yield bool((chosen[:, :, 1:] == chosen[:, :, :-1]).any()), "a token chose an expert twice"
    unordered = trace.step[0] < 0 or bool((np.diff(trace.step) < 0).any())
    yield unordered, "its steps are not in order"
    different = np.unique(np.stack([trace.step, trace.request]), axis=1).shape[1]
    yield different != runs, "a request comes twice in a step"


class Recorder:
    """Collects a trace while a model runs: `step`, then `layer` for each of its layers."""

    def __init__(self, num_experts: int, num_layers: int) -> None:
        self.num_experts, self.num_layers = num_experts, num_layers
        self._runs: list[tuple[int, int, int]] = []
        self._choices: list[list[NDArray[np.int64] | None]] = []

    def step(self, runs: Sequence[tuple[int, int]]) -> None:
        """Begin a forward pass over the tokens of these (request, tokens), in this order."""
        number = len(self._choices)
        self._runs += [(number, request, tokens) for request, tokens in runs]
        self._choices.append([None] * self.num_layers)

    def layer(self, layer: int, experts: ArrayLike) -> None:
        """Take a layer's choices [tokens, k] of this forward pass."""
        self._choices[-1][layer] = np.array(experts, np.int64)

    def trace(self) -> Trace:
        """Give what was recorded.

        Raises
        ------
        TraceError
            A step lacks a layer, or its layers do not have the same tokens.
        """
        steps = []
        for number, layers in enumerate(self._choices):
            whole = [choices for choices in layers if choices is not None]
            if len(whole) != self.num_layers or len({choices.shape for choices in whole}) != 1:
                raise TraceError(f"step {number} was not recorded in all of its layers")
            steps.append(np.stack(whole, axis=1))
        if not steps:
            raise TraceError("no step was recorded")
        step, request, tokens = np.array(self._runs, np.int64).T
        return Trace(self.num_experts, np.concatenate(steps), step, request, tokens)


def save_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace, whole or not at all."""
    target = Path(path)
    part = target.with_name(target.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(
            file,
            format=np.array(FORMAT),
            version=np.array(VERSION),
            num_experts=np.array(trace.num_experts),
            experts=trace.experts.astype(np.uint16 if trace.num_experts <= 1 << 16 else np.uint32),
            step=trace.step,
            request=trace.request,
            tokens=trace.tokens,
        )
    part.replace(target)


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace.

    Raises
    ------
    TraceError
        There is no such file, or it is no trace of a version known here.
    """
    try:
        file = np.load(path, allow_pickle=False)
        found = dict(file) if isinstance(file, np.lib.npyio.NpzFile) else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path} cannot be read as a routing trace: {error}") from error
    try:
        return _from_arrays(found)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error


def _from_arrays(found: dict[str, NDArray[Any]]) -> Trace:
    if missing := {"format", "version", "num_experts", *_ARRAYS} - found.keys():
        raise TraceError(f"not a routing trace: it lacks {', '.join(sorted(missing))}")
    if str(found["format"]) != FORMAT or found["version"] != VERSION:
        raise TraceError(
            f"format {found['format']} version {found['version']} is unknown to this zipmoe"
        )
    whole = (*_ARRAYS, "num_experts")
    if wrong := [name for name in whole if found[name].dtype.kind not in "iu"]:
        raise TraceError(f"not a routing trace: {', '.join(wrong)} are not whole numbers")
    return Trace(int(found["num_experts"]), *(found[name].astype(np.int64) for name in _ARRAYS))


@dataclass(frozen=True, eq=False)
class Popularity:
    """How likely a step activates the expert of each rank, the same curve for every layer."""

    inclusion: NDArray[np.float64]  # [experts]
    source: str  # where it comes from, in a few words

    @property
    def activated(self) -> float:
        """Distinct experts that a step activates in a layer, on average."""
        return float(self.inclusion.sum())

    def top_share(self, share: float) -> float:
        """Give the part of all activations that goes to this share of the ranks."""
        most = round(share * len(self.inclusion))
        return float(self.inclusion[:most].sum() / self.inclusion.sum())


def in_hindsight(counts: NDArray[Any], top_k: int) -> Popularity:
    """Rank each prompt's experts by that prompt's own counts, as the paper does.

    `counts` are [prompts, layers, experts]. A few tokens look skewed in this order even where
    routing is uniform: an upper limit, not a forecast.
    """
    ranked = -np.sort(-np.asarray(counts, np.float64), axis=2)
    total = ranked.sum(axis=2, keepdims=True)
    shares = np.divide(ranked, total, out=np.zeros_like(ranked), where=total > 0)
    return Popularity(_inclusion(shares.sum(axis=(0, 1)), top_k), "ranked in hindsight")


def by_held_out_prompts(known: NDArray[Any], unknown: NDArray[Any], top_k: int) -> Popularity:
    """Rank experts by the counts of known prompts, and count those of unknown ones.

    What a cache can expect that pins the most popular experts.
    """
    order = np.argsort(-known.sum(axis=0), axis=1, kind="stable")
    met = np.take_along_axis(unknown.sum(axis=0), order, axis=1)
    return Popularity(_inclusion(met.sum(axis=0), top_k), "popularity on other prompts")


def _inclusion(weights: NDArray[Any], top_k: int) -> NDArray[np.float64]:
    """Scale to inclusion probabilities that sum to k; what exceeds 1 goes to the other ranks."""
    certain = np.zeros(len(weights), bool)
    while True:
        rest = np.where(certain, 0.0, weights)
        scaled = np.where(certain, 1.0, rest * ((top_k - certain.sum()) / max(rest.sum(), 1e-300)))
        if not (scaled > 1).any():
            return scaled
        certain |= scaled > 1


def by_recency(trace: Trace) -> Popularity:
    """Rank experts before each decode step by how recently they were used, and count what comes.

    Rank r is then hit by a cache of r slots a layer that drops the least recently used: the sum
    of the first r is its expected number of hits.
    """
    activated = recency_ranks(trace)
    return Popularity(activated.mean(axis=(0, 1)), "recency in a recorded trace")


def recency_ranks(trace: Trace) -> NDArray[np.bool_]:
    """[decode steps, layers, ranks]: whether the expert that stood at this rank was activated.

    The expert used last stands first. A prompt's experts count as used in the order of their
    tokens, the most used last.
    """
    layers = np.arange(trace.num_layers)[:, None]
    used = np.zeros((trace.num_layers, trace.num_experts))
    used -= 1 + np.arange(trace.num_experts)  # before any use: in the order of their numbers
    activated = []
    for step in trace.steps():
        total = np.zeros(used.shape, np.int64)
        np.add.at(total, (layers[None], step.experts), 1)
        if step.is_decode:
            order = np.argsort(-used, axis=1, kind="stable")
            activated.append(np.take_along_axis(total, order, axis=1) > 0)
        recency = step.number + total / (step.tokens.sum() + 1)
        used = np.where(total > 0, recency, used)
    if not activated:
        raise TraceError("the trace has no decode step to learn popularity from")
    return np.stack(activated)
