"""The server under load: batches, long prompts beside running answers, time to first token.

The model of `offload.py` with its imposed routing, in the server's own scheduler (`serve_arm`). A
request has a prompt of 64 tokens and forced answer tokens of one topic; the requests of a batch
have a topic each, or all the same. Parts, each of a round in a process of its own:

    memory   no limit: batches of 1, 4, 8 and 16
    half     a memory cgroup of 50 % of the checkpoint's size: the same
    llama    llama.cpp with as many sequences in a step as its server has slots: both limits
    gaps     a prompt of 2,000 tokens beside 4 running answers: at 50 %, and the demo model
    first    time to first token over HTTP and of the library, the demo model

What replacement policies would have read is replayed on the routing of the timed steps.

    python benchmarks/serve.py [--rounds 2] [--only memory,half,...] [--resume]
        [--counts FILE] [--cache FOLDER] [--out benchmarks/results/serve.json]

Needs what `offload.py` needs; about 15 minutes on an idle machine. --out is written after every
run, and --resume goes on where it ends.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from limits import MemoryGroup, drop_page_cache, ordinary_read_ahead
from machine import describe_machine
from offload import PASSIVE, SHORT, Bench, run_bench
from serve_first_token import compare
from serve_summary import summarise
from workers import Worker, WorkerEnded

from zipmoe._user_cache import user_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BATCHES = (1, 4, 8, 16)
HALF = 0.5
SKIPPED, TIMED = 8, 24
LLAMA_SKIPPED, LLAMA_TIMED = 2, 6
LLAMA_BATCHES = (1, 4, 16)
ANSWER = 184  # tokens: who begins first goes on while the others' prompts are read
CONTEXT = SHORT + ANSWER
ONE_TOPIC = 3
LONG, RUNNING, GAPS = 2000, 4, 24
GAP_CONTEXT = 2304
FIRST_TOKENS = 12
DEMO_MEMORY, DEMO_VOCABULARY = "8GB", 40_000


class Requests:
    """Prompts and answers of a batch, by its kind: "different" topics, or "same"."""

    def __init__(self, vocabulary: int, topics: int) -> None:
        self.vocabulary, self.topics = vocabulary, topics

    def tokens(self, seed: str, topic: int, count: int) -> list[int]:
        rng = random.Random(seed)
        each = self.vocabulary // self.topics
        return [rng.randrange(each) * self.topics + topic for _ in range(count)]

    def sequence(self, kind: str, number: int) -> list[int]:
        """Prompt and answer of a request."""
        topic = number % self.topics if kind == "different" else ONE_TOPIC % self.topics
        return self.tokens(f"{kind} {number}", topic, SHORT + ANSWER)

    def batch(self, kind: str, size: int) -> tuple[list[list[int]], list[list[int]]]:
        whole = [self.sequence(kind, number) for number in range(size)]
        return [ids[:SHORT] for ids in whole], [ids[SHORT:] for ids in whole]


class ServeBench(Bench):
    """Runs parts, and keeps what they gave."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.requests = Requests(self.shape.vocabulary, self.shape.topics)
        self.trace = self.files.folder / "serve-routing.npz"

    def run(self) -> dict[str, Any]:
        parts: dict[str, Callable[[int], None]] = {
            "memory": lambda number: self.batches("memory", number, None),
            "half": lambda number: self.batches("half", number, HALF),
            "llama": self.llama,
            "gaps": self.gaps,
            "first": self.first_tokens,
        }
        wanted = self.options.only.split(",") if self.options.only else [*parts]
        with ordinary_read_ahead(self.files.folder):
            self.record()
            for number in range(self.options.rounds):
                for part in wanted:
                    parts[part](number)
        return self.document()

    def record(self) -> None:
        """Note what all requests choose: it is the same alone and in a batch."""
        if self.trace.exists():
            return
        sequences = [
            self.requests.sequence(kind, number)
            for kind in ("different", "same")
            for number in range(max(BATCHES))
        ]
        with self.served(None, max(BATCHES), CONTEXT, "") as worker:
            worker.call("record", sequences, str(self.trace))

    def served(
        self,
        limit: int | str | None,
        conversations: int,
        context: int,
        processes: str,
        store: Path | None = None,
    ) -> Worker:
        return Worker(
            "zipmoe",
            "serve_arm:Served",
            PASSIVE,
            processes=processes,
            store=str(store or self.files.store),
            memory=limit,
            context=context,
            conversations=conversations,
            streams=max(BATCHES),
            threads=2,
        )

    def batches(self, part: str, number: int, share: float | None) -> None:
        listed = [(kind, size) for kind in ("different", "same") for size in BATCHES]
        todo = [
            {"part": part, "round": number, "arm": "zipmoe", "kind": kind, "batch": size}
            for kind, size in (listed if number % 2 == 0 else listed[::-1])
        ]

        def work(limit: int | None, processes: str, key: dict[str, Any]) -> Iterator[Any]:
            with self.served(limit, max(BATCHES), CONTEXT, processes) as worker:
                if share is None:
                    worker.call("fill")
                while key:
                    found = {"share": share} | self.rates()
                    batch = self.requests.batch(key["kind"], key["batch"])
                    found |= worker.call("decode", *batch, SKIPPED, TIMED)
                    key = yield found | {"facts": worker.call("facts")}

        self.perform_all(todo, share, work)

    def llama(self, number: int) -> None:
        if not find_spec("llama_cpp"):
            return
        for share in (None, HALF):
            todo = [
                {"part": "llama", "round": number, "arm": "llama.cpp", "kind": "different"}
                | {"batch": size, "share": share}
                for size in LLAMA_BATCHES
            ]
            self.perform_all(todo, share, self.llama_work)

    def llama_work(self, _: int | None, processes: str, key: dict[str, Any]) -> Iterator[Any]:
        arguments = {"processes": processes, "path": str(self.files.gguf), "context": CONTEXT}
        arguments |= {"sequences": max(BATCHES), "threads": 2}
        with Worker("llama.cpp", "serve_llama:Slots", {}, **arguments) as worker:
            while key:
                batch = self.requests.batch("different", key["batch"])
                key = yield worker.call("decode", *batch, LLAMA_SKIPPED, LLAMA_TIMED)

    def gaps(self, number: int) -> None:
        demo = user_cache() / "demo" / "store"
        for name, requests, share, store in (
            ("demo", Requests(DEMO_VOCABULARY, 1), None, demo),
            ("8 layers", self.requests, HALF, self.files.store),
        ):

            def work(
                limit: int | None,
                processes: str,
                _: dict[str, Any],
                requests: Requests = requests,
                store: Path = store,
            ) -> Iterator[Any]:
                memory = limit or DEMO_MEMORY
                with self.served(memory, RUNNING + 1, GAP_CONTEXT, processes, store) as worker:
                    topics = [n % requests.topics for n in range(RUNNING)]
                    prompts = [requests.tokens(f"p{n}", t, SHORT) for n, t in enumerate(topics)]
                    answers = [requests.tokens(f"a{n}", t, LONG) for n, t in enumerate(topics)]
                    long = requests.tokens("long", requests.topics - 1, LONG)
                    found = worker.call("gaps", prompts, answers, long, GAPS)
                    yield found | {"facts": worker.call("facts")}

            self.perform_all([{"part": "gaps", "round": number, "arm": name}], share, work)

    def first_tokens(self, number: int) -> None:
        store = user_cache() / "demo" / "store"

        def work(*_: object) -> Iterator[Any]:
            with Worker(
                "library", "serve_first_token:Library", PASSIVE, store=str(store)
            ) as worker:
                yield compare(worker, store, FIRST_TOKENS)

        self.perform_all([{"part": "first", "round": number, "arm": "zipmoe"}], None, work)

    def perform_all(
        self, todo: list[dict[str, Any]], share: float | None, work: Callable[..., Any]
    ) -> None:
        """Run what has not been run, cold, in one process, which `work` starts.

        work(limit, processes of the group, key): gives what a run found, and is sent the next key.
        """
        todo = [key for key in todo if all(run["key"] != key for run in self.runs)]
        if not todo:
            return
        limit = None if share is None else int(share * self.total)
        drop_page_cache()
        with MemoryGroup(limit) as group:
            at_work = work(limit, group.processes, todo[0])
            try:
                for key in todo:
                    found = next(at_work) if key is todo[0] else at_work.send(key)
                    self.keep_run(key, found | {"group": group.facts()})
            except WorkerEnded as error:
                self.keep_run(key, {"failed": str(error)})
            finally:
                at_work.close()

    def keep_run(self, key: dict[str, Any], found: dict[str, Any]) -> None:
        self.runs.append({"key": key, **key, **found})
        shown = {name: value for name, value in key.items() if name != "round"}
        print(f"round {key['round'] + 1}: {shown}", file=sys.stderr, flush=True)
        self.keep()

    def document(self) -> dict[str, Any]:
        return {
            "benchmark": "serve",
            "machine": describe_machine(),
            "model": asdict(self.shape),
            "routing": self.routing,
            "tokens": {"prompt": SHORT, "skipped": SKIPPED, "timed": TIMED, "long": LONG},
            "summary": summarise(self.runs, self.trace),
            "rounds": self.rounds,
            "runs": self.runs,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="parts, by commas; all without it")
    run_bench(ServeBench, parser)


if __name__ == "__main__":
    main()
