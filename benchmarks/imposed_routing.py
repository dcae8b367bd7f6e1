"""Routers for a checkpoint with random weights, so that it routes as trained models do.

The columns of a router that meet the reserved channels (see `synthetic_qwen`) act as biases: the
first one for every token, the others for the tokens of one topic. Both are fitted to what the
router really gets: topics are random and scaled so that a prompt of one topic goes to as many
distinct experts as a trained model's prompts do; the common one makes the frequencies of experts
over all topics those of the trained model. Statistics come from zipmoe's synthetic routing, or from
recorded counts. Layers are fitted one after the other in one forward pass, so that each one gets
what layers with imposed routing give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lru_torch import Model
from safetensors.torch import save_file
from synthetic_qwen import ROUTERS, Shape, is_router

from zipmoe._synthetic_routing import Routing, synthetic_trace

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

TOKENS = 19  # of a prompt, as in recorded counts
PROMPTS = 8  # of each topic, to fit to
SYNTHETIC_PROMPTS = 200
ROUNDS, LATE_ROUNDS = 200, 100  # of fitting frequencies; the mean of the late ones is taken
HALVINGS = 7  # of the range in which the weight of topics is looked for
LARGEST_WEIGHT = 4.0
MEMORY = 4_000_000_000  # every expert is read once, whatever there is
RARE = 2e-3  # added to frequencies, so that an expert nobody chooses has a logarithm


@dataclass(frozen=True)
class Statistics:
    """What routing is to be like."""

    frequencies: NDArray[np.float64]  # [layers, experts]: chosen by which part of all tokens
    distinct: float  # experts of a layer that TOKENS tokens of a prompt go to
    source: str


def statistics(shape: Shape, counts: Path | None) -> Statistics:
    """Take those of recorded counts [prompts, layers, experts], or of synthetic routing."""
    if counts is None:
        sizes = Routing(shape.experts, shape.layers, shape.top_k, SYNTHETIC_PROMPTS, 1, TOKENS - 1)
        chosen = synthetic_trace(sizes, seed=0).experts
        chosen = chosen.reshape(SYNTHETIC_PROMPTS, TOKENS, shape.layers, shape.top_k)
        found = (chosen[..., None] == np.arange(shape.experts)).sum(axis=(1, 3))
    else:
        found = np.load(counts)["counts"].astype(np.int64)
        layers = np.linspace(0, found.shape[1] - 1, shape.layers).round().astype(int)
        found = found[:, layers]
    total = found.sum(axis=0)
    if total.shape != (shape.layers, shape.experts):
        raise ValueError(f"{counts} has counts of {total.shape[1]} experts, not {shape.experts}")
    frequencies = shape.top_k * total / total.sum(axis=1, keepdims=True)
    name = "synthetic routing" if counts is None else counts.stem
    return Statistics(frequencies, float((found > 0).sum(axis=2).mean()), name)


@dataclass(frozen=True)
class Choices:
    """Logits of prompts of `TOKENS` tokens → what is chosen."""

    top_k: int

    def frequencies(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        best = self._best(logits)
        return np.bincount(best.ravel(), minlength=logits.shape[1]) / len(logits)

    def distinct(self, logits: NDArray[np.float64]) -> float:
        prompts = self._best(logits).reshape(-1, TOKENS * self.top_k)
        return float(np.mean([np.unique(prompt).size for prompt in prompts]))

    def _best(self, logits: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.argpartition(-logits, self.top_k, axis=1)[:, : self.top_k]


class RouterFit:
    """Fits a layer's router to its inputs [prompts * TOKENS, hidden]."""

    def __init__(self, shape: Shape, wanted: Statistics, topics: NDArray[np.int64]) -> None:
        self.shape, self.wanted = shape, wanted
        self.topics = np.repeat(topics, TOKENS)
        self.choices = Choices(shape.top_k)
        self.report: list[dict[str, float]] = []

    def __call__(self, layer: int, x: Tensor, router: Tensor) -> None:
        """Change the router [experts, hidden] in place."""
        wide = x.float()
        plain = (wide @ router.float().T).double().numpy()
        common = wide[:, 0].double().numpy()
        own = wide.double().numpy()[np.arange(len(wide)), 1 + self.topics]
        rng = np.random.default_rng(layer)
        liking = rng.standard_normal((self.shape.topics, self.shape.experts))
        least, most = 0.0, LARGEST_WEIGHT
        for _ in range(HALVINGS):
            weight = (least + most) / 2
            shifted = plain + weight * liking[self.topics] * (own / own.mean())[:, None]
            bias = self._bias(layer, shifted, common / common.mean())
            found = self.choices.distinct(shifted + np.outer(common / common.mean(), bias))
            least, most = (weight, most) if found > self.wanted.distinct else (least, weight)
        router[:, 0] = torch.from_numpy(bias / common.mean())
        router[:, 1 : self.shape.reserved] = torch.from_numpy(weight * liking.T / own.mean())
        imposed = (wide @ router.float().T).double().numpy()
        self._note(layer, plain, imposed, weight)

    def _bias(self, layer: int, logits: Any, common: Any) -> NDArray[np.float64]:
        """Find what added to the experts' logits gives them their frequencies."""
        wanted = np.log(self.wanted.frequencies[layer] + RARE)
        bias, late = np.zeros(self.shape.experts), []
        for number in range(ROUNDS + LATE_ROUNDS):
            got = self.choices.frequencies(logits + np.outer(common, bias))
            bias += (0.5 if number < ROUNDS / 2 else 0.1) * (wanted - np.log(got + RARE))
            bias -= bias.mean()
            if number >= ROUNDS:
                late.append(bias.copy())
        return np.mean(late, axis=0)

    def _note(self, layer: int, plain: Any, imposed: Any, weight: float) -> None:
        wanted = self.wanted.frequencies[layer]
        got = self.choices.frequencies(imposed)
        even = self.shape.top_k / self.shape.experts
        self.report.append(
            {
                "distinct": round(self.choices.distinct(imposed), 2),
                "distinct_before": round(self.choices.distinct(plain), 2),
                "most_over_even": round(float(got.max() / even), 3),
                "most_over_even_wanted": round(float(wanted.max() / even), 3),
                "frequencies_off": round(float(np.abs(got - wanted).sum() / self.shape.top_k), 4),
                "topic_weight": round(weight, 3),
            }
        )


def impose(folder: Path, shape: Shape, counts: Path | None = None) -> dict[str, Any]:
    """Replace the routers of a checkpoint; tells what was reached, in routing.json beside it."""
    wanted = statistics(shape, counts)
    topics = np.repeat(np.arange(shape.topics), PROMPTS)
    rng = np.random.default_rng(0)
    ids = rng.integers(shape.vocabulary // shape.topics, size=(len(topics), TOKENS))
    ids = ids * shape.topics + topics[:, None]
    model = Model(folder, MEMORY)
    routers = {name: weights for name, weights in model.dense.items() if is_router(name)}
    fit = RouterFit(shape, wanted, topics)
    model.before_router = lambda layer, x: fit(
        layer, x, routers[f"model.layers.{layer}.mlp.gate.weight"]
    )
    model.forward(torch.from_numpy(ids))
    save_file(routers, folder / f"{ROUTERS}.safetensors", metadata={"format": "pt"})
    return {
        "source": wanted.source,
        "tokens_of_a_prompt": TOKENS,
        "distinct_wanted": round(wanted.distinct, 2),
        "layers": fit.report,
    }
