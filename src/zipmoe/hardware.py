"""A machine → how fast it reads, decodes and multiplies, measured once and kept.

The core's rates are kept for the processor, a drive's for the file system that it carries. All are
medians of runs that take turns, so that a slow moment strikes none of them alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zipmoe import _core
from zipmoe._errors import FetchError
from zipmoe._user_cache import user_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

__all__ = [
    "CoreRates",
    "Drive",
    "Profile",
    "Rate",
    "known_drive",
    "known_profile",
    "known_work",
    "processor",
    "profile",
    "profile_path",
    "remember_work",
]

MULTIPLIED = ("raw", "rank223", "rank3", "rank4")  # straight from their planes
DECODED = ("zstd", "lz4hc")  # before they are multiplied
# Requests under way, and bytes of each.
SHAPES = ((4, 1 << 20), (8, 1 << 20), (16, 1 << 20), (8, 2 << 20), (16, 512 << 10), (4, 4 << 20))
ROUNDS = 3
_REMEMBERED = 256  # tokens of earlier runs that count beside a new one, at most
_READERS = ("io_uring", "pread")
_VERSION = 1
_SIDE = 2048  # of the matrices that are multiplied
_WORKING_SET = 192 << 20  # bytes of BF16, beyond any cache
_PROMPT = 512  # columns, where arithmetic and not memory is the limit
_RECORD_BYTES = 8 << 20
_READ_S = 0.2
_FILE_BYTES = 1 << 30  # written where there is no store to read


@dataclass(frozen=True)
class Rate:
    """Bytes (of BF16 weights, or of a file) or operations a second; median, least and most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Rate:
        """Sum up what was measured."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Drive:
    """How a drive is read fastest, in whole records from anywhere."""

    reader: str  # "io_uring" or "pread"
    request_bytes: int
    depth: int
    read_bytes_s: Rate


@dataclass(frozen=True)
class CoreRates:
    """What the processor does, all workers together unless it is said otherwise."""

    isa: str
    workers: int
    multiply_bytes_s: Mapping[str, Rate]  # by codec; one token; weights as BF16
    decode_bytes_s: Mapping[str, Rate]  # by codec; of one worker
    flops: Rate  # many tokens


@dataclass(frozen=True)
class Profile:
    """A machine, as the planner wants to know it."""

    core: CoreRates
    drive: Drive


def profile_path() -> Path:
    """Return the file in the user's cache where profiles are kept."""
    return user_cache() / "profile.json"


class _Steps:
    """Counts what has been measured of what is to be."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def profile(
    folder: Path,
    *,
    refresh: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Give what is known of this machine and of the drive of a folder; measure what is not.

    Takes half a minute where nothing is known. Nothing else should be running.

    Raises
    ------
    FetchError
        The drive cannot be read.
    """
    known = {} if refresh else _read()
    core, drive = known.get(_core_key()), known.get(_drive_key(folder))
    reads = ROUNDS * len(_READERS) * len(SHAPES)
    work = ROUNDS * (len(MULTIPLIED) + 1) + len(DECODED)
    steps = _Steps(progress, (work if core is None else 0) + (reads if drive is None else 0))
    if core is None:
        core = asdict(_measure_core(steps))
    if drive is None:
        drive = asdict(_measure_drive(folder, steps))
    _write({**_read(), _core_key(): core, _drive_key(folder): drive})
    return Profile(_core_of(core), _drive_of(drive))


def known_drive(folder: Path) -> Drive | None:
    """Give what was measured of a folder's drive, if anything was; measures nothing."""
    drive = _read().get(_drive_key(folder))
    return None if drive is None else _drive_of(drive)


def known_profile(folder: Path) -> Profile | None:
    """Give what was measured of this machine and of a folder's drive, if both were."""
    known = _read()
    core, drive = known.get(_core_key()), known.get(_drive_key(folder))
    return None if core is None or drive is None else Profile(_core_of(core), _drive_of(drive))


def known_work(identity: str) -> float | None:
    """Give the seconds that a token of a store took on this processor, waiting left out."""
    return _known_work(_read(), identity)[0] or None


def remember_work(identity: str, seconds: float, tokens: int) -> None:
    """Keep what a token took in a run, as a mean over this and earlier runs.

    It is only advice to forecasts: where it cannot be kept, nothing is.
    """
    with contextlib.suppress(OSError):
        kept = _read()
        before, weight = _known_work(kept, identity)
        weight = min(weight, _REMEMBERED)
        mean = (before * weight + seconds * tokens) / (weight + tokens)
        _write({**kept, _work_key(identity): {"seconds": mean, "tokens": weight + tokens}})


def _known_work(kept: dict[str, Any], identity: str) -> tuple[float, int]:
    """Seconds of a token, and how many tokens they are a mean of; zeros where nothing is known."""
    found = kept.get(_work_key(identity))
    if not isinstance(found, dict):
        return 0.0, 0
    seconds, tokens = found.get("seconds"), found.get("tokens")
    if not isinstance(seconds, float) or not isinstance(tokens, int) or seconds <= 0 or tokens <= 0:
        return 0.0, 0
    return seconds, tokens


