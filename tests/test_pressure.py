"""Memory that others need is given back, at once; and taken back, slowly."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from small_store import write_store

import zipmoe
from zipmoe import pressure
from zipmoe._process import unreclaimable_bytes
from zipmoe.budget import MemoryReport
from zipmoe.generate import generate
from zipmoe.pressure import Giving, Signs, Watch, read_signs

MB = 10**6
SHARE = 320 * MB
FLOOR = 3 * MB


def report(**shares):
    sizes = {"base": 500 * MB, "dense": 50 * MB, "kv": 20 * MB, "scratch": 10 * MB, "cache": SHARE}
    return MemoryReport(promised=10**9, **(sizes | shares))


PLENTY = 10**12


class Machine:
    """Signs as time goes on; half a second between two looks."""

    def __init__(self, giving=None):
        self.giving = giving or Giving(report(), FLOOR)
        self.now, self.stalled = 100.0, 5.0

    def look(self, *, allowed=None, spare=PLENTY, stall=0.0):
        self.now += 0.5
        self.stalled += stall
        return self.giving.see(Signs(allowed, spare, self.stalled), self.now)

    def wait(self, seconds, **signs):
        acts = [self.look(**signs) for _ in range(int(2 * seconds))]
        return [act for act in acts if act]


def test_a_limit_that_leaves_enough_changes_nothing():
    machine = Machine()
    assert machine.wait(60, allowed=report().total) == []
    assert machine.giving.bytes == SHARE


def test_a_lowered_limit_takes_as_much_as_is_missing_at_once():
    machine, total = Machine(), report().total
    kind, why = machine.look(allowed=total - 100 * MB)
    assert kind == "limit"
    assert "800.00 MB of 900.00 MB" in why
    left = machine.giving.bytes
    assert SHARE - 100 * MB - SHARE // 64 <= left <= SHARE - 100 * MB
    # what others in the group take or free meanwhile moves nothing, as long as it is little
    assert machine.wait(20, allowed=total - 99 * MB) == []
    # below the floor nothing more can be given
    assert machine.look(allowed=total - 10 * SHARE)[0] == "limit"
    assert machine.giving.bytes == FLOOR
    assert machine.wait(20, allowed=0) == []


def test_after_a_limit_is_raised_the_cache_comes_back_slowly():
    machine, total = Machine(), report().total
    machine.look(allowed=total - SHARE // 2)
    assert machine.wait(pressure.CALM_S - 1, allowed=total) == []
    (first,) = machine.wait(1, allowed=total)
    assert first == ("regained", "memory has not been short for 30 s")
    assert machine.giving.bytes == SHARE // 2 + SHARE // 16
    acts = machine.wait(6 * pressure.REGAIN_S, allowed=total)
    assert [kind for kind, _ in acts] == ["regained"] * 6
    machine.wait(60, allowed=total)
    assert machine.giving.bytes == SHARE
    # and no further than a limit in between allows
    machine.look(allowed=total - SHARE // 2)
    machine.wait(300, allowed=total - SHARE // 4)
    assert machine.giving.bytes == SHARE * 3 // 4


def test_under_pressure_it_is_given_back_in_steps_down_to_the_floor():
    machine = Machine()
    machine.look(spare=-1)
    sizes = []
    for _ in range(10):
        machine.look(spare=-1, stall=0.1)
        sizes.append(machine.giving.bytes)
    step = SHARE // 8
    assert sizes == [max(SHARE - n * step, FLOOR) for n in range(1, 11)]


@pytest.mark.parametrize(
    ("spare", "stall", "why_not"),
    [
        (-1, 0.04, "waiting 8 % of the time is not pressure"),
        (1, 0.5, "there is memory: it is something else that is waited for"),
        (-1, 0.0, "nobody waits"),
    ],
)
def test_neither_waiting_nor_shortage_alone_is_pressure(spare, stall, why_not):
    assert Machine().wait(30, spare=spare, stall=stall) == [], why_not


def test_pressure_that_comes_and_goes_does_not_let_the_cache_swing():
    machine = Machine()
    machine.look()
    machine.look(spare=-1, stall=0.2)
    given = machine.giving.bytes
    for _ in range(10):  # short every 20 s: never calm
        assert machine.wait(20) == []
        assert machine.look(spare=-1) is None
    assert machine.giving.bytes == given
    assert [kind for kind, _ in machine.wait(31)] == ["regained"]


def test_nothing_is_taken_back_that_would_make_memory_short_again():
    machine = Machine()
    machine.look()
    machine.look(spare=-1, stall=0.2)
    assert machine.wait(100, spare=SHARE // 16 - 1) == []
    assert len(machine.wait(5, spare=SHARE // 16)) == 1


def test_the_first_look_knows_no_waiting_of_before():
    machine = Machine()
    machine.stalled = 10**6
    assert machine.look(spare=-1) is None


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def meminfo(available):
    return {"proc/meminfo": f"MemTotal: 10000000 kB\nMemAvailable: {available // 1024} kB\n"}


PRESSURE = "some avg10=1.00 avg60=0.00 avg300=0.00 total=%d\nfull avg10=0.00 total=7\n"


def group(version, folder, limit, others, file=0):
    """Files of a group in which others hold some memory besides this process, and files' pages."""
    own = unreclaimable_bytes()
    usage = own + others + 2 * file
    if version == 2:
        base, names, prefix = "sys/fs/cgroup", ("memory.max", "memory.current"), ""
    else:
        base, names, prefix = (
            "sys/fs/cgroup/memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_",
        )
    return {
        f"{base}/{folder}/{names[0]}": f"{limit}\n",
        f"{base}/{folder}/{names[1]}": f"{usage}\n",
        f"{base}/{folder}/memory.stat": f"{prefix}inactive_file {file}\n"
        f"{prefix}active_file {file}\n",
    }


