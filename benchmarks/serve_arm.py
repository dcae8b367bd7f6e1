"""The server's scheduler in a memory group, fed forced tokens by many requests at once.

Nothing of the server is left out but HTTP and text: answers are chosen by a list of tokens instead
of a sampler, so that what requests route to is known beforehand.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from engine import measured

import zipmoe
from zipmoe import _core, kv
from zipmoe._process import peak_rss_bytes
from zipmoe.serve.answer import Answer, Delta, Request
from zipmoe.serve.choose import Choice
from zipmoe.serve.limits import Limits
from zipmoe.serve.metrics import Metrics
from zipmoe.serve.popularity import Popularity
from zipmoe.serve.scheduler import Scheduler
from zipmoe.store import open_store
from zipmoe.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

EXTENT_0, EXTENT_1 = 11, 14  # columns of a store's expert table: lengths
PATIENCE_S = 600.0


class Forced:
    """Chooses the tokens of a list, one after the other; notes when."""

    is_complete = False

    def __init__(self, number: int, tokens: list[int], note: Callable[[int, int], None]) -> None:
        self.number, self._tokens, self._note = number, tokens, note

    def choose(self, logits: Tensor, answer: list[int]) -> Choice:
        int(logits.argmax())  # as a greedy answer does
        self._note(self.number, len(answer))
        return Choice(self._tokens[len(answer)])


class NoText:
    """Stands for the text of an answer."""

    def take(self, _: int) -> str:
        return "."

    def rest(self) -> str:
        return ""


class Steps(Metrics):
    """Also keeps when each step ended, of how many answers, and what had been counted then."""

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime, "benchmark")
        self.steps: list[tuple[float, int, dict[str, int]]] = []
        self.passes: list[tuple[str, int]] = []  # ("step", answers) or ("prompt", tokens)

    def stepped(self, batch: int, seconds: float) -> None:
        super().stepped(batch, seconds)
        self.steps.append((time.perf_counter(), batch, self.counters()))

    def prompt_read(self, request: Request, computed: int, seconds: float) -> None:
        super().prompt_read(request, computed, seconds)
        self.prompt_seconds = seconds


class Served:
    """Joins the group that `processes` names ("": none), loads, and schedules."""

    def __init__(
        self,
        processes: str,
        store: str,
        *,
        memory: int | str | None,
        context: int,
        streams: int,
        threads: int,
    ) -> None:
        if processes:
            Path(processes).write_text(str(os.getpid()))
        torch.set_num_threads(threads)
        _core.set_num_threads(threads)
        self.loaded = zipmoe.load(
            store, memory=memory, context=context, conversations=streams, streams=streams
        )
        with open_store(Path(store)) as opened:
            table = opened.expert_table()[1]
        first = (table[:, 0] == 0) & (table[:, 1] == 0)
        self.record_bytes = int(table[first][:, [EXTENT_0, EXTENT_1]].sum())
        self.steps = Steps(self.loaded.runtime)
        self.noted: list[tuple[int, int, float]] = []  # request, tokens before, when
        self.number = 0
        popularity = Popularity(self.loaded.runtime.source)
        engine = self.loaded.runtime.source.engine
        self.scheduler = Scheduler(
            Streams(self.loaded),
            kv_tokens=streams * kv.room(context),
            limits=Limits(streams=streams),
            metrics=self.steps,
            probe=[0],
            popularity=popularity,
            urgent=engine.urgent,
        )

    def decode(self, prompts: list[list[int]], answers: list[list[int]], skipped: int,
               timed: int) -> dict[str, Any]:
        """Let requests run side by side; time some steps in which all of them take part."""
        first = self.number
        self.noted.clear()
        self.steps.steps.clear()
        with measured() as usage:
            requests = [self._submit(p, a) for p, a in zip(prompts, answers, strict=True)]
            self._until(lambda: self._together(len(prompts)) > skipped + timed)
            for request in requests:
                self.scheduler.cancel(request)
            self._until(lambda: not self.scheduler.load()["running"])
        whole = [step for step in self.steps.steps if step[1] == len(prompts)]
        begin, end = whole[skipped - 1], whole[skipped + timed - 1]
        noted = [(number - first, at) for number, at, when in self.noted if when < end[0] + 1.0]
        return {
            "seconds": end[0] - begin[0],
            "steps": [later[0] - earlier[0] for earlier, later in zip(
                whole[skipped - 1 :], whole[skipped : skipped + timed], strict=False)],
            "counters": {name: end[2][name] - begin[2][name] for name in end[2]},
            "noted": noted,
            "foreign_share": usage.foreign_share,
        }
