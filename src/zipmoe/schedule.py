"""The experts of one layer's call → an order, and what time they take in it. Pure.

The machine: one drive that serves one read after the other, and identical workers that decode and
multiply. An expert's *parts* (gate and up, then down) can be computed once they are in memory and
those before them are done; each is cut into pieces of equal length, and a worker does one piece
after the other without a break. The drive reads, and free workers choose, in one order of experts:
*list scheduling*, where nobody idles who could do something.

The order is Johnson's. docs/planning.md proves how far from the least makespan it can be.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "Flow",
    "Part",
    "Schedule",
    "Span",
    "Task",
    "Tier",
    "by_blocks",
    "by_johnson",
    "flow",
    "in_sequence",
    "least_makespan",
    "longest_first",
    "simulate",
]


class Tier(Enum):
    """What of an expert is in memory."""

    FULL = "full"  # decoded
    COMPRESSED = "compressed"
    SIGN_MANTISSA = "sign-mantissa"
    EXPONENTS = "exponents"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Part:
    """One part of an expert: what the drive and the workers have to do for it."""

    read_s: float  # 0 where nothing is missing
    work_s: float  # of one worker that does all pieces
    pieces: int = 1


@dataclass(frozen=True, slots=True)
class Task:
    """An activated expert."""

    tier: Tier
    parts: tuple[Part, ...]

    @property
    def read_s(self) -> float:
        """What the drive has to do."""
        return sum(part.read_s for part in self.parts)

    @property
    def work_s(self) -> float:
        """What the workers have to do, all of them together."""
        return sum(part.work_s for part in self.parts)


@dataclass(frozen=True, slots=True)
class Flow:
    """Work seen as if every part could be shared by all workers to any fineness.

    `span_s` is the time from the first read to the end of the last work. Flows can be joined, so
    that a thousand experts cost as little as one.
    """

    read_s: float = 0.0
    work_s: float = 0.0  # of all workers at once
    span_s: float = 0.0

    def then(self, other: Flow) -> Flow:
        """Join two: the drive begins the second when it is done with the first."""
        return Flow(
            self.read_s + other.read_s,
            self.work_s + other.work_s,
            max(self.span_s + other.work_s, self.read_s + other.span_s),
        )

    def times(self, count: float) -> Flow:
        """Join equal ones; `count` is 0, or 1 and more."""
        if not count:
            return Flow()
        longer = max(self.read_s, self.work_s)
        return Flow(self.read_s * count, self.work_s * count, self.span_s + longer * (count - 1))

    @property
    def johnson_key(self) -> tuple[bool, float]:
        """Sort by this, and the joined span is least.

        First what keeps workers longer than the drive, by how soon they can begin; then the rest,
        by how long they go on after its last read.
        """
        if self.read_s <= self.work_s:
            return False, self.span_s - self.work_s
        return True, self.read_s - self.span_s


def flow(task: Task, workers: int) -> Flow:
    """See a task as a flow."""
    parts = [
        Flow(part.read_s, part.work_s / workers, part.read_s + part.work_s / workers)
        for part in task.parts
    ]
    return reduce(Flow.then, parts)


def by_johnson(tasks: Sequence[Task], workers: int) -> list[int]:
    """Give the order of least flow: resident experts first, of the others those soonest read."""
    return sorted(range(len(tasks)), key=lambda i: flow(tasks[i], workers).johnson_key)


def by_blocks(tasks: Sequence[Task], workers: int) -> list[int]:
    """Give the paper's order: blocks of one expert whose sign-mantissas must be read, and others.

    A block takes up others while its reads last at least as long as its work. Longest first on
    both sides; when one side is used up, the other follows.
    """
    longest = longest_first(tasks)
    unread = {Tier.EXPONENTS, Tier.ABSENT}
    missing = [i for i in longest if tasks[i].tier in unread]
    others = [i for i in longest if tasks[i].tier not in unread]
    order: list[int] = []
    while missing and others:
        block = [missing.pop(0)]
        while others and _is_read_longer([tasks[i] for i in block], workers):
            block.append(others.pop(0))
        order += block
    return order + missing + others


def _is_read_longer(block: Iterable[Task], workers: int) -> bool:
    return sum(task.read_s - task.work_s / workers for task in block) >= 0


def longest_first(tasks: Sequence[Task]) -> list[int]:
    """Give the order by work, the most first."""
    return sorted(range(len(tasks)), key=lambda i: -tasks[i].work_s)


def in_sequence(tasks: Sequence[Task], order: Iterable[int], workers: int) -> Flow:
    """Join the flows of all tasks in an order."""
    return reduce(Flow.then, (flow(tasks[i], workers) for i in order), Flow())


def least_makespan(tasks: Sequence[Task], workers: int) -> float:
    """Give a time below which no schedule comes that reads each expert in one go."""
    joined = in_sequence(tasks, by_johnson(tasks, workers), workers).span_s
    return max([joined, *(_alone(task, workers) for task in tasks)])


def _alone(task: Task, workers: int) -> float:
    read = done = 0.0
    for part in task.parts:
        read += part.read_s
        rounds = -(-part.pieces // workers)
        done = max(read, done) + rounds * part.work_s / part.pieces
    return done


@dataclass(frozen=True, slots=True)
class Span:
    """A read, or a piece of work."""

    task: int
    part: int
    start_s: float
    end_s: float
    worker: int = -1  # of work


@dataclass(frozen=True, slots=True)
class Schedule:
    """What happens when."""

    reads: tuple[Span, ...]
    work: tuple[Span, ...]

    @property
    def makespan_s(self) -> float:
        """Time at which the last work ends."""
        return max((span.end_s for span in self.work), default=0.0)


def simulate(tasks: Sequence[Task], order: Sequence[int], workers: int) -> Schedule:
    """Run list scheduling: whoever is free takes the first of the order that can be done."""
    reads, read_end = _read(tasks, order)
    rank = {task: number for number, task in enumerate(order)}
    coming = [(read_end[task, 0], rank[task], 0) for task in order if tasks[task].parts]
    heapq.heapify(coming)  # parts by the time from which they can be done
    ready: list[tuple[int, int, int]] = []  # (rank, part, pieces begun)
    free = [(0.0, worker) for worker in range(workers)]
    work = []
    while coming or ready:
        now, worker = heapq.heappop(free)
        while coming and coming[0][0] <= now:
            _, place, number = heapq.heappop(coming)
            heapq.heappush(ready, (place, number, 0))
        if not ready:
            heapq.heappush(free, (coming[0][0], worker))
            continue
        place, number, begun = heapq.heappop(ready)
        task = order[place]
        part = tasks[task].parts[number]
        end = now + part.work_s / part.pieces
        work.append(Span(task, number, now, end, worker))
        heapq.heappush(free, (end, worker))
        if begun + 1 < part.pieces:
            heapq.heappush(ready, (place, number, begun + 1))
        elif number + 1 < len(tasks[task].parts):
            since = max(end, read_end[task, number + 1])
            heapq.heappush(coming, (since, place, number + 1))
    return Schedule(tuple(reads), tuple(work))


def _read(
    tasks: Sequence[Task], order: Sequence[int]
) -> tuple[list[Span], dict[tuple[int, int], float]]:
    """Read in order. Gives also from when each part is in memory, 0 where nothing was missing."""
    reads, read_end, now = [], {}, 0.0
    for task in order:
        for number, part in enumerate(tasks[task].parts):
            read_end[task, number] = 0.0
            if part.read_s:
                reads.append(Span(task, number, now, now + part.read_s))
                now += part.read_s
                read_end[task, number] = now
    return reads, read_end
