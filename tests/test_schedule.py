"""Schedules are possible, nobody idles without a reason, and their length keeps what is proved."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
from optimum import (
    TINY,
    Staged,
    any_order_bound,
    johnson_bound,
    optimum,
    staged_makespan,
    staged_optimum,
)

from zipmoe.schedule import (
    Part,
    Schedule,
    Task,
    Tier,
    by_blocks,
    by_johnson,
    flow,
    in_sequence,
    least_makespan,
    longest_first,
    simulate,
)

ORDERS = {
    "johnson": by_johnson,
    "blocks": by_blocks,
    "longest first": lambda tasks, _: longest_first(tasks),
    "fifo": lambda tasks, _: list(range(len(tasks))),
}


def instance(rng):
    """Experts of all tiers, alike or not, on one to four workers."""
    workers = rng.randint(1, 4)
    alike = rng.random() < 0.5
    read, work = 10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-1, 1)
    pieces = rng.choice([1, 1, 1, 2])
    tasks = []
    for _ in range(rng.randint(1, 5 if pieces == 1 else 3)):
        tier = rng.choice(list(Tier))
        missing = {Tier.ABSENT: 1.0, Tier.EXPONENTS: 0.75, Tier.SIGN_MANTISSA: 0.25}.get(tier, 0.0)
        scale = (1.0, 1.0) if alike else (10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-1, 1))
        parts = [
            Part(missing * read * scale[0] * size, work * scale[1] * size, pieces)
            for size in ((2.0, 1.0) if rng.random() < 0.8 else (3.0,))
        ]
        tasks.append(Task(tier, tuple(parts)))
    return tasks, workers


def instances(seed, count):
    rng = random.Random(seed)
    return [instance(rng) for _ in range(count)]


def faults(tasks, schedule, workers):
    """What of a schedule is impossible, or idle without a reason."""
    lanes = [schedule.reads]
    lanes += [[s for s in schedule.work if s.worker == worker] for worker in range(workers)]
    found = [f"two things at once: {pair}" for lane in lanes for pair in overlaps(lane)]
    read_s = sum(span.end_s - span.start_s for span in schedule.reads)
    if read_s < max((span.end_s for span in schedule.reads), default=0) - TINY:
        found.append("the drive idled")
    since = ready_times(tasks, schedule)
    for span in schedule.work:
        ready = since[span.task, span.part]
        waited = span.start_s - ready
        busy = sum(
            max(0, min(s.end_s, span.start_s) - max(s.start_s, ready)) for s in schedule.work
        )
        if waited < -TINY:
            found.append(f"too early: {span}")
        elif busy < workers * waited - TINY:
            found.append(f"a worker idled before {span}")
    for (task, part), pieces in pieces_done(schedule).items() ^ pieces_due(tasks).items():
        found.append(f"{pieces} pieces of {task}, {part}")
    return found


def overlaps(lane):
    spans = sorted(lane, key=lambda span: (span.start_s, span.end_s))
    return [pair for pair in pairwise(spans) if pair[1].start_s < pair[0].end_s - TINY]


def pieces_done(schedule):
    return Counter((span.task, span.part) for span in schedule.work)


def pieces_due(tasks):
    return {
        (i, j): part.pieces for i, task in enumerate(tasks) for j, part in enumerate(task.parts)
    }


def ready_times(tasks, schedule):
    read = {(span.task, span.part): span.end_s for span in schedule.reads}
    since = {}
    for number, task in enumerate(tasks):
        done = 0.0
        for index in range(len(task.parts)):
            since[number, index] = max(done, read.get((number, index), 0.0))
            ends = [s.end_s for s in schedule.work if (s.task, s.part) == (number, index)]
            done = max([done, *ends])
    return since


def breaches(tasks, workers, schedule, best):
    """What a schedule that claims to be list scheduling in Johnson's order does not keep."""
    made = schedule.makespan_s
    joined = in_sequence(tasks, by_johnson(tasks, workers), workers).span_s
    found = faults(tasks, schedule, workers)
    found += ["below the optimum"] * (made < best - TINY or joined > best + TINY)
    found += ["(3 - 1/L) optimum"] * (made > (3 - 1 / workers) * best + TINY)
    found += ["theorem 1"] * (made > any_order_bound(tasks, workers) + TINY)
    found += ["theorem 2"] * (made > johnson_bound(tasks, workers) + TINY)
    return found


def survey(cases):
    """Check every order of every case; give the worst ratio to the optimum of each order."""
    worst = dict.fromkeys(ORDERS, 1.0)
    for tasks, workers in cases:
        best = optimum(tasks, workers)
        assert least_makespan(tasks, workers) <= best + TINY
        for name, order in ORDERS.items():
            schedule = simulate(tasks, order(tasks, workers), workers)
            found = breaches(tasks, workers, schedule, best)
            assert set(found) <= ({"theorem 2"} if name != "johnson" else set())
            worst[name] = max(worst[name], schedule.makespan_s / best)
    return worst


def test_small_instances_keep_the_bounds_against_the_optimum():
    survey(instances(seed=1, count=150))


@pytest.mark.soak
def test_thousands_of_small_instances_keep_the_bounds_against_the_optimum(soak_record):
    cases = instances(soak_record.seed, 5000)
    worst = {name: round(ratio, 3) for name, ratio in survey(cases).items()}
    soak_record("makespan against the optimum, worst ratio", instances=len(cases), **worst)


def one_worker_only(tasks, order, workers):
    return simulate(tasks, order, 1)


