"""The least makespan of small instances by trying everything, and what list scheduling promises.

Two machines: ours (`zipmoe.schedule`), and the paper's (`Staged`), as docs/planning.md has them.
"""

import heapq
from dataclasses import dataclass
from itertools import permutations

from zipmoe.schedule import by_johnson, in_sequence

TINY = 1e-9


def least_end(chains, workers, limit):
    """Least end of chains of parts (time from which it can be done, length of a piece, pieces).

    Some schedule of least end begins its pieces in some order, each on the worker that is free
    first: every such order is tried, unless it cannot come below `limit`.
    """
    best = limit
    after = [
        [sum(p * n for _, p, n in chain[i + 1 :]) for i in range(len(chain))] for chain in chains
    ]

    def descend(state, free, last_start, end):
        nonlocal best
        left = sum(
            after[c][part] + (chains[c][part][2] - begun) * chains[c][part][1]
            for c, (part, begun, _) in enumerate(state)
            if part < len(chains[c])
        )
        if max(end, (sum(free) + left) / workers) >= best - TINY:
            return
        begun_all = True
        for c, (part, begun, since) in enumerate(state):
            if part == len(chains[c]):
                continue
            begun_all = False
            ready, piece, pieces = chains[c][part]
            start = max(free[0], ready, since)
            if start < last_start:
                continue
            stop = start + piece
            step = (part, begun + 1, since) if begun + 1 < pieces else (part + 1, 0, stop)
            descend(
                (*state[:c], step, *state[c + 1 :]),
                sorted([*free[1:], stop]),
                start,
                max(end, stop),
            )
        if begun_all:
            best = end

    descend(tuple((0, 0, 0.0) for _ in chains), [0.0] * workers, 0.0, 0.0)
    return best


def optimum(tasks, workers):
    """Least makespan of our machine, each expert's missing bytes read in one go."""
    unread = [i for i, task in enumerate(tasks) if task.read_s]
    best = float("inf")
    for order in permutations(unread):
        now, chains = 0.0, [[] for _ in tasks]
        for i in [*order, *(i for i in range(len(tasks)) if i not in unread)]:
            for part in tasks[i].parts:
                now += part.read_s
                ready = now if part.read_s else 0.0
                chains[i].append((ready, part.work_s / part.pieces, part.pieces))
        best = least_end(chains, workers, best)
    return best


def any_order_bound(tasks, workers):
    """Theorem 1: R + W/L + (1 - 1/L) c."""
    read = sum(task.read_s for task in tasks)
    work = sum(task.work_s for task in tasks) / workers
    return read + work + (1 - 1 / workers) * longest_chain(tasks)


def johnson_bound(tasks, workers):
    """Theorem 2: the flow in Johnson's order + (1 - 1/L)(g + c)."""
    joined = in_sequence(tasks, by_johnson(tasks, workers), workers).span_s
    begun = max(
        task.parts[0].work_s / task.parts[0].pieces + sum(part.work_s for part in task.parts[1:])
        for task in tasks
    )
    return joined + (1 - 1 / workers) * (begun + longest_chain(tasks))


def longest_chain(tasks):
    return max(sum(part.work_s / part.pieces for part in task.parts) for task in tasks)


@dataclass(frozen=True)
class Staged:
    """An expert on the paper's machine."""

    read_s: float  # of its sign-mantissas, by the reading thread
    piece_s: float  # of one decoding with its read, by a worker
    pieces: int
    multiply_s: float  # by the accelerator


def staged_makespan(tasks, order, workers):
    """List scheduling on the paper's machine: everyone takes the first of the order, at once."""
    free, read, ready = [0.0] * workers, 0.0, []
    for i in order:
        decoded = 0.0
        for _ in range(tasks[i].pieces):
            stop = heapq.heappop(free) + tasks[i].piece_s
            heapq.heappush(free, stop)
            decoded = max(decoded, stop)
        if tasks[i].read_s:
            read += tasks[i].read_s
            decoded = max(decoded, read)
        ready.append((decoded, tasks[i].multiply_s))
    return _multiplied(ready)


def staged_optimum(tasks, workers):
    """Least makespan of the paper's machine.

    Pieces have no ready times, so the workers' schedules are the orders of experts' pieces.
    """
    pieces = [i for i, task in enumerate(tasks) for _ in range(task.pieces)]
    unread = [i for i, task in enumerate(tasks) if task.read_s]
    best = float("inf")
    for worked in set(permutations(pieces)):
        free, decoded = [0.0] * workers, [0.0] * len(tasks)
        for i in worked:
            stop = heapq.heappop(free) + tasks[i].piece_s
            heapq.heappush(free, stop)
            decoded[i] = max(decoded[i], stop)
        for order in permutations(unread):
            now, ready = 0.0, list(decoded)
            for i in order:
                now += tasks[i].read_s
                ready[i] = max(ready[i], now)
            multiply = [task.multiply_s for task in tasks]
            best = min(best, _multiplied(zip(ready, multiply, strict=True)))
    return best


def _multiplied(ready):
    end = 0.0
    for since, seconds in sorted(ready):
        end = max(end, since) + seconds
    return end
