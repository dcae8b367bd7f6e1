"""Telling the next layer's experts beforehand: EdgeMoE's dictionary of paths, and our lookahead.

    python benchmarks/prediction.py [--traces DIR] [--speed] [--rounds 5] [--out FILE]

Recall: the part of a token's experts that are among the k foretold. Of the demo's own routing, the
dictionary learns the sample text and is judged on `held_out.txt`; the next layer's router, asked
with the states that this layer has before its experts, is judged on the same tokens. Synthetic
routing and count traces (see `policy.py`) have layers that know nothing of each other, so they tell
only how soon a dictionary is empty, and what it is worth where there is nothing to foretell.

`--speed`: the demo store with memory for half of the checkpoint, in turns without reading ahead,
with what the dictionary foretells read ahead, and with our lookahead; tokens a second. Needs an
idle machine.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from document import publish
from machine import describe_machine
from policy import PROMPTS, TOKENS, drawn
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import Worker

import zipmoe
from zipmoe._synthetic_routing import Routing, synthetic_trace
from zipmoe.calibration import calibration, read_text
from zipmoe.demo import build_checkpoint, cache_folder
from zipmoe.generate import generate
from zipmoe.prediction import PathDictionary, judge
from zipmoe.routing import Trace

if TYPE_CHECKING:
    from collections.abc import Iterator

HELD_OUT = Path(__file__).with_name("held_out.txt")
SYNTHETIC = {
    "8 experts, 1 chosen": (8, 12, 1, 12, 64, 128),
    "16 experts, 2 chosen": (16, 30, 2, 12, 64, 128),
    "60 experts, 4 chosen": (60, 24, 4, 12, 64, 128),
    "128 experts, 8 chosen": (128, 12, 8, 6, 64, 128),
}
QUESTION = "Write a story about a lighthouse keeper and a storm."


class Asked:
    """What each layer's router chooses, and what the layer before would have foretold."""

    def __init__(self, model: Any) -> None:
        self.chosen: list[torch.Tensor] = []
        self.foretold: list[torch.Tensor] = []
        self._layers = model.model.layers
        for number, layer in enumerate(self._layers):
            layer.post_attention_layernorm.register_forward_pre_hook(self._hook(number))

    def _hook(self, number: int) -> Any:
        def ask(_: Any, args: tuple[torch.Tensor]) -> None:
            states = args[0].flatten(0, 1)
            self.chosen.append(self._route(number, states))
            if number + 1 < len(self._layers):
                self.foretold.append(self._route(number + 1, states))

        return ask

    def _route(self, number: int, states: torch.Tensor) -> torch.Tensor:
        layer = self._layers[number]
        normed = type(layer.post_attention_layernorm).forward(
            layer.post_attention_layernorm, states
        )
        logits = normed.float() @ layer.mlp.gate.weight.float().t()
        return logits.topk(layer.mlp.gate.top_k, dim=-1).indices


@torch.no_grad()
def routed(model: Any, asked: Asked, windows: torch.Tensor) -> tuple[Trace, float]:
    """A trace of these windows, each a request of single tokens, and the lookahead's recall."""
    chosen, recall = [], []
    for window in windows:
        asked.chosen.clear()
        asked.foretold.clear()
        model(window[None], use_cache=False)
        chosen.append(torch.stack(asked.chosen, dim=1).numpy())
        for actual, foretold in zip(asked.chosen[2:], asked.foretold[1:], strict=True):
            hits = actual[:, :, None] == foretold[:, None]
            recall.append(hits.any(dim=2).float()[1:].mean().item())
    tokens = np.concatenate(chosen)
    count = windows.shape[1]
    trace = Trace(
        model.config.num_local_experts,
        tokens,
        step=np.arange(len(tokens)),
        request=np.repeat(np.arange(len(windows)), count),
        tokens=np.ones(len(tokens), np.int64),
    )
    return trace, float(np.mean(recall))


def demo_routing() -> tuple[Trace, Trace, float]:
    folder = build_checkpoint(cache_folder()).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    asked = Asked(model)
    known, _ = routed(model, asked, calibration(tokenizer, read_text(None)).windows)
    unknown, recall = routed(model, asked, calibration(tokenizer, read_text(HELD_OUT)).windows)
    return known, unknown, recall


@contextmanager
def reading_ahead(loaded: Any, dictionary: PathDictionary) -> Iterator[None]:
    """Read what a dictionary foretells: after each layer, for the one after it."""
    runtime, layers = loaded.runtime, loaded.model.model.layers
    engine = runtime.source.engine
    paths = np.zeros((len(layers), dictionary.top_k), np.int64)

    def foretell(number: int) -> Any:
        def after(*_: Any) -> None:
            for layer, k, experts in engine.take_routing():
                if len(experts) == k:  # of a single token
                    paths[layer] = experts
            if 1 <= number < len(layers) - 1:
                likely, _ = dictionary.likely(number + 1, paths)
                runtime.cache.look_ahead(number + 1, likely.tolist())

        return after

    with ExitStack() as undo:
        engine.record_routing(is_on=True)
        undo.callback(engine.record_routing, is_on=False)
        for number, layer in enumerate(layers):
            undo.callback(layer.register_forward_hook(foretell(number)).remove)
        yield


class Rates:
    """Tokens a second of the demo store in half of the checkpoint's bytes.

    In a process of its own (`Worker`): what others have measured takes memory too.
    """

    def __init__(self, known: Trace) -> None:
        self._dictionary = PathDictionary(known)

    def measure(self, rounds: int) -> dict[str, Any]:
        store = cache_folder() / "store"
        checkpoint = sum(path.stat().st_size for path in (cache_folder() / "checkpoint").iterdir())
        found: dict[str, list[float]] = {"nothing": [], "dictionary": [], "lookahead": []}
        for _ in range(rounds):
            for name, values in found.items():
                options = {"memory": checkpoint // 2, "lookahead": name == "lookahead"}
                with zipmoe.load(store, **options) as loaded, ExitStack() as inside:
                    if name == "dictionary":
                        inside.enter_context(reading_ahead(loaded, self._dictionary))
                    values.append(1 / generate(loaded, QUESTION, max_tokens=64).tpot_s)
        return {name: round(statistics.median(values), 3) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name, sizes in SYNTHETIC.items():
        found[f"synthetic, {name}"] = asdict(
            judge(*synthetic_trace(Routing(*sizes), 5).split(0.5, 0))
        )
    for path in sorted(options.traces.glob("*.npz")) if options.traces else []:
        counts = np.load(path)["counts"].astype(np.int64)
        k = int(np.median(counts.sum(axis=2)) // TOKENS)
        whole = (counts.sum(axis=2) == TOKENS * k).all(axis=1) & (counts <= TOKENS).all((1, 2))
        found[path.stem] = asdict(judge(*drawn(counts[whole][:PROMPTS], k, 0, 0).split(0.5, 0)))
    known, unknown, recall = demo_routing()
    found["demo"] = asdict(judge(known, unknown)) | {"lookahead": recall}
    result = {"benchmark": "prediction", "machine": describe_machine(), "routing": found}
    if options.speed:
        with Worker("rates", "prediction:Rates", {}, known=known) as worker:
            result["tokens_s"] = worker.call("measure", options.rounds)
    publish(result, options.out)


if __name__ == "__main__":
    main()
