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


@pytest.fixture
def limited():
    """Makes a memory cgroup with a limit and no swap; skips where that is not allowed."""
    version1 = (CGROUPS / "memory").is_dir()
    group = (CGROUPS / "memory" if version1 else CGROUPS) / f"zipmoe-{uuid.uuid4().hex}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")

    def limit(count):
        limit_file, swap_file, swap = (
            ("memory.limit_in_bytes", "memory.swappiness", "0")
            if version1
            else ("memory.max", "memory.swap.max", "0")
        )
        if not (group / limit_file).exists():
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
        events = group / "memory.events"
        killed = events if events.exists() else group / "memory.oom_control"
        assert "oom_kill 0" in killed.read_text()
    soak_record("runs inside a memory cgroup of its budget", budgets=len(budgets), killed=0)
