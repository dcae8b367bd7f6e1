"""Forecast beside actual: what zipmoe says a run will take, and what it takes.

A model of the shape of Qwen1.5-MoE-A2.7B with random weights answers prompts of random tokens, with
answers that are drawn, at several memory budgets. The machine is measured first, in the same round.
At each budget a first, cold request is timed, then warm ones; the routing of two more is recorded
beforehand, so that forecasts rest on other requests' routing. Forecasts of each run are compared
with it: from synthetic routing and from the recorded one; with the work of a token as estimated
from the machine's rates alone, and as the other runs have shown it.

    python benchmarks/forecast.py [--layers 8] [--memory 4GB ...] [--requests 3] [--tokens 32]
        [--refresh] [--cache FOLDER] [--out benchmarks/results/forecast.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from document import publish
from machine import describe_machine
from synthetic_qwen import Shape, cache_folder, forget_pages, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

MEASURES = ("ttft_s", "tpot_s")
TAKEN = (*MEASURES, "hit_rate", "bytes_per_token", "wait_s", "is_cold")


class Numbers:
    """A tokenizer whose words are the numbers of tokens."""

    chat_template = None
    pad_token_id = 0

    def __call__(self, text: str, *, return_tensors: str) -> dict[str, Any]:
        import torch  # noqa: PLC0415

        assert return_tensors == "pt"
        ids = torch.tensor([[int(word) for word in text.split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))


def prompt(seed: int, tokens: int, vocabulary: int) -> str:
    import numpy as np  # noqa: PLC0415

    return " ".join(map(str, np.random.default_rng(seed).integers(vocabulary, size=tokens)))


@dataclass
class Arm:
    """A budget: its runs, the routing of other runs, and what forecasts need to know."""

    memory: str
    sizes: Any
    cache: dict[str, Any]  # slots and policy
    results: list[Any]
    trace: Any


def at_budget(store: Path, memory: str, options: argparse.Namespace, shape: Shape) -> Arm:
    """Run a cold request and some warm ones, and record the routing of two others."""
    import zipmoe  # noqa: PLC0415
    from zipmoe.generate import generate  # noqa: PLC0415
    from zipmoe.recording import RoutingRecording  # noqa: PLC0415

    forget_pages(store)
    with zipmoe.load(store, memory=memory, context=options.context) as loaded:
        loaded.tokenizer = Numbers()
        runtime = loaded.runtime

        def answer(seed: int) -> Any:
            text = prompt(seed, options.prompt, shape.vocabulary)
            return generate(loaded, text, max_tokens=options.tokens, temperature=1.0, seed=seed)

        results = [answer(0)]
        with RoutingRecording(loaded.model, runtime.source) as recording:
            answer(1)
            answer(2)
        results += [answer(seed) for seed in range(3, 3 + options.requests)]
        cache = {"slots": runtime.cache.slots, "policy": runtime.cache.policy}
        return Arm(memory, runtime.sizes, cache, results, recording.trace())


def compare(arms: list[Arm], store: Path) -> Iterator[dict[str, Any]]:
    """Yield of each run what it took and what is forecast, by what the forecast may know."""
    from zipmoe.forecast import Forecaster, work_s  # noqa: PLC0415
    from zipmoe.hardware import known_profile  # noqa: PLC0415
    from zipmoe.rates import machine_profile  # noqa: PLC0415

    rates = machine_profile(known_profile(store))
    everything = [result for arm in arms for result in arm.results]
    for arm, result in ((one, result) for one in arms for result in one.results):
        others = [one.tpot_s - one.wait_s for one in everything if one is not result]
        factor = statistics.mean(others) / work_s(arm.sizes, rates)
        forecasts = {}
        for work, known in {"estimated": rates, "observed": rates.scaled(factor)}.items():
            forecaster = Forecaster(arm.sizes, known, **arm.cache)
            counts = result.prompt_tokens, len(result.token_ids)
            run = forecaster.run(*counts, is_cold=result.is_cold)
            forecasts[f"synthetic routing, work {work}"] = asdict(run)
            if not result.is_cold:
                run = forecaster.replay(arm.trace, result.prompt_tokens)
                forecasts[f"recorded routing, work {work}"] = asdict(run)
        took = {name: getattr(result, name) for name in TAKEN}
        yield {
            "memory": arm.memory,
            "slots": arm.cache["slots"],
            "work_over_estimate": factor,
            "actual": took,
            "forecasts": forecasts,
        }


def show(row: dict[str, Any]) -> None:
    for name, one in {"actual": row["actual"], **row["forecasts"]}.items():
        print(
            f"{row['memory']:>6} {'cold' if one['is_cold'] else 'warm'} {name:34} "
            f"first {one['ttft_s']:6.3f} s, token {one['tpot_s'] * 1000:6.1f} ms, "
            f"hits {one['hit_rate']:.3f}, read {one['bytes_per_token'] / 1e6:6.1f} MB",
            file=sys.stderr,
        )


def errors(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median over runs of how far each forecast is from what was measured."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, forecast in row["forecasts"].items():
            for measure in MEASURES:
                error = abs(forecast[measure] / row["actual"][measure] - 1)
                found.setdefault(name, {}).setdefault(measure, []).append(error)
    return {
        name: {measure: round(statistics.median(all_), 3) for measure, all_ in of.items()}
        for name, of in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--memory", nargs="+", default=["4GB", "5GB", "6.5GB", "9GB"])
    parser.add_argument("--requests", type=int, default=2, help="warm ones at each budget")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--refresh", action="store_true", help="measure the machine again")
    parser.add_argument("--store", type=Path, help="instead of one that is made")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from zipmoe.hardware import profile  # noqa: PLC0415

    shape = Shape(layers=options.layers)
    store = options.store or prepare(shape, options.cache).store
    profile(store, refresh=options.refresh)
    arms = [at_budget(store, memory, options, shape) for memory in options.memory]
    rows = list(compare(arms, store))
    for row in rows:
        show(row)
    publish(
        {
            "benchmark": "forecast",
            "machine": describe_machine(),
            "model": asdict(shape),
            "tokens": {"prompt": options.prompt, "answer": options.tokens},
            "median_error": errors(rows),
            "runs": rows,
        },
        options.out,
    )


if __name__ == "__main__":
    main()
