"""Where weights do not fit: zipmoe, llama.cpp, accelerate's offload and a plain LRU, in cgroups.

A model of the shape of Qwen1.5-MoE-A2.7B with 8 of its layers, random weights and the routing of
trained models (`imposed_routing`) runs in a memory cgroup of 30, 50, 60 and 75 % of the
checkpoint's size. Every run is a process of its own that starts with a cold page cache, which is
charged to its cgroup; the drive's read-ahead is 128 KiB. Engines are fed the same tokens of one
topic, whatever they would have answered: a prompt of 64 tokens, 16 more that do not count and 32
that are timed; or a prompt of 512. In every round (its tokens are new) engines take turns, the
first of them alternates; ratios are taken within a round. accelerate, which keeps no state from
token to token, decodes 2 and 4. A run is repeated while others took more than a tenth of a core
from it.

    python benchmarks/offload.py [--rounds 3] [--arms zipmoe,llama.cpp] [--attempts 2] [--resume]
        [--counts FILE] [--cache FOLDER] [--out benchmarks/results/offload.json]

Needs root, 40 GB of disk (48 while accelerate runs), 12 GB of memory, and half an hour of an idle
machine for 3 rounds once the models are there; --out is written after every run, and --resume goes
on where it ends. --counts: recorded counts to take routing statistics from, in an .npz.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from document import publish
from limits import MemoryGroup, drop_page_cache, ordinary_read_ahead
from machine import describe_machine
from offload_summary import summarise
from synthetic_qwen import TOPICS, Files, Shape, cache_folder
from workers import MOST_FOREIGN, Worker, WorkerEnded, in_child, rotated

from zipmoe import _core, hardware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHARES = (0.30, 0.50, 0.60, 0.75)
FEW_SHARES = (0.30, 0.50, 0.75)
SHORT, LONG, SKIPPED, DECODED = 64, 512, 16, 32
LONGEST_ANSWER = 512
CONTEXT = 1024
RATE_S, RATE_ROUNDS, RECORD_BYTES, DRAM_BYTES = 0.2, 3, 8 << 20, 1 << 30
FRESH_BYTES = 1 << 30
# Of a limit, what accelerate cannot have for weights: Python and torch, and a layer of experts
# (1 GB) twice, while it is being read.
ACCELERATE_TAKES = 2_600_000_000
PASSIVE = {"OMP_WAIT_POLICY": "passive"}  # as `import zipmoe` sets it


Shares = tuple[float | None, ...]  # of the checkpoint's size; None: no limit


@dataclass(frozen=True)
class Kind:
    """An engine, where it runs, and what it is fed."""

    name: str
    factory: str
    arguments: Callable[[int | None], dict[str, Any]]  # from the limit in bytes
    shares: Shares  # with the short prompt and decoding
    long_shares: Shares = ()
    skipped: int = SKIPPED
    decoded: int = DECODED

    @property
    def environment(self) -> dict[str, str]:
        return PASSIVE if self.factory.endswith("ZipmoeEngine") else {}


@dataclass(frozen=True)
class Task:
    """A run: one of a round."""

    round: int
    kind: Kind
    share: float | None
    prompt: int

    @property
    def key(self) -> list[Any]:
        return [self.round, self.kind.name, self.share, self.prompt]


class Tokens:
    """The forced tokens of a round, all of one topic."""

    def __init__(self, number: int, shape: Shape) -> None:
        rng = random.Random(number)
        topic = rng.randrange(shape.topics)
        self.long, self.short, self.answer = (
            [
                rng.randrange(shape.vocabulary // shape.topics) * shape.topics + topic
                for _ in range(count)
            ]
            for count in (LONG, SHORT, LONGEST_ANSWER)
        )


def zipmoe_kind(
    name: str, store: Path, shares: Shares, long_shares: Shares = (), **options: Any
) -> Kind:
    """Give zipmoe on this store, with options of `zipmoe.load`."""

    def arguments(limit: int | None) -> dict[str, Any]:
        given = {"store": str(store), "memory": limit, "context": CONTEXT, "threads": 2}
        return given | options

    return Kind(name, "engine_torch:ZipmoeEngine", arguments, shares, long_shares)


def kinds(files: Files, scratch: Path) -> Iterator[Kind]:
    yield zipmoe_kind("zipmoe", files.store, (*SHARES, None), (*FEW_SHARES, None))
    if importlib.util.find_spec("llama_cpp"):
        yield Kind(
            "llama.cpp",
            "engine_llama:LlamaEngine",
            lambda _: {"path": str(files.gguf), "context": CONTEXT, "threads": 2},
            (*SHARES, None),
            FEW_SHARES,
        )
    yield zipmoe_kind("zipmoe raw", files.raw_store, FEW_SHARES)
    yield Kind(
        "plain LRU",
        "lru_torch:LruEngine",
        lambda limit: {"checkpoint": files.checkpoint, "memory": limit, "threads": 2},
        FEW_SHARES,
    )
    if importlib.util.find_spec("accelerate"):
        yield Kind(
            "accelerate",
            "engine_torch:OffloadedEngine",
            lambda limit: {
                "checkpoint": str(files.checkpoint),
                "memory": (limit or 0) - ACCELERATE_TAKES,
                "folder": str(scratch),
                "threads": 2,
            },
            FEW_SHARES,
            skipped=2,
            decoded=4,
        )


def tasks(listed: list[Kind], number: int) -> Iterator[Task]:
    """Give the runs of a round: limit after limit, engines in turns."""
    for share in (*SHARES, None):
        for name in rotated([kind.name for kind in listed], number):
            kind = next(kind for kind in listed if kind.name == name)
            if share in kind.shares:
                yield Task(number, kind, share, SHORT)
            if share in kind.long_shares:
                yield Task(number, kind, share, LONG)


def prepare(shape: Shape, cache: Path, counts: Path | None) -> None:
    """Make the files; runs in a process of its own."""
    from qwen_gguf import write_gguf  # noqa: PLC0415
    from synthetic_qwen import pack_unless_packed, prepare  # noqa: PLC0415

    files = prepare(shape, cache, counts=counts)
    pack_unless_packed(files.checkpoint, files.raw_store, codec="raw")
    if not files.gguf.exists():
        write_gguf(files.checkpoint, files.gguf)


class Bench:
    """Runs tasks, and keeps what they gave."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shape = Shape(topics=TOPICS)
        self.files = Files.of(self.shape, options.cache, options.counts)
        self.engine, self.memory = _core.Engine(), np.ones(DRAM_BYTES, np.uint8)
        self.runs: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []
        if options.resume and options.out and options.out.exists():
            kept = json.loads(options.out.read_text())
            self.runs, self.rounds = kept["runs"], kept["rounds"]

    @property
    def routing(self) -> dict[str, Any]:
        """What was imposed."""
        return json.loads(self.files.routing.read_text())

    @property
    def total(self) -> int:
        return sum(file.stat().st_size for file in self.files.checkpoint.iterdir())

    def run(self) -> dict[str, Any]:
        scratch = Path(tempfile.mkdtemp(dir=self.files.folder))
        try:
            listed = list(kinds(self.files, scratch))
            with ordinary_read_ahead(self.files.folder):
                for number in range(self.options.rounds):
                    self.round(number, [kind for kind in listed if self.is_wanted(kind)])
        finally:
            shutil.rmtree(scratch)
        return self.document()

    def is_wanted(self, kind: Kind) -> bool:
        return not self.options.arms or kind.name in self.options.arms.split(",")

    def round(self, number: int, listed: list[Kind]) -> None:
        if number == len(self.rounds):
            self.rounds.append(self.conditions(number))
        for task in tasks(listed, number):
            self.perform(task)

    def perform(self, task: Task) -> None:
        """Run it unless it has been, and keep what it gave."""
        if task.key not in [run["key"] for run in self.runs]:
            self.runs.append(self.quietest(task))
            print(line(self.runs[-1]), file=sys.stderr, flush=True)
            self.keep()

    def conditions(self, number: int) -> dict[str, Any]:
        """Measure the machine, record this round's routing, and fetch records alone."""
        measured = hardware.profile(self.files.store, refresh=True)
        fresh = FRESH_BYTES / fresh_memory_s()
        tokens = Tokens(number, self.shape)
        answer = tokens.answer[: SKIPPED + DECODED]
        trace = self.files.folder / f"round-{number}.npz"
        kind = zipmoe_kind("zipmoe", self.files.store, ())
        few = int(min(SHARES) * self.total)  # memory for the experts of a layer, not of two
        drop_page_cache()
        with Worker("fetch", "offload_arm:Arm", PASSIVE, **self.arguments(kind, few, "")) as worker:
            fetch = self.rates() | worker.call("call", "fetch")
            worker.call("call", "record", tokens.short, answer, str(trace))
        return {
            "profile": asdict(measured),
            "fresh_memory_bytes_s": fresh,
            "fetch": fetch,
            "first_tokens": self.routing["tokens_of_a_prompt"],
            "trace": trace.name,
        }

    def arguments(self, kind: Kind, limit: int | None, processes: str) -> dict[str, Any]:
        return {"processes": processes, "engine": kind.factory, **kind.arguments(limit)}

    def rates(self) -> dict[str, float]:
        """Bytes a second right now: of records of the store, read as zipmoe does; of memory."""
        drive = hardware.known_drive(self.files.store)
        assert drive is not None
        largest = max(self.files.store.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        read, touched = [], []
        for _ in range(RATE_ROUNDS):
            read.append(
                _core.measure_reads(
                    str(largest),
                    reader=drive.reader,
                    request_bytes=drive.request_bytes,
                    depth=drive.depth,
                    record_bytes=RECORD_BYTES,
                    seconds=RATE_S,
                )
            )
            begin = time.perf_counter()
            self.engine.read(self.memory)
            touched.append(self.memory.nbytes / (time.perf_counter() - begin))
        return {
            "drive_bytes_s": statistics.median(read),
            "dram_bytes_s": statistics.median(touched),
        }

    def quietest(self, task: Task) -> dict[str, Any]:
        """Run it until nobody disturbs it, or take the attempt that was disturbed least."""
        found = []
        for _ in range(self.options.attempts):
            found.append(self.once(task))
            if found[-1]["foreign_share"] <= MOST_FOREIGN or "failed" in found[-1]:
                break
        best = min(found, key=lambda run: run["foreign_share"])
        return best | {"attempts_foreign": [run["foreign_share"] for run in found]}

    def once(self, task: Task) -> dict[str, Any]:
        tokens = Tokens(task.round, self.shape)
        limit = None if task.share is None else int(task.share * self.total)
        run: dict[str, Any] = {
            "key": task.key,
            "round": task.round,
            "arm": task.kind.name,
            "share": task.share,
            "prompt": task.prompt,
            **self.rates(),
        }
        drop_page_cache()
        with MemoryGroup(limit) as group:
            try:
                arguments = self.arguments(task.kind, limit, group.processes)
                with Worker(
                    task.kind.name, "offload_arm:Arm", task.kind.environment, **arguments
                ) as worker:
                    run |= self.feed(worker, task, tokens)
            except WorkerEnded as error:
                run |= {"failed": str(error)}
            run["group"] = group.facts()
        timed = [
            run[name]["usage"]["foreign_share"] for name in ("prefill", "decode") if name in run
        ]
        return run | {"foreign_share": max(timed, default=0.0)}

    def feed(self, worker: Worker, task: Task, tokens: Tokens) -> dict[str, Any]:
        is_short = task.prompt == SHORT
        found = {"prefill": worker.call("prefill", tokens.short if is_short else tokens.long)}
        if is_short:
            end = task.kind.skipped + task.kind.decoded
            found["warm_up"] = worker.call("decode", tokens.answer[: task.kind.skipped])
            found["decode"] = worker.call("decode", tokens.answer[task.kind.skipped : end])
        if task.share is None:  # everything is in memory now: how long the products take
            found["warm"] = worker.call("prefill", tokens.short if is_short else tokens.long)
        return found | {"facts": worker.call("facts")}

    def document(self) -> dict[str, Any]:
        return {
            "benchmark": "offload",
            "machine": describe_machine(),
            "model": asdict(self.shape),
            "routing": self.routing,
            "bytes": {
                path.name: sum(file.stat().st_size for file in path.iterdir())
                for path in (self.files.checkpoint, self.files.store, self.files.raw_store)
            },
            "tokens": {"prefill": [SHORT, LONG], "skipped": SKIPPED, "decoded": DECODED},
            "summary": summarise(self.rounds, self.runs, self.files.folder),
            "rounds": self.rounds,
            "runs": self.runs,
        }

    def keep(self) -> None:
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.options.out.write_text(json.dumps(self.document(), indent=1) + "\n")


def fresh_memory_s() -> float:
    """Time the first touch of memory: a virtual machine may have to get it from its host again."""
    with mmap.mmap(-1, FRESH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        begin = time.perf_counter()
        for page in range(0, FRESH_BYTES, mmap.PAGESIZE):
            memory[page] = 1
        return time.perf_counter() - begin


def line(run: dict[str, Any]) -> str:
    where = "no limit" if run["share"] is None else f"{run['share']:.0%}"
    said = f"round {run['round'] + 1}, {where}, {run['arm']}: "
    if "failed" in run:
        return said + run["failed"].strip().splitlines()[-1]
    said += f"{run['prompt']} tokens in {sum(run['prefill']['seconds']):.2f} s"
    if "decode" in run:
        seconds = run["decode"]["seconds"]
        said += f", decode {len(seconds) / sum(seconds):.2f}/s"
    return said + f", foreign {run['foreign_share']:.0%}"


def stop(*_: object) -> None:
    """End so that the drive gets its read-ahead back."""
    raise SystemExit("stopped; --resume goes on")


def run_bench(kind: Callable[[argparse.Namespace], Bench], parser: argparse.ArgumentParser) -> None:
    """Run a benchmark of this model, with the options that all of them have."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attempts", type=int, default=2, help="most of a disturbed run")
    parser.add_argument("--resume", action="store_true", help="go on with the runs that --out has")
    parser.add_argument("--counts", type=Path, help="recorded counts, to take routing from")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    bench = kind(options)
    making = {"shape": bench.shape, "cache": options.cache, "counts": options.counts}
    in_child("offload:prepare", **making)
    publish(bench.run(), options.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", help="of those, by commas; all that are installed without it")
    run_bench(Bench, parser)


if __name__ == "__main__":
    main()
