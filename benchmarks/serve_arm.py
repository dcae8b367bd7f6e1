"""The server's scheduler in a memory group, with many requests at once whose tokens are forced.

Nothing of the server is left out but HTTP and text: answers are chosen from a list of tokens
instead of by a sampler, so that what they route to follows from their topic.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from engine import measured

import zipmoe
from zipmoe import _core
from zipmoe._process import peak_rss_bytes
from zipmoe.recording import RoutingRecording
from zipmoe.routing import save_trace
from zipmoe.serve.answer import Answer, Request
from zipmoe.serve.choose import Choice, likeliest
from zipmoe.serve.limits import Limits
from zipmoe.serve.metrics import Metrics
from zipmoe.serve.popularity import Popularity
from zipmoe.serve.room import KvRoom
from zipmoe.serve.scheduler import Scheduler
from zipmoe.store import open_store
from zipmoe.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PATIENCE_S = 900.0
BEFORE_A_PROMPT = 8  # tokens of each running answer, before the long prompt comes
EXTENT_0, EXTENT_1 = 11, 14  # columns of a store's expert table: lengths


class Forced:
    """Chooses the tokens of a list, one after the other; notes when. Stands for text, too."""

    is_complete = False

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.times = tokens, list[float]()

    def choose(self, logits: Tensor, answer: list[int]) -> Choice:
        likeliest(logits.float())  # as for a greedy answer
        self.times.append(time.perf_counter())
        return Choice(self.tokens[len(answer)])

    def take(self, _: int) -> str:
        return "."

    def rest(self) -> str:
        return ""


class Passes(Metrics):
    """Keeps when a step has ended, and what had been counted then."""

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime, "benchmark")
        self.steps: list[dict[str, Any]] = []
        self.prompts: list[float] = []  # seconds

    def stepped(self, batch: int, seconds: float) -> None:
        super().stepped(batch, seconds)
        counters = self.counters()
        self.steps.append({"at": time.perf_counter(), "batch": batch, "counters": counters})

    def prompt_read(self, request: Request, computed: int, seconds: float) -> None:
        super().prompt_read(request, computed, seconds)
        self.prompts.append(seconds)


class Served:
    """Joins the group that `processes` names ("": none), loads a store, and schedules."""

    def __init__(
        self,
        processes: str,
        store: str,
        *,
        memory: int | str | None,
        context: int,
        conversations: int,
        streams: int,
        threads: int,
    ) -> None:
        if processes:
            Path(processes).write_text(str(os.getpid()))
        torch.set_num_threads(threads)
        _core.set_num_threads(threads)
        self.loaded = zipmoe.load(
            store, memory=memory, context=context, conversations=conversations, streams=streams
        )
        runtime = self.loaded.runtime
        self.passes, self.live = Passes(runtime), Streams(self.loaded)
        self.scheduler = Scheduler(
            self.live,
            room=KvRoom(self.live, self.loaded.memory.kv, runtime.stream_bytes),
            limits=Limits(streams=streams),
            metrics=self.passes,
            probe=[0],
            popularity=Popularity(runtime.source),
            urgent=runtime.source.engine.urgent,
        )

    def decode(
        self, prompts: list[list[int]], answers: list[list[int]], skipped: int, timed: int
    ) -> dict[str, Any]:
        """Write answers side by side; time steps in which all take part, after `skipped` of them.

        positions: of each answer, the tokens it had when these steps began.
        """
        self.passes.steps.clear()
        with measured() as usage:
            asked = [self._submit(*pair) for pair in zip(prompts, answers, strict=True)]
            self._until(lambda: len(self._whole(len(asked))) > skipped + timed)
        self._end(asked)
        steps = self._whole(len(asked))[skipped : skipped + timed + 1]
        begin, end = steps[0], steps[-1]
        return {
            "seconds": [
                later["at"] - earlier["at"] for earlier, later in itertools.pairwise(steps)
            ],
            "counters": {
                name: end["counters"][name] - count for name, count in begin["counters"].items()
            },
            # Chosen just after the step that began the window.
            "positions": [1 + sum(at < begin["at"] for at in one.times) for _, one in asked],
            "prompt_tokens": len(prompts[0]),
            "foreign_share": usage.foreign_share,
        }

    def fill(self) -> None:
        """Bring all experts into memory, as far as there is room."""
        cache = self.loaded.runtime.cache
        for number, layer in enumerate(self.loaded.runtime.source.layers):
            cache.prefetch(number, list(range(layer.experts)))
            room = np.empty(layer.shapes[0], np.uint16)
            for expert in range(layer.experts):
                cache.decode(number, expert, 0, room)

    def read(self, prompt: list[int]) -> float:
        """Read a prompt; seconds."""
        asked = self._submit(prompt, prompt[:1])
        self._until(lambda: bool(asked[1].times))
        self._end([asked])
        return self.passes.prompts[-1]

    def gaps(
        self, prompts: list[list[int]], answers: list[list[int]], long: list[int], alone: int
    ) -> dict[str, Any]:
        """Read a long prompt alone, then beside running answers.

        Gaps between their tokens before it (`alone` of each), and while it is read, in seconds.
        """
        self.read(long)  # experts are as they are after a prompt
        prompt_alone = self.read(long[::-1])
        with measured() as usage:
            asked = [self._submit(*pair) for pair in zip(prompts, answers, strict=True)]
            most = BEFORE_A_PROMPT + alone
            self._until(lambda: all(len(one.times) > most for _, one in asked))
            begin = time.perf_counter()
            late = self._submit(long, long[:1])
            self._until(lambda: bool(late[1].times))
            end = time.perf_counter()
        self._end([*asked, late])
        times = [one.times for _, one in asked]
        before = [gap for one in times for gap in gaps_of(one[BEFORE_A_PROMPT:], 0.0, begin)]
        during = [gap for one in times for gap in gaps_of(one, begin, end)]
        return {
            "prompt_alone_s": prompt_alone,
            "prompt_s": self.passes.prompts[-1],
            "gap_alone_s": statistics.median(before),
            "gap_s": statistics.median(during),
            "longest_gap_s": max(during),
            "gaps": len(during),
            "foreign_share": usage.foreign_share,
        }

    def record(self, sequences: list[list[int]], path: str) -> None:
        """Note which experts the tokens of each sequence choose, in a routing trace."""
        with RoutingRecording(self.loaded.model, self.loaded.runtime.source) as recording:
            for tokens in sequences:
                stream = self.live.open()
                self.live.prefill(stream, tokens)
                self.live.close(stream)
            stream = self.live.open()  # a trace has a decode step
            self.live.prefill(stream, [0])
            self.live.decode([stream], [0])
            self.live.close(stream)
        save_trace(recording.trace(), path)

    def facts(self) -> dict[str, Any]:
        runtime = self.loaded.runtime
        with open_store(Path(runtime.folder)) as store:
            table = store.expert_table()[1]
        first = (table[:, 0] == 0) & (table[:, 1] == 0)
        return {
            "memory": self.loaded.memory.as_dict(),
            "slots": runtime.cache.slots,
            "record_bytes": int(table[first][:, [EXTENT_0, EXTENT_1]].sum()),
            "policy": runtime.cache.policy,
            "engaged": runtime.engaged(),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def close(self) -> None:
        self.scheduler.close()
        self.loaded.close()

    def _submit(self, prompt: list[int], tokens: list[int]) -> tuple[Request, Forced]:
        forced = Forced(tokens)
        request = Request(str(len(prompt)), prompt, sink=lambda _: None)
        request.answers.append(
            Answer(
                request,
                0,
                max_tokens=len(tokens),
                ends=frozenset(),
                chooser=forced,
                pieces=forced,
            )
        )
        self.scheduler.submit(request)
        return request, forced

    def _whole(self, batch: int) -> list[dict[str, Any]]:
        return [step for step in self.passes.steps if step["batch"] == batch]

    def _until(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not is_so():
            if time.monotonic() > end or self.scheduler.status()[0] != "ok":
                raise RuntimeError(f"the scheduler stands still: {self.scheduler.status()}")
            time.sleep(0.02)

    def _end(self, asked: list[tuple[Request, Forced]]) -> None:
        for request, _ in asked:
            self.scheduler.cancel(request)
        self._until(lambda: not self.scheduler.load()["running"])


def gaps_of(times: list[float], begin: float, end: float) -> list[float]:
    """Give the gaps between neighbours that lie between two moments."""
    pairs = itertools.pairwise(times)
    return [later - earlier for earlier, later in pairs if begin <= earlier and later <= end]