OWN = {1: "7:cpu:/x\n5:memory:/a/b\n", 2: "0::/a/b\n"}


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_says_what_is_allowed_less_what_others_cannot_give(version, tmp_path):
    write(tmp_path, meminfo(8 * 10**9) | {"proc/self/cgroup": OWN[version]})
    assert read_signs(tmp_path).allowed is None
    write(tmp_path, group(version, "a/b", 5 * 10**9, 10**9))
    write(tmp_path, group(version, "a", 4 * 10**9, 10**9, file=300 * MB))
    assert read_signs(tmp_path).allowed == pytest.approx(3 * 10**9, abs=50 * MB)
    if version == 2:
        write(tmp_path, {"sys/fs/cgroup/a/memory.high": "2000000000\n"})
        assert read_signs(tmp_path).allowed == pytest.approx(10**9, abs=50 * MB)


def test_memory_is_short_where_machine_or_group_have_little_left(tmp_path):
    write(tmp_path, meminfo(8 * 10**9) | {"proc/self/cgroup": OWN[2]})
    assert read_signs(tmp_path).spare == pytest.approx(8 * 10**9 - 512 * MB, abs=MB)
    own = unreclaimable_bytes()
    write(tmp_path, group(2, "a/b", own + 1100 * MB, 10**9))
    assert read_signs(tmp_path).spare == pytest.approx(100 * MB - 128 * MB, abs=50 * MB)
    write(tmp_path, meminfo(300 * MB))
    assert read_signs(tmp_path).spare == pytest.approx(300 * MB - 512 * MB, abs=MB)


def test_waiting_is_that_of_the_own_group_where_it_is_told(tmp_path):
    write(tmp_path, meminfo(10**9) | {"proc/self/cgroup": OWN[2]})
    assert read_signs(tmp_path).stalled_s is None
    write(tmp_path, {"proc/pressure/memory": PRESSURE % 2_000_000})
    assert read_signs(tmp_path).stalled_s == 2
    write(tmp_path, {"sys/fs/cgroup/a/b/memory.pressure": PRESSURE % 3_000_000})
    assert read_signs(tmp_path).stalled_s == 2  # the root of all groups, not one
    write(tmp_path, {"sys/fs/cgroup/a/b/cgroup.type": "domain\n"})
    assert read_signs(tmp_path).stalled_s == 3


class Cache:
    def __init__(self):
        self.limits = []

    def limit(self, most):
        self.limits.append(most)
        return most


