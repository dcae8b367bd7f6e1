"""Measuring a machine: once, kept by processor and drive, and used from then on."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
from small_store import write_store
from typer.testing import CliRunner

import zipmoe
from zipmoe import _core, hardware
from zipmoe._errors import FetchError
from zipmoe.cli import app

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure next to nothing, and keep it apart from the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "ROUNDS", 1)
    monkeypatch.setattr(hardware, "SHAPES", ((2, 1 << 20), (8, 1 << 19)))
    monkeypatch.setattr(hardware, "_READ_S", 0.01)
    monkeypatch.setattr(hardware, "_WORKING_SET", 1 << 20)
    monkeypatch.setattr(hardware, "_SIDE", 256)
    monkeypatch.setattr(hardware, "_FILE_BYTES", 32 << 20)


def test_a_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    found = hardware.profile(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}
    rates = [found.drive.read_bytes_s, found.core.flops, *found.core.multiply_bytes_s.values()]
    rates += found.core.decode_bytes_s.values()
    for rate in rates:
        assert 0 < rate.least <= rate.median <= rate.most < math.inf
    assert found.core.isa == _core.Engine(threads=1).isa
    assert found.drive.reader in {"io_uring", "pread"}
    assert (found.drive.depth, found.drive.request_bytes) in hardware.SHAPES
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # what was read is gone

    monkeypatch.setattr(_core, "measure_reads", None)  # nothing is measured again
    assert hardware.profile(tmp_path) == found
    assert hardware.known_drive(tmp_path) == found.drive
    with pytest.raises(TypeError):
        hardware.profile(tmp_path, refresh=True)


def test_a_file_that_is_no_profile_is_measured_over(tmp_path: Path) -> None:
    path = hardware.profile_path()
    assert hardware.known_drive(tmp_path) is None
    path.parent.mkdir(parents=True)
    for content in ("", "[1, 2]", '{"core'):
        path.write_text(content)
        assert hardware.known_drive(tmp_path) is None
    assert hardware.profile(tmp_path).drive == hardware.known_drive(tmp_path)


def test_a_ring_that_is_forbidden_leaves_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _core.measure_reads

    def without_rings(path: str, *, reader: str, **rest: object) -> float:
        if reader == "io_uring":
            raise ValueError("reader io_uring does not work here")
        return real(path, reader=reader, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_core, "measure_reads", without_rings)
    assert hardware.profile(tmp_path).drive.reader == "pread"


def test_what_was_measured_is_how_stores_are_read(tmp_path: Path) -> None:
    store = write_store(tmp_path / "small")
    found = hardware.profile(store)
    with zipmoe.load(store, memory="64GB") as loaded:
        assert loaded.runtime.cache.reader.startswith(found.drive.reader)


def test_the_command_says_it_and_documents_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["profile", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["core"]["multiply_bytes_s"].keys() == {*hardware.MULTIPLIED}
    said = CliRunner().invoke(app, ["profile", str(tmp_path)])
    assert said.exit_code == 0
    for word in ("GB/s", "rank223", "GFLOPS", "zstd", document["drive"]["reader"]):
        assert word in said.stdout


def test_reads_that_cannot_be_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\0" * 8192)
    how = {"reader": "pread", "record_bytes": 4096, "seconds": 0.01}
    assert _core.measure_reads(str(file), request_bytes=4096, depth=2, **how) > 0
    for wrong in ({"request_bytes": 100}, {"request_bytes": 0}, {"depth": 65}):
        shape = {"request_bytes": 4096, "depth": 2} | wrong
        with pytest.raises(ValueError, match="requests of"):
            _core.measure_reads(str(file), **shape, **how)
    with pytest.raises(ValueError, match="shorter than a record"):
        _core.measure_reads(str(file), request_bytes=4096, depth=2, **how | {"record_bytes": 16384})
    with pytest.raises(FetchError):
        _core.measure_reads(str(tmp_path / "none"), request_bytes=4096, depth=2, **how)