def _measure_drive(folder: Path, steps: _Steps) -> Drive:
    """Find how the drive of a folder is read fastest.

    Reads the largest shard in it, or a file of 1 GB that is written for it and removed.
    """
    found: dict[tuple[str, int, int], list[float]] = {}
    with _something_to_read(folder) as file:
        record = min(_RECORD_BYTES, file.stat().st_size)
        for _, reader, (depth, size) in product(range(ROUNDS), _READERS, SHAPES):
            steps.next()
            try:
                rate = _core.measure_reads(
                    str(file),
                    reader=reader,
                    request_bytes=size,
                    depth=depth,
                    record_bytes=record,
                    seconds=_READ_S,
                )
            except ValueError:  # a system that forbids rings
                continue
            found.setdefault((reader, depth, size), []).append(rate)
    best = max(found, key=lambda shape: statistics.median(found[shape]))
    reader, depth, size = best
    return Drive(reader, size, depth, Rate.of(found[best]))


@contextlib.contextmanager
def _something_to_read(folder: Path) -> Iterator[Path]:
    shards = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    if shards and shards[-1].stat().st_size >= _RECORD_BYTES:
        yield shards[-1]
        return
    file = folder / f".zipmoe-profile-{os.getpid()}"
    piece = np.random.default_rng(0).integers(0, 256, 16 << 20, np.uint8).tobytes()
    try:
        with file.open("wb") as out:
            for _ in range(_FILE_BYTES // len(piece)):
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        yield file
    except OSError as error:
        raise FetchError(
            f"cannot write {file} to read it again: {error}",
            path=str(file),
            offset=0,
            errno=error.errno or 0,
        ) from error
    finally:
        file.unlink(missing_ok=True)


def _measure_core(steps: _Steps) -> CoreRates:
    engine = _core.Engine()
    bits = _gaussian_bits(_SIDE)
    weights = {codec: _copies(codec, bits) for codec in MULTIPLIED}
    touched = 2 * _SIDE * _SIDE * len(weights["raw"])
    speeds: dict[str, list[float]] = {codec: [] for codec in (*MULTIPLIED, *DECODED, "flops")}
    x = _gaussian_bits(_PROMPT, _SIDE)
    y = np.empty((_PROMPT, _SIDE), np.uint16)
    for _ in range(ROUNDS):
        for codec, copies in weights.items():
            steps.next()
            seconds = _seconds(lambda: [_multiply(engine, one, x, 1, y) for one in copies])  # noqa: B023
            speeds[codec].append(touched / seconds)
        steps.next()
        seconds = _seconds(lambda: _multiply(engine, weights["raw"][0], x, _PROMPT, y))
        speeds["flops"].append(2 * _SIDE * _SIDE * _PROMPT / seconds)
    small = bits[:256]  # encoding takes a while
    out = np.empty_like(small)
    for codec in DECODED:
        steps.next()
        coded = _core.encode(codec, small)
        decode = functools.partial(
            _core.decode,
            codec,
            coded.extents,
            out,
            row_group=coded.row_group,
            k_tile=coded.k_tile,
        )
        for _ in range(ROUNDS):
            seconds = _seconds(decode)
            speeds[codec].append(small.nbytes / seconds)
    rates = {name: Rate.of(values) for name, values in speeds.items()}
    return CoreRates(
        isa=engine.isa,
        workers=engine.threads,
        multiply_bytes_s={codec: rates[codec] for codec in MULTIPLIED},
        decode_bytes_s={codec: rates[codec] for codec in DECODED},
        flops=rates["flops"],
    )


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _gaussian_bits(rows: int, columns: int = _SIDE) -> NDArray[np.uint16]:
    """BF16 bits of random weights, cut off where they are rounded."""
    values = np.random.default_rng(0).standard_normal((rows, columns), np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _copies(codec: str, bits: NDArray[np.uint16]) -> list[Any]:
    """Give as many copies of a coded matrix as fill memory beyond the caches."""
    coded = _core.encode(codec, bits)
    rows, columns = bits.shape
    return [
        _core.PackedMatrix(
            coded.codec,
            (coded.extents[0].copy(), coded.extents[1].copy()),
            rows=rows,
            columns=columns,
            row_group=coded.row_group,
            k_tile=coded.k_tile,
        )
        for _ in range(max(1, _WORKING_SET // bits.nbytes))
    ]


def _multiply(
    engine: Any, matrix: Any, x: NDArray[np.uint16], count: int, y: NDArray[np.uint16]
) -> Any:
    engine.multiply(matrix, x.ctypes.data, _SIDE, count, 0, y.ctypes.data, _SIDE)


def _core_key() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"core {processor()}, {cores} cores, {_core.available_isas()[0]}, v{_VERSION}"


def processor() -> str:
    """Name the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _drive_key(folder: Path) -> str:
    return f"drive {platform.node()}, device {folder.stat().st_dev}, v{_VERSION}"


def _work_key(identity: str) -> str:
    return f"work {identity}, {_core_key()}"


def _read() -> dict[str, Any]:
    """Read what is kept; nothing where it cannot be read: it is measured again then."""
    try:
        kept = json.loads(profile_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(kept: dict[str, Any]) -> None:
    path = profile_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _drive_of(kept: dict[str, Any]) -> Drive:
    return Drive(**{**kept, "read_bytes_s": Rate(**kept["read_bytes_s"])})


def _core_of(kept: dict[str, Any]) -> CoreRates:
    rates = {
        name: {codec: Rate(**rate) for codec, rate in kept[name].items()}
        for name in ("multiply_bytes_s", "decode_bytes_s")
    }
    return CoreRates(**{**kept, **rates, "flops": Rate(**kept["flops"])})
