"""Forecast beside actual: what zipmoe says a run will take, and what it takes.

A model of the shape of Qwen1.5-MoE-A2.7B with random weights answers prompts of random tokens, with
answers that are drawn, at several memory budgets. The machine is measured first, in the same round.
At each budget a first, cold request is timed, then warm ones; the routing of one more is recorded
beforehand, so that forecasts rest on another request's routing. Three forecasts of each run are
compared with it: from synthetic routing, from the recorded routing, and, from the second request
on, with the work of a token as observed in the runs before.

    python benchmarks/forecast.py [--layers 8] [--memory 4GB ...] [--requests 3] [--tokens 32]
        [--refresh] [--cache FOLDER] [--out benchmarks/results/forecast.json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from document import publish
from machine import describe_machine
from synthetic_qwen import Shape, cache_folder, forget_pages, prepare

MEASURES = ("ttft_s", "tpot_s", "bytes_per_token")


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


def at_budget(store: Path, memory: str, options: argparse.Namespace, shape: Shape) -> list[Any]:
    """Run some requests at a budget: of each, what was forecast and what it took."""
    import zipmoe  # noqa: PLC0415
    from zipmoe import hardware  # noqa: PLC0415
    from zipmoe.forecast import Forecaster, work_s  # noqa: PLC0415
    from zipmoe.generate import generate  # noqa: PLC0415
    from zipmoe.recording import RoutingRecording  # noqa: PLC0415

    forget_pages(store)
    rows = []
    with zipmoe.load(store, memory=memory, context=options.context) as loaded:
        loaded.tokenizer = Numbers()
        runtime = loaded.runtime
        rates = replace(
            machine_profile(hardware.known_profile(store)), layer_s=LAYER_S, token_s=TOKEN_S
        )
        cache = {"slots": runtime.cache.slots, "policy": runtime.cache.policy}
        estimated = Forecaster(runtime.sizes, rates, **cache)

        def answer(seed: int) -> Any:
            text = prompt(seed, options.prompt, shape.vocabulary)
            return generate(loaded, text, max_tokens=options.tokens, temperature=1.0, seed=seed)

        results = [answer(0)]  # cold
        with RoutingRecording(loaded.model, runtime.source) as recording:
            answer(1)
            answer(2)
        trace = recording.trace()
        results += [answer(seed) for seed in range(3, 3 + options.requests)]
        worked = [one.tpot_s - one.wait_s for one in results]
        for number, result in enumerate(results):
            counts = (result.prompt_tokens, len(result.token_ids))
            known = [s for i, s in enumerate(worked) if i != number]
            factor = statistics.mean(known) / work_s(runtime.sizes, rates)
            learned = Forecaster(runtime.sizes, rates.scaled(factor), **cache)
            forecasts = {
                "synthetic": estimated.run(*counts, is_cold=result.is_cold),
                "synthetic, work observed": learned.run(*counts, is_cold=result.is_cold),
            }
            if not result.is_cold:
                forecasts["recorded"] = estimated.replay(trace, result.prompt_tokens)
                forecasts["recorded, work observed"] = learned.replay(trace, result.prompt_tokens)
            took = {k: getattr(result, k) for k in (*MEASURES, "hit_rate", "wait_s", "is_cold")}
            said = {name: asdict(one) for name, one in forecasts.items()}
            rows.append(
                {
                    "memory": memory,
                    "slots": cache["slots"],
                    "actual": took,
                    "forecasts": said,
                    "work_factor": factor,
                }
            )
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    for name, values in {"actual": row["actual"], **row["forecasts"]}.items():
        print(
            f"{row['memory']:>6} {row['slots']:4} {'cold' if row['actual']['is_cold'] else 'warm'} "
            f"{name:26} ttft {values['ttft_s']:.3f} s  tpot {values['tpot_s'] * 1000:6.1f} ms  "
            f"hits {values['hit_rate']:.3f}  {values['bytes_per_token'] / 1e6:6.1f} MB  "
            + (
                f"wait {values['wait_s'] * 1000:.1f} ms factor {row['work_factor']:.2f}"
                if "wait_s" in values
                else ""
            ),
            file=sys.stderr,
        )


def errors(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median over runs of how far each forecast is from what was measured."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, forecast in row["forecasts"].items():
            for measure in MEASURES[:2]:
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
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as zipmoe's commands set it
    from zipmoe.hardware import profile  # noqa: PLC0415

    shape = Shape(layers=options.layers)
    store = options.store or prepare(shape, options.cache).store
    profile(store, refresh=options.refresh)
    rows = [row for memory in options.memory for row in at_budget(store, memory, options, shape)]
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