def test_the_cache_follows_and_the_reasons_are_counted(tmp_path):
    write(tmp_path, meminfo(8 * 10**9) | {"proc/self/cgroup": OWN[1]})
    write(tmp_path, group(1, "a/b", 2 * 10**9, 0))
    cache = Cache()
    watch = Watch(cache, report(), FLOOR, tmp_path)
    assert watch.watches == "cgroup limits"
    watch.look(0)
    assert (cache.limits, watch.gave_back()) == ([], "nothing")
    write(tmp_path, group(1, "a/b", report().total - SHARE // 2, 0))
    watch.look(0.5)
    watch.look(1.0)
    (only,) = cache.limits
    assert only == pytest.approx(SHARE // 2, abs=SHARE // 64)
    assert watch.counts == {"limit": 1}
    assert "of the cache's 320.00 MB: a cgroup's limit leaves" in watch.gave_back()


def test_where_nothing_is_told_nothing_happens_and_that_is_said(tmp_path):
    write(tmp_path, meminfo(8 * 10**9))
    before = threading.active_count()
    watch = Watch(Cache(), report(), FLOOR, tmp_path).start()
    assert (watch.watches, watch.gave_back()) == ("nothing", "nothing")
    assert threading.active_count() == before
    watch.close()


def test_a_watch_that_ended_with_an_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pressure, "PERIOD_S", 0.01)
    write(tmp_path, meminfo(8 * 10**9) | {"proc/pressure/memory": PRESSURE % 0})
    watch = Watch(Cache(), report(), FLOOR, tmp_path).start()
    (tmp_path / "proc/meminfo").unlink()
    for thread in watching():
        thread.join(10)
    assert "FileNotFoundError" in watch.gave_back()
    watch.close()


def test_a_watch_may_be_ended_from_its_own_thread(tmp_path, monkeypatch):
    # As happens where the garbage collector runs there and finds a model that nobody refers to.
    monkeypatch.setattr(pressure, "PERIOD_S", 0.01)
    write(tmp_path, meminfo(8 * 10**9) | {"proc/self/cgroup": OWN[1]})
    write(tmp_path, group(1, "a/b", 0, 0))
    cache = Cache()
    watch = Watch(cache, report(), FLOOR, tmp_path)
    cache.limit = lambda _: watch.close()
    watch.start()
    for thread in watching():
        thread.join(10)
    assert "limit 1" in watch.gave_back()


def watching():
    return [thread for thread in threading.enumerate() if thread.name == "zipmoe-memory"]


def test_a_model_watches_from_its_loading_to_its_end(tmp_path):
    store = write_store(tmp_path)
    before = len(watching())
    for ended_by in ("close", "forgotten"):
        loaded = zipmoe.load(store, memory="64GB", context=60)
        assert len(watching()) == before + 1
        engaged = loaded.runtime.engaged()
        assert engaged["watches"] != "nothing"
        assert engaged["gave_back"] == "nothing"
        if ended_by == "close":
            loaded.close()
            loaded.close()
        del loaded
        gc.collect()
        assert len(watching()) == before


def test_tokens_stay_the_same_when_a_limit_is_lowered_in_the_middle(tmp_path):
    store, root = write_store(tmp_path), tmp_path / "root"
    with zipmoe.load(store, memory="64GB", context=100) as loaded:
        runtime, whole = loaded.runtime, loaded.runtime.cache.slots
        expected = generate(loaded, "hello", max_tokens=24).token_ids
        write(root, meminfo(8 * 10**9) | {"proc/self/cgroup": OWN[1]})
        runtime.watch.close()
        share = runtime.report.cache
        runtime.watch = Watch(runtime.cache, runtime.report, share - share // 3, root)
        slots = []

        def lower(_):
            limit = runtime.report.total - len(slots) * share // 30
            write(root, group(1, "a/b", limit, 0))
            runtime.watch.look(float(len(slots)))
            slots.append(runtime.cache.slots)

        with torch.no_grad():
            answer = generate(loaded, "hello", max_tokens=24, on_text=lower)
        assert answer.token_ids == expected
        assert slots[0] == whole > slots[-1] >= 2
        assert len(set(slots)) > 3
        assert "a cgroup's limit leaves" in answer.engaged["gave_back"]