def after_the_last_read(tasks, order, workers):
    """Nobody begins before everything is read."""
    made, read = simulate(tasks, order, workers), sum(task.read_s for task in tasks)
    resident = [
        Task(task.tier, tuple(Part(0, part.work_s, part.pieces) for part in task.parts))
        for task in tasks
    ]
    late = simulate(resident, order, workers).work
    return Schedule(
        made.reads,
        tuple(replace(s, start_s=s.start_s + read, end_s=s.end_s + read) for s in late),
    )


def a_pause_after_each_piece(tasks, order, workers):
    slow = [
        Task(task.tier, tuple(replace(part, work_s=2 * part.work_s) for part in task.parts))
        for task in tasks
    ]
    made = simulate(slow, order, workers)
    return Schedule(
        made.reads, tuple(replace(s, end_s=(s.start_s + s.end_s) / 2) for s in made.work)
    )


@pytest.mark.parametrize("idler", [one_worker_only, after_the_last_read, a_pause_after_each_piece])
def test_a_scheduler_that_idles_a_worker_on_purpose_is_found(idler):
    met = Counter()
    for tasks, workers in instances(seed=2, count=60):
        schedule = idler(tasks, by_johnson(tasks, workers), workers)
        met.update(
            word.split(" before")[0]
            for word in breaches(tasks, workers, schedule, optimum(tasks, workers))
        )
    assert met["a worker idled"] > 20
    if idler is one_worker_only:
        assert met["(3 - 1/L) optimum"]
    assert met["theorem 2"]


def test_a_schedule_that_is_impossible_is_found():
    tasks, workers = [Task(Tier.ABSENT, (Part(2, 1), Part(1, 1)))], 1
    good = simulate(tasks, [0], workers)
    assert faults(tasks, good, workers) == []
    assert [s.start_s for s in good.work] == [2, 3]
    moved = [replace(s, start_s=s.start_s - 1, end_s=s.end_s - 1) for s in good.work]
    for work, why in [
        (moved, "too early"),
        (good.work[:1], "pieces of 0, 1"),
        ([replace(s, start_s=2, end_s=4) for s in good.work], "two things at once"),
    ]:
        assert any(why in word for word in faults(tasks, Schedule(good.reads, tuple(work)), 1))
    late = tuple(replace(s, start_s=s.start_s + 1, end_s=s.end_s + 1) for s in good.reads)
    assert "the drive idled" in faults(tasks, Schedule(late, good.work), 1)


def test_downs_are_read_while_gate_and_up_are_multiplied():
    tasks = [Task(Tier.ABSENT, (Part(2, 2), Part(1, 1)))]
    assert simulate(tasks, [0], 1).makespan_s == 5
    whole = [Task(Tier.ABSENT, (Part(3, 3),))]
    assert simulate(whole, [0], 1).makespan_s == 6


def test_resident_experts_are_multiplied_while_the_first_miss_is_read():
    tasks = [Task(Tier.ABSENT, (Part(4, 1),)), Task(Tier.COMPRESSED, (Part(0, 3),))]
    for order in ([0, 1], [1, 0]):
        assert simulate(tasks, order, 1).makespan_s == 5


def test_johnsons_order_has_the_least_flow_of_all_orders():
    for tasks, workers in instances(seed=3, count=200):
        least = min(
            in_sequence(tasks, order, workers).span_s for order in permutations(range(len(tasks)))
        )
        found = in_sequence(tasks, by_johnson(tasks, workers), workers).span_s
        assert found == pytest.approx(least)


def test_one_worker_takes_exactly_as_long_as_the_flow():
    for tasks, _ in instances(seed=4, count=100):
        order = by_johnson(tasks, 1)
        made = simulate(tasks, order, 1).makespan_s
        assert made == pytest.approx(in_sequence(tasks, order, 1).span_s)


def test_equal_tasks_join_at_once_as_they_do_one_by_one():
    for tasks, workers in instances(seed=5, count=50):
        for task in tasks:
            same = in_sequence([task] * 7, range(7), workers)
            at_once = flow(task, workers).times(7)
            for name in ("read_s", "work_s", "span_s"):
                assert getattr(at_once, name) == pytest.approx(getattr(same, name))
            assert flow(task, workers).times(0).span_s == 0


def test_blocks_take_turns_while_reads_last_longer_than_work():
    missing = Task(Tier.ABSENT, (Part(3, 1),))
    held = Task(Tier.COMPRESSED, (Part(0, 1.5),))
    longer = Task(Tier.SIGN_MANTISSA, (Part(0.5, 2),))
    tasks = [held, missing, held, missing, longer, held]
    assert by_blocks(tasks, 1) == [1, 4, 0, 3, 2, 5]
    assert by_blocks([missing, missing], 1) == [0, 1]


def test_the_papers_machine_keeps_the_papers_bound():
    rng = random.Random(6)
    worst = 0.0
    for _ in range(150):
        workers, pieces = rng.randint(1, 3), rng.choice([1, 2])
        tasks = [
            Staged(
                rng.choice([0.0, 10 ** rng.uniform(-1, 1)]),
                10 ** rng.uniform(-1, 1),
                rng.choice([0, pieces]),
                10 ** rng.uniform(-1, 1),
            )
            for _ in range(rng.randint(1, 3))
        ]
        best = staged_optimum(tasks, workers)
        for order in permutations(range(len(tasks))):
            made = staged_makespan(tasks, order, workers)
            assert best - TINY <= made <= (3 - 1 / workers) * best + TINY
            worst = max(worst, made / best)
    assert worst > 1.2  # the instances are not all trivial
