"""Products straight from packed weights against plain BF16, torch, and what memory delivers.

int8, int4 and int2 are lossy: their weights are others, and so are their results.

For each shape, as many matrices as fill the working set lie in memory in every codec and as plain
BF16. In every round all arms alternate; each multiplies all its matrices once. Ratios are taken
within a round; median, least and most over the rounds are reported. GB/s are of BF16, whatever the
bytes that were read. The plain arm is our own kernel on `raw`; how near it comes to what memory
delivers (`read`) says whether it is a fair baseline. With `avx2` torch runs in its own process,
limited to AVX2 by ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA.

    python benchmarks/kernels.py [--shapes 1408x2048,...] [--columns 1,4,...] [--threads 1,2]
        [--isas avx512bf16,avx2] [--busy] [--rounds 7] [--megabytes 600] [--quick] [--out FILE]

--busy: another process streams memory on the second core meanwhile, for one thread; its rate is
reported. The last line of stdout is the whole result as one JSON document, which --out keeps too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from machine import describe_machine
from workers import Worker, spread

from zipmoe import _core
from zipmoe.packed import collapse, stretch

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = "1408x2048,2048x1408,768x2048,5632x2048,14336x4096,151936x2048"
PACKED = ("rank223", "rank3", "rank4", "int8", "int4", "int2")


def weights(rows: int, columns: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32) * 0.02
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Arm:
    """All matrices of one shape in one form."""

    def __init__(self, codec: str, sources: list[np.ndarray], count: int) -> None:
        self.codec = codec
        encoded = [_core.encode(codec, source, threads=2) for source in sources]
        lengths = [[-(-extent.size // 4096) * 4096 for extent in one.extents] for one in encoded]
        memory, self.block = stretch(sum(sum(lengths[i % len(encoded)]) for i in range(count)))
        self.matrices = []
        at = 0
        for i in range(count):
            one, views = encoded[i % len(encoded)], []
            for extent, length in zip(one.extents, lengths[i % len(encoded)], strict=True):
                view = self.block[at : at + extent.size]
                view[:] = extent
                views.append(view)
                at += length
            rows, columns = sources[0].shape
            self.matrices.append(
                _core.PackedMatrix(
                    one.codec,
                    tuple(views),
                    rows=rows,
                    columns=columns,
                    row_group=one.row_group,
                    k_tile=one.k_tile,
                )
            )
        collapse(memory)
        self.bits = 8 * self.block.nbytes / count / sources[0].size
        self.stored_as = sorted({matrix.codec for matrix in self.matrices})


def multiply_all(engine: Any, arm: Arm, x: np.ndarray, y: np.ndarray) -> Callable[[], None]:
    rows, columns = y.shape[1], x.shape[1]

    def run() -> None:
        for matrix in arm.matrices:
            engine.multiply(matrix, x.ctypes.data, columns, len(x), 0, y.ctypes.data, rows)

    return run


def torch_all(
    block: np.ndarray, shape: tuple[int, int], x: np.ndarray, threads: int
) -> Callable[[], None]:
    size = shape[0] * shape[1] * 2
    tensors = [
        torch.from_numpy(block[at : at + size]).view(torch.bfloat16).view(shape)
        for at in range(0, block.size - size + 1, size)
    ]
    values = torch.from_numpy(x).view(torch.bfloat16)

    def run() -> None:
        torch.set_num_threads(threads)
        for tensor in tensors:
            torch.nn.functional.linear(values, tensor)

    return run


class LimitedTorch:
    """torch and its weights, in a process whose environment limits its instruction set."""

    def __init__(self, shape: tuple[int, int], count: int) -> None:
        if torch.backends.cpu.get_cpu_capability() != "AVX2":
            raise SystemExit(f"torch uses {torch.backends.cpu.get_cpu_capability()}, not AVX2")
        self.shape = shape
        _, self.block = stretch(shape[0] * shape[1] * 2 * count)
        self.block.view(np.uint16).reshape(count, *shape)[:] = weights(*shape, 0)

    def multiply(self, columns: int, threads: int) -> None:
        torch_all(self.block, self.shape, weights(columns, self.shape[1], 99), threads)()


AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def stream(started: Any, stop: Any, rate: Any) -> None:
    """Read memory without a pause, and say how fast."""
    _, block = stretch(512 << 20)
    block[:] = 1
    engine = _core.Engine(threads=1)
    engine.read(block)
    done, begin = 0, None
    started.set()
    begin = time.perf_counter()
    while not stop.is_set():
        engine.read(block)
        done += block.nbytes
    rate.value = done / (time.perf_counter() - begin) / 1e9


class Rounds:
    """Times of alternating arms, and their ratios within each round."""

    def __init__(self, arms: dict[str, Callable[[], None]], nbytes: int, rounds: int) -> None:
        self.rates: dict[str, list[float]] = {name: [] for name in arms}
        for run in arms.values():
            run()
        for number in range(rounds):
            order = list(arms)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                begin = time.perf_counter()
                arms[name]()
                self.rates[name].append(nbytes / (time.perf_counter() - begin) / 1e9)

    def summary(self, name: str) -> dict[str, Any]:
        return {"gb_s": spread(self.rates[name])} | {
            f"to_{other}": spread(self.ratios(name, other))
            for other in ("plain", "torch")
            if other in self.rates and other != name
        }

    def ratios(self, name: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.rates[name], self.rates[other], strict=True)]


def measure(
    shape: tuple[int, int], arms: dict[str, Arm], options: argparse.Namespace, case: dict[str, Any]
) -> dict[str, Any]:
    """Run one case: columns, threads, instruction set."""
    if case["isa"] != "avx2":
        return measure_beside(None, shape, arms, options, case)
    count = len(arms["raw"].matrices)
    with Worker("torch", "kernels:LimitedTorch", AVX2_ONLY, shape=shape, count=count) as limited:
        return measure_beside(limited, shape, arms, options, case)


def measure_beside(
    limited: Worker | None,
    shape: tuple[int, int],
    arms: dict[str, Arm],
    options: argparse.Namespace,
    case: dict[str, Any],
) -> dict[str, Any]:
    rows, columns = shape
    engine = _core.Engine(threads=case["threads"], isa=case["isa"])
    x, y = weights(case["columns"], columns, 99), np.empty((case["columns"], rows), np.uint16)
    plain = arms["raw"]
    runs = {"plain": multiply_all(engine, plain, x, y)}
    runs |= {codec: multiply_all(engine, arms[codec], x, y) for codec in PACKED}
    if case["isa"] in ("", "avx512bf16"):
        runs["torch"] = torch_all(plain.block, shape, x, case["threads"])
    if limited is not None:
        runs["torch"] = lambda: limited.call("multiply", case["columns"], case["threads"])
    if case["columns"] == 1:
        runs["read"] = lambda: engine.read(plain.block)
    measured = Rounds(runs, rows * columns * 2 * len(plain.matrices), options.rounds)
    results = {name: measured.summary(name) for name in runs}
    if "read" in runs:
        results["plain"]["to_read"] = spread(measured.ratios("plain", "read"))
    return {"shape": list(shape), **case, "isa": engine.isa, "arms": results}


def print_case(result: dict[str, Any]) -> None:
    head = f"{result['shape'][0]}x{result['shape'][1]}"
    busy = f", beside {result['busy_gb_s']:.1f} GB/s of reading" if "busy_gb_s" in result else ""
    case = f"{result['columns']} columns, {result['threads']} threads, {result['isa']}"
    print(f"-- {head}, {case}{busy}")
    for name, arm in result["arms"].items():
        ratios = "".join(
            f"  {key} {value['median']:.2f}x ({value['min']:.2f} to {value['max']:.2f})"
            for key, value in arm.items()
            if key != "gb_s"
        )
        print(f"   {name:8} {arm['gb_s']['median']:6.1f} GB/s{ratios}", flush=True)


def cases(shape: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """List what is measured of a shape; no prompt is multiplied with a vocabulary."""
    is_head = shape[0] * shape[1] > 100_000_000
    listed = [
        {"columns": columns, "threads": threads, "isa": isa}
        for isa in options.isas
        for columns in options.columns
        for threads in options.threads
        if (isa in ("", "avx512bf16") or columns <= 16) and not (is_head and columns > 16)
    ]
    if options.busy:
        listed.append({"columns": 1, "threads": 1, "isa": options.isas[0], "busy": True})
    return listed


def beside_a_reader(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run while another process reads memory on a core of its own."""
    context = multiprocessing.get_context("spawn")
    started, stop, rate = context.Event(), context.Event(), context.Value("d", 0.0)
    reader = context.Process(target=stream, args=(started, stop, rate))
    reader.start()
    started.wait()
    try:
        result = run()
    finally:
        stop.set()
        reader.join()
    return {**result, "busy_gb_s": round(rate.value, 2)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--columns", default="1,4,8,16,64,512")
    parser.add_argument("--threads", default="1,2")
    isas = _core.available_isas()
    parser.add_argument(
        "--isas", default=",".join(isas[:1] + [isa for isa in isas[1:] if isa == "avx2"])
    )
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--quick", action="store_true", help="a smoke test: no figure to quote")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.megabytes = 2, 60
    options.shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    options.columns = [int(columns) for columns in options.columns.split(",")]
    options.threads = [int(threads) for threads in options.threads.split(",")]
    options.isas = options.isas.split(",")
    return options


def main() -> None:
    options = parse()
    results = []
    bits: dict[str, dict[str, float]] = {}
    for shape in options.shapes:
        count = max(1, options.megabytes * 1_000_000 // (shape[0] * shape[1] * 2))
        sources = [weights(*shape, seed) for seed in range(min(count, 4))]
        arms = {codec: Arm(codec, sources, count) for codec in (*PACKED, "raw")}
        bits[f"{shape[0]}x{shape[1]}"] = {name: round(arm.bits, 3) for name, arm in arms.items()}
        for case in cases(shape, options):
            busy = case.pop("busy", False)

            def run(case: dict[str, Any] = case, shape: Any = shape, arms: Any = arms) -> Any:
                return measure(shape, arms, options, case)

            results.append(beside_a_reader(run) if busy else run())
            print_case(results[-1])
    document = {
        "benchmark": "kernels",
        "machine": describe_machine(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "rounds": options.rounds,
        "megabytes": options.megabytes,
        "quick": options.quick,
        "bits": bits,
        "results": results,
    }
    text = json.dumps(document)
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
