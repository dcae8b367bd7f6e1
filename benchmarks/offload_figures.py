"""zipmoe alone where weights do not fit: policies, lookahead, lengths of answers, codecs.

The model, limits and runs of `offload.py`. In every round, each a process of its own that starts
cold: at 50 % of the checkpoint's size every replacement policy that a running cache can have, an
answer of 512 tokens, and stores of every codec, which are packed for it and removed; at 30 and
50 % zipmoe as it is, and without lookahead.

    python benchmarks/offload_figures.py [--rounds 3] [--skip-codecs] [--attempts 2]
        [--cache FOLDER] [--out benchmarks/results/offload_figures.json]

Needs what `offload.py` needs; packing takes a few minutes for each codec.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from limits import ordinary_read_ahead
from machine import describe_machine
from offload import (
    LONGEST_ANSWER,
    SHORT,
    Bench,
    Kind,
    Task,
    run_bench,
    zipmoe_kind,
)
from offload_summary import arms
from workers import in_child, rotated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from synthetic_qwen import Files

POLICIES = ("request", "lru", "lfu", "fifo", "marking", "edgemoe")
CODECS = ("rank3", "rank4", "zstd", "lz4hc")  # besides those that offload.py runs
LENGTHS = (32, 64, 128, 256, LONGEST_ANSWER)
HALF = (0.5,)


def kinds(files: Files) -> Iterator[Kind]:
    for policy in POLICIES:
        yield zipmoe_kind(f"policy {policy}", files.store, HALF, policy=policy)
    yield zipmoe_kind("lookahead on", files.store, (0.3, 0.5))
    yield zipmoe_kind("lookahead off", files.store, (0.3, 0.5), lookahead=False)
    long = zipmoe_kind("long answer", files.store, HALF)
    yield replace(long, skipped=0, decoded=LONGEST_ANSWER)


def pack(checkpoint: Path, store: Path, codec: str) -> None:
    """Pack it; runs in a process of its own."""
    from synthetic_qwen import forget_pages  # noqa: PLC0415

    from zipmoe import pack_checkpoint  # noqa: PLC0415

    shutil.rmtree(store, ignore_errors=True)
    pack_checkpoint(checkpoint, store, codec=codec)
    forget_pages(store)


class Figures(Bench):
    """Runs each kind in every round; those of codecs one codec after the other, for the disk."""

    def run(self) -> dict[str, Any]:
        self.sizes = {"rank223": size(self.files.store), "raw": size(self.files.raw_store)}
        with ordinary_read_ahead(self.files.folder):
            listed = list(kinds(self.files))
            stores = {"rank223": self.files.store, "raw": self.files.raw_store}
            listed += [zipmoe_kind(f"codec {name}", path, HALF) for name, path in stores.items()]
            self.runs_of(listed)
            for codec in () if self.options.skip_codecs else CODECS:
                store = self.files.folder / f"{codec}-store"
                try:
                    in_child(
                        "offload_figures:pack",
                        checkpoint=self.files.checkpoint,
                        store=store,
                        codec=codec,
                    )
                    self.sizes[codec] = size(store)
                    self.runs_of([zipmoe_kind(f"codec {codec}", store, HALF)])
                finally:
                    shutil.rmtree(store, ignore_errors=True)
        return self.document()

    def runs_of(self, listed: list[Kind]) -> None:
        for number in range(self.options.rounds):
            for name in rotated([kind.name for kind in listed], number):
                kind = next(kind for kind in listed if kind.name == name)
                for share in kind.shares:
                    self.perform(Task(number, kind, share, SHORT))

    def document(self) -> dict[str, Any]:
        good = [run for run in self.runs if "failed" not in run]
        checkpoint = size(self.files.checkpoint)
        return {
            "benchmark": "offload_figures",
            "machine": describe_machine(),
            "arms": arms(good),
            "lengths": lengths(good),
            "store_over_checkpoint": {
                codec: round(count / checkpoint, 4) for codec, count in self.sizes.items()
            },
            "failed": [[*run["key"], run["failed"]] for run in self.runs if "failed" in run],
            "rounds": self.rounds,
            "runs": self.runs,
        }


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def lengths(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give rates over the first tokens of the long answers."""
    answers = [run["decode"] for run in runs if run["arm"] == "long answer"]
    return [
        {
            "tokens": count,
            "tokens_s": round(
                statistics.median(count / sum(one["seconds"][:count]) for one in answers), 3
            ),
        }
        for count in LENGTHS
        if answers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip-codecs", action="store_true", help="pack nothing")
    run_bench(Figures, parser)


if __name__ == "__main__":
    main()
