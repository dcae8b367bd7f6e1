"""A machine that is said to have been measured, kept apart from the user's own."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from zipmoe import _core, hardware
from zipmoe.hardware import CoreRates, Drive, Rate

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

CODECS = ("raw", "rank223", "rank3", "rank4")


def rate(value: float) -> Rate:
    return Rate(value, 0.9 * value, 1.1 * value)


def as_if_measured(monkeypatch: pytest.MonkeyPatch, cache: Path, *folders: Path) -> None:
    """Let this processor and the drives of these folders have round rates."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    core = CoreRates(
        isa=_core.available_isas()[0],
        workers=2,
        multiply_bytes_s={codec: rate(30e9) for codec in CODECS},
        decode_bytes_s={"zstd": rate(2e9), "lz4hc": rate(3e9)},
        flops=rate(200e9),
    )
    drive = asdict(Drive("pread", 1 << 20, 8, rate(2e9)))
    drives = {hardware._drive_key(folder): drive for folder in folders}
    hardware._write({hardware._core_key(): asdict(core), **drives})
