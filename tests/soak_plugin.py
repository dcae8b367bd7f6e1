"""The soak report: how much of each acceptance point was really done, with seed and commit.

A test takes the fixture `soak_record` and says what it counted:

    def test_flips_are_refused(soak_record):
        rng = random.Random(soak_record.seed)
        ...
        soak_record("flips refused by verify", flips=200, refused=200)

`make soak` passes `--soak-report FILE`; without it the fixture only checks its arguments. A report
that exists is kept and updated test by test, so that a part can be repeated: each test carries its
own commit.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_SEED = 20261122


@dataclass
class SoakRecord:
    """Takes the counts of one test. `seed` is what its randomness must start from."""

    seed: int
    points: dict[str, dict[str, float | str]] = field(default_factory=dict)

    def __call__(self, point: str, /, **counts: float | str) -> None:
        """Record `counts` under the acceptance point; recording a point twice is an error."""
        if not counts:
            raise ValueError(f"no counts given for {point!r}")
        if point in self.points:
            raise ValueError(f"{point!r} is recorded already")
        self.points[point] = counts


def pytest_addoption(parser):
    group = parser.getgroup("soak")
    group.addoption("--soak-report", metavar="FILE", help="update this report (make soak)")
    group.addoption("--soak-seed", type=int, default=DEFAULT_SEED, help="seed of random volumes")


@pytest.fixture
def soak_record(request):
    record = SoakRecord(seed=request.config.getoption("--soak-seed"))
    request.node.stash[_RECORD] = record
    return record


_RECORD = pytest.StashKey[SoakRecord]()
_ROWS = pytest.StashKey[dict]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    path = item.config.getoption("--soak-report")
    if path is None or item.get_closest_marker("soak") is None:
        return report
    rows = item.config.stash.setdefault(_ROWS, {})
    row = rows.setdefault(item.nodeid, {"outcome": "passed", "seconds": 0.0, "points": {}})
    row["seconds"] = round(row["seconds"] + report.duration, 1)
    if report.outcome != "passed":
        row["outcome"] = report.outcome
    if (record := item.stash.get(_RECORD, None)) is not None:
        row["points"] = record.points
        row["seed"] = record.seed
    return report


def pytest_sessionfinish(session):
    path, rows = session.config.getoption("--soak-report"), session.config.stash.get(_ROWS, None)
    if path is None or not rows:
        return
    target = Path(path)
    document = json.loads(target.read_text()) if target.exists() else {"tests": {}}
    stamp = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": commit()}
    for name, row in rows.items():
        document["tests"][name] = row | stamp
    document["machine"] = machine()
    document["tests"] = dict(sorted(document["tests"].items()))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".part")
    scratch.write_text(json.dumps(document, indent=1) + "\n")
    scratch.replace(target)


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash.get(_ROWS, None):
        terminalreporter.section(f"soak report: {config.getoption('--soak-report')}")
        for row in rows.values():
            for point, counts in row["points"].items():
                said = ", ".join(f"{name} {count}" for name, count in counts.items())
                terminalreporter.write_line(f"{row['outcome']}: {point}: {said}")


def commit() -> str:
    """Return the commit this ran at, with "+changes" where tracked files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    # The report itself lies in the tree and changes while parts of it are repeated.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return git("rev-parse", "HEAD") + ("+changes" if changed else "")


def machine() -> dict[str, str | int]:
    from zipmoe.hardware import processor  # noqa: PLC0415

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": processor(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": pages,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
