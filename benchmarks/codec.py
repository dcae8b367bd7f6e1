"""Size and speed of every codec on every instruction set, against memcpy and zipnn.

Gaussian 1408 x 2048 experts, as many as fill the working set, are encoded, laid out as in a store
(extents at multiples of 4096) and decoded into as many other matrices: RAM to RAM, far beyond the
caches. In every round all arms alternate, each right after a memcpy of the same bytes; ratios are
taken within a round, and median, least and most over the rounds are reported. On two cores, two
threads share the matrices (zipnn holds Python's lock and uses its own two threads). All decoded
bytes are compared with the source once, two matrices of each arm in every round.

    python benchmarks/codec.py [--rounds 7] [--quick] [--megabytes 600] [--out FILE]

The last line of stdout is the whole result as one JSON document, which --out keeps too.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import statistics
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zipnn
from machine import describe_machine
from workers import spread

from zipmoe import _core

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = (1408, 2048)
MATRIX_BYTES = SHAPE[0] * SHAPE[1] * 2
RANKS = ("rank223", "rank3", "rank4")
CODECS = (*RANKS, "zstd", "lz4hc", "raw")
ISAS = [isa for isa in _core.available_isas() if isa != "avx512bf16"]  # products only
PAGE = 4096
# lz4hc encodes at some 10 MB/s a core: two matrices are enough to say so.
LZ4HC_MATRICES = 2
SIZE_SHAPES = ((1408, 2048), (1536, 576), (14336, 4096))


def bf16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def gaussian(shape: tuple[int, int], seed: int) -> np.ndarray:
    return bf16(0.02 * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def row_varying(shape: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = 0.02 * np.exp(0.3 * rng.standard_normal((shape[0], 1)))
    return bf16(scale * rng.standard_normal(shape, dtype=np.float32))


def student_t(shape: tuple[int, int], seed: int) -> np.ndarray:
    return bf16(0.02 * np.random.default_rng(seed).standard_t(6, shape))


def aligned(count: int, dtype: type) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    room = np.zeros(size + PAGE, np.uint8)
    start = -room.ctypes.data % PAGE
    return room[start : start + size].view(dtype)


def padded(length: int) -> int:
    return -(-length // PAGE) * PAGE


class Matrices:
    """The working set: sources, and as many targets."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sources = aligned(count * MATRIX_BYTES // 2, np.uint16).reshape(count, *SHAPE)
        self.targets = aligned(count * MATRIX_BYTES // 2, np.uint16).reshape(count, *SHAPE)
        distinct = [gaussian(SHAPE, seed) for seed in range(min(count, 8))]
        for i in range(count):
            self.sources[i] = np.roll(distinct[i % len(distinct)], i // len(distinct), axis=0)
        self.memmove = ctypes.CDLL(None).memmove
        self.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.memmove.restype = ctypes.c_void_p

    def copy(self, i: int) -> None:
        at = i * MATRIX_BYTES
        self.memmove(self.targets.ctypes.data + at, self.sources.ctypes.data + at, MATRIX_BYTES)


class Coded:
    """All matrices in one codec, each extent at a multiple of 4096 of one block of memory."""

    def __init__(self, codec: str, matrices: Matrices) -> None:
        self.codec, self.matrices = codec, matrices
        # lz4hc takes too long for distinct content; the bytes still lie apart in memory.
        distinct = LZ4HC_MATRICES if codec == "lz4hc" else matrices.count
        self.distinct = min(distinct, matrices.count)
        coded = [self.encode(i, "", threads=2) for i in range(self.distinct)]
        self.row_group, self.k_tile = coded[0].row_group, coded[0].k_tile
        self.names = {one.codec for one in coded}
        lengths = [sum(padded(extent.size) for extent in one.extents) for one in coded]
        self.bits = 8 * statistics.mean(lengths) / (SHAPE[0] * SHAPE[1])
        self.block = aligned(
            sum(lengths[i % self.distinct] for i in range(matrices.count)), np.uint8
        )
        self.extents = []
        at = 0
        for i in range(matrices.count):
            views = []
            for extent in coded[i % self.distinct].extents:
                view = self.block[at : at + extent.size]
                view[:] = extent
                views.append(view)
                at += padded(extent.size)
            self.extents.append(tuple(views))

    def source(self, i: int) -> np.ndarray:
        return self.matrices.sources[i % self.distinct]

    def encode(self, i: int, isa: str, threads: int = 1) -> _core.Encoded:
        return _core.encode(self.codec, self.matrices.sources[i], isa=isa, threads=threads)

    def decode(self, i: int, isa: str) -> None:
        _core.decode(
            self.codec,
            self.extents[i],
            self.matrices.targets[i],
            row_group=self.row_group,
            k_tile=self.k_tile,
            isa=isa,
        )


class Zipnn:
    """The same by zipnn, which returns a new buffer from every call.

    The latest results are kept, as many as there are matrices: else the allocator hands out the
    same few megabytes again and again, and zipnn decodes into the cache instead of into memory.
    Once they are as many, it hands out the oldest, so that no pages are made while the clock runs.
    """

    def __init__(self, matrices: Matrices) -> None:
        self.matrices = matrices
        self.by_threads = {
            n: zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=n)
            for n in (1, 2)
        }
        # It changes its input in place: every call gets a copy, made outside the clock.
        self.coded = [
            self.by_threads[1].compress(matrices.sources[i].tobytes())
            for i in range(matrices.count)
        ]
        self.bits = 8 * statistics.mean(map(len, self.coded)) / (SHAPE[0] * SHAPE[1])
        self.kept: deque[bytearray] = deque(maxlen=matrices.count)
        for i in range(matrices.count):
            self.decode(i, 1)

    def decode(self, i: int, threads: int) -> bytearray:
        result = self.by_threads[threads].decompress(self.coded[i])
        self.kept.append(result)
        return result

    def encode(self, source: bytes, threads: int) -> bytes:
        return self.by_threads[threads].compress(source)


@dataclass
class Arm:
    """One thing that is timed: `task(i)` for each of `count` matrices, on `threads` threads."""

    codec: str
    isa: str
    threads: int
    count: int
    task: Callable[[int], object]
    own_threads: bool = False
    prepare: Callable[[], None] = lambda: None
    verify: Callable[[list[int]], None] = lambda _: None
    rates: list[float] = field(default_factory=list)
    to_memcpy: list[float] = field(default_factory=list)
    to_zipnn: list[float] = field(default_factory=list)

    def measure(self, pool: ThreadPoolExecutor) -> float:
        """Run once and return GB/s of BF16."""
        self.prepare()

        def share(worker: int, workers: int) -> None:
            for i in range(worker, self.count, workers):
                self.task(i)

        started = time.perf_counter()
        if self.threads == 1 or self.own_threads:
            share(0, 1)
        else:
            for done in [
                pool.submit(share, worker, self.threads) for worker in range(self.threads)
            ]:
                done.result()
        return self.count * MATRIX_BYTES / (time.perf_counter() - started) / 1e9


def isas_of(codec: str) -> list[str]:
    return ISAS[:1] if codec == "raw" else ISAS


def decode_arms(matrices: Matrices, coded: dict[str, Coded], zip_: Zipnn, cores: int) -> list[Arm]:
    arms = []
    for threads in range(1, cores + 1):
        for codec, form in coded.items():

            def check(sample: list[int], form: Coded = form) -> None:
                for i in sample:
                    if not np.array_equal(matrices.targets[i], form.source(i)):
                        raise SystemExit(f"{form.codec}: matrix {i} did not come back")

            for isa in isas_of(codec):
                task = lambda i, form=form, isa=isa: form.decode(i, isa)  # noqa: E731
                arms.append(Arm(codec, isa, threads, matrices.count, task, verify=check))

        def check_zipnn(sample: list[int], threads: int = threads) -> None:
            for i in sample:
                if bytes(zip_.decode(i, threads)) != matrices.sources[i].tobytes():
                    raise SystemExit(f"zipnn: matrix {i} did not come back")

        task = lambda i, threads=threads: zip_.decode(i, threads)  # noqa: E731
        arm = Arm("zipnn", "", threads, matrices.count, task, own_threads=True)
        arm.verify = check_zipnn
        arms.append(arm)
    return arms


def encode_arms(matrices: Matrices, coded: dict[str, Coded], zip_: Zipnn, cores: int) -> list[Arm]:
    arms = []
    for threads in range(1, cores + 1):
        for codec, form in coded.items():
            # What takes the time of zstd and lz4hc is their library.
            for isa in isas_of(codec) if codec in RANKS else ISAS[:1]:
                task = lambda i, form=form, isa=isa: form.encode(i, isa)  # noqa: E731
                count = form.distinct if codec == "lz4hc" else matrices.count
                arms.append(Arm(codec, isa, threads, count, task))
        copies: list[bytes] = []

        def prepare(copies: list[bytes] = copies) -> None:
            copies[:] = [matrices.sources[i].tobytes() for i in range(matrices.count)]

        task = lambda i, copies=copies, threads=threads: zip_.encode(copies[i], threads)  # noqa: E731
        arms.append(
            Arm("zipnn", "", threads, matrices.count, task, own_threads=True, prepare=prepare)
        )
    return arms


def measure_round(arms: list[Arm], copies: dict[int, Arm], matrices: Matrices, number: int) -> None:
    """Run every arm once, each right after a memcpy; the order rotates with the round."""
    rng = np.random.default_rng(number)
    shift = number * 5 % len(arms)
    with ThreadPoolExecutor(2) as pool:
        for arm in arms[shift:] + arms[:shift]:
            copied = copies[arm.threads].measure(pool)
            copies[arm.threads].rates.append(copied)
            sample = rng.choice(matrices.count, 2, replace=False).tolist()
            matrices.targets[sample] = 0
            rate = arm.measure(pool)
            arm.verify(sample)
            arm.rates.append(rate)
            arm.to_memcpy.append(rate / copied)
    zipnn_now = {arm.threads: arm.rates[-1] for arm in arms if arm.codec == "zipnn"}
    for arm in arms:
        arm.to_zipnn.append(arm.rates[-1] / zipnn_now[arm.threads])


def verify_all(arms: list[Arm], matrices: Matrices) -> None:
    with ThreadPoolExecutor(2) as pool:
        for arm in arms:
            if arm.threads == 1 and arm.codec != "zipnn":
                matrices.targets[:] = 0
                arm.measure(pool)
                arm.verify(list(range(matrices.count)))


def report(arm: Arm) -> dict[str, object]:
    return {
        "codec": arm.codec,
        "isa": arm.isa,
        "threads": arm.threads,
        "matrices": arm.count,
        "gb_s": spread(arm.rates),
        "to_memcpy": spread(arm.to_memcpy) if arm.to_memcpy else None,
        "to_zipnn": spread(arm.to_zipnn) if arm.to_zipnn else None,
    }


def size_table(*, quick: bool) -> list[dict[str, object]]:
    """Bits per weight as stored, padding to 4096 included, by data and shape."""
    rows = []
    for kind in (gaussian, row_varying, student_t):
        for shape in SIZE_SHAPES[: 2 if quick else 3]:
            matrix = kind(shape, 1)
            for codec in CODECS:
                if codec == "lz4hc" and (quick or matrix.size > 10**7):
                    continue
                coded = _core.encode(codec, matrix, threads=2)
                stored = sum(padded(extent.size) for extent in coded.extents)
                row = {"data": kind.__name__, "shape": list(shape), "codec": codec}
                rows.append(
                    row | {"stored_as": coded.codec, "bits": round(8 * stored / matrix.size, 4)}
                )
    return rows


def print_tables(result: dict) -> None:
    print(
        f"\n{'codec':9}{'isa':10}{'bits':>7}   GB/s of BF16: median (least to most), one core | two"
    )
    for what in ("decode", "encode"):
        print(f"-- {what}; x memcpy, x zipnn: medians of the ratios within each round")
        rows: dict[tuple[str, str], dict[int, dict]] = {}
        for row in result[what]:
            rows.setdefault((row["codec"], row["isa"]), {})[row["threads"]] = row
        for (codec, isa), by_threads in rows.items():
            cells = [f"{codec:9}{isa:10}{result['bits'].get(codec, 16):7.3f}  "]
            for row in by_threads.values():
                rate, memcpy, other = row["gb_s"], row["to_memcpy"], row["to_zipnn"]
                cells.append(f"{rate['median']:6.2f} ({rate['min']:.2f} to {rate['max']:.2f})")
                if memcpy is not None:
                    cells.append(f" {memcpy['median']:5.2f}x {other['median']:5.2f}x")
                cells.append("  | ")
            print("".join(cells))
    print("-- bits per weight as stored")
    for row in result["sizes"]:
        shape = "x".join(map(str, row["shape"]))
        print(f"{row['data']:12}{shape:12}{row['codec']:9}{row['bits']:8.3f}  {row['stored_as']}")


def check_memory(megabytes: int) -> None:
    """Leave with a message where the working set and all its coded forms would not fit."""
    needed = 10 * megabytes * 10**6
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    available *= 1024
    if needed > available:
        raise SystemExit(
            f"{needed / 1e9:.1f} GB of memory are needed and {available / 1e9:.1f} GB available: "
            f"use --megabytes {available // 10**7} or less"
        )


def run(options: argparse.Namespace) -> dict[str, object]:
    check_memory(options.megabytes)
    count = max(2, -(-options.megabytes * 10**6 // MATRIX_BYTES))
    cores = min(2, len(os.sched_getaffinity(0)))
    matrices = Matrices(count)
    coded = {codec: Coded(codec, matrices) for codec in CODECS}
    zip_ = Zipnn(matrices)
    decoding = decode_arms(matrices, coded, zip_, cores)
    encoding = encode_arms(matrices, coded, zip_, cores)
    copies = {n: Arm("memcpy", "", n, count, matrices.copy) for n in range(1, cores + 1)}
    verify_all(decoding, matrices)
    for number in range(options.rounds):
        measure_round(decoding, copies, matrices, number)
        measure_round(encoding, copies, matrices, number)
    return {
        "benchmark": "codec",
        "machine": describe_machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "zipnn")},
        "shape": list(SHAPE),
        "data": "gaussian, standard deviation 0.02",
        "working_set_bytes": count * MATRIX_BYTES,
        "rounds": options.rounds,
        "quick": options.quick,
        "bits": {name: round(form.bits, 4) for name, form in (coded | {"zipnn": zip_}).items()},
        "stored_as": {codec: sorted(form.names) for codec, form in coded.items()},
        "decode": [report(arm) for arm in (*copies.values(), *decoding)],
        "encode": [report(arm) for arm in encoding],
        "sizes": size_table(quick=options.quick),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=0, help="default 7, with --quick 2")
    parser.add_argument("--megabytes", type=int, default=0, help="of BF16; default 600, quick 60")
    parser.add_argument("--quick", action="store_true", help="a smoke test: no figure to quote")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/codec.json"))
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.megabytes = options.megabytes or (60 if options.quick else 600)
    result = run(options)
    print_tables(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
