"""The memory granted is what a process takes at most: measured from outside and by a cgroup."""

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from small_store import write_store

CGROUPS = Path("/sys/fs/cgroup")
MEASURE = """
import os, sys
os.environ["OMP_WAIT_POLICY"] = "passive"
import zipmoe
from zipmoe import budget
from zipmoe.generate import generate
memory = int(sys.argv[2])
if memory == 0:
    try: zipmoe.load(sys.argv[1], memory=1, context=200)
    except zipmoe.BudgetError as error: memory = error.floor_bytes
loaded = zipmoe.load(sys.argv[1], memory=memory, context=200)
base = loaded.memory.base
result = generate(loaded, "x" * 150, max_tokens=24)
print(memory, budget.peak_rss_bytes(), base, *result.token_ids)
"""


def measured(store, asked, *, group=None):
    """Run under a budget (0: the floor), perhaps in a cgroup; memory, peak, base and tokens."""
    enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n" if group else ""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", enter + MEASURE, str(store), str(asked)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    memory, peak, base, *tokens = map(int, done.stdout.split())
    assert peak <= memory
    assert base <= 600_000_000
    return memory, tokens


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    return write_store(folder, hidden=512, inner=1536, layers=6)  # 225 MB of experts


def test_the_peak_of_a_process_stays_inside_the_memory_granted(store):
    measured(store, 0)


@pytest.mark.soak
def test_the_peak_stays_inside_at_the_floor_the_middle_and_above_the_model(store, soak_record):
    floor, tokens = measured(store, 0)
    budgets = [floor + 40_000_000, floor + 120_000_000, 3_000_000_000]
    assert all(measured(store, memory)[1] == tokens for memory in budgets)
    soak_record("peak memory within the memory granted", budgets=1 + len(budgets))


def files_of(group):
    """Names of the files with limit and use of a memory cgroup."""
    if CGROUPS / "memory" in group.parents:
        return "memory.limit_in_bytes", "memory.usage_in_bytes"
    return "memory.max", "memory.current"


def assert_nothing_was_killed(group):
    events = group / "memory.events"
    killed = events if events.exists() else group / "memory.oom_control"
    assert "oom_kill 0" in killed.read_text()


@pytest.fixture
def limited():
    """Makes a memory cgroup with a limit and no swap; skips where that is not allowed."""
    version1 = (CGROUPS / "memory").is_dir()
    group = (CGROUPS / "memory" if version1 else CGROUPS) / f"zipmoe-{uuid.uuid4().hex}"
    try:
        group.mkdir()
    except OSError as error:
        # Only root may, and not in every container.
        pytest.skip(f"no memory cgroup can be made: {error}")

    def limit(count):
        swap_file, swap = ("memory.swappiness", "0") if version1 else ("memory.swap.max", "0")
        limit_file, _ = files_of(group)
        if not (group / limit_file).exists():
            # Version 2 gives it to those children alone for which the parent asks.
            pytest.skip("the memory controller is not available to new cgroups")
        (group / limit_file).write_text(str(count))
        if (group / swap_file).exists():
            (group / swap_file).write_text(swap)
        return group

    yield limit
    group.rmdir()


@pytest.mark.soak
def test_it_runs_inside_a_memory_cgroup_of_exactly_the_memory_granted(store, limited, soak_record):
    floor, tokens = measured(store, 0)
    budgets = [floor, floor + 120_000_000, 3_000_000_000]
    for memory in budgets:
        group = limited(memory)
        assert measured(store, memory, group=group)[1] == tokens
        assert_nothing_was_killed(group)
    soak_record("runs inside a memory cgroup of its budget", budgets=len(budgets), killed=0)


# The cache is full, or has not come to be yet: then the limit is lowered to what is used and a
# little more, in the middle of an answer, and the answer goes on.
LOWERED = """
import json, os, sys, time
os.environ["OMP_WAIT_POLICY"] = "passive"
from pathlib import Path
import zipmoe
from zipmoe.generate import generate

store, group, limit_file, usage_file, watched = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
loaded = zipmoe.load(store, memory="3GB", context=200)
runtime, cache = loaded.runtime, loaded.runtime.cache
if watched == "no":
    runtime.watch.close()
usage = lambda: int((group / usage_file).read_text())
ask = lambda **options: generate(loaded, "x" * 150, max_tokens=24, **options).token_ids
whole, expected, found = cache.slots, ask(), []

def lower(_):
    if len(found) > 0:
        return
    cache.limit(0)  # nearly nothing has been read,
    found.append(usage() + 60_000_000)
    (group / limit_file).write_text(str(found[0]))
    cache.limit(runtime.report.cache)  # and all of it would be
    time.sleep(2)  # two looks of the watch

assert ask(on_text=lower) == expected
after = usage()
assert after < found[0], (after, found)
peak = group / "memory.max_usage_in_bytes"
if peak.exists():
    peak.write_text("0")
assert ask() == expected
assert cache.slots < whole and runtime.watch.counts["limit"] == 1, runtime.watch.counts
if peak.exists():
    assert int(peak.read_text()) < found[0]
slots = cache.slots
(group / limit_file).write_text("3000000000")
time.sleep(42)  # after 30 s of calm, and 5 s between steps
assert ask() == expected
assert slots < cache.slots < whole, (slots, cache.slots, whole)
print(found[0], after, slots, cache.slots, runtime.watch.gave_back())
"""


def lowered(store, group, *, watched):
    """Run that in the group; the exit code and what it said."""
    enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
    words = [str(store), str(group), *files_of(group), "yes" if watched else "no"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", enter + LOWERED, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.soak
def test_a_limit_lowered_in_the_middle_of_an_answer_kills_nothing(store, limited, soak_record):
    group = limited(3_000_000_000)
    code, said = lowered(store, group, watched=True)
    assert code == 0, said
    assert_nothing_was_killed(group)
    limit, after, slots, regained = map(int, said.split()[:4])
    soak_record(
        "answers while the limit of the cgroup is lowered",
        limit_bytes=limit,
        used_bytes=after,
        slots=slots,
        slots_when_raised=regained,
        killed=0,
    )


@pytest.mark.soak
def test_without_the_watch_the_same_is_killed(store, limited):
    code, said = lowered(store, limited(3_000_000_000), watched=False)
    assert code == -9, said
