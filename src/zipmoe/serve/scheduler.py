"""Requests → answers: continuous batching in two threads.

One thread reads prompts, in the order of arrival. The other steps all answers that have begun by
one token at a time; they join and leave between steps. Every distinct expert of a step is read
once for all (`Streams.decode`), and no answer's tokens depend on its neighbours.

What fails with one answer ends that one. What must not fail ends them all: the scheduler is then
broken, and says so.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from zipmoe import kv
from zipmoe._errors import CorruptError, FetchError
from zipmoe.serve.errors import (
    NO_READER,
    ServingError,
    broken,
    gone,
    queue_full,
    stopping,
    too_late,
    unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from zipmoe.serve.answer import Answer, Request
    from zipmoe.serve.limits import Limits
    from zipmoe.serve.metrics import Metrics
    from zipmoe.serve.popularity import Popularity
    from zipmoe.serve.room import KvRoom

__all__ = ["Scheduler", "Streams"]

_log = logging.getLogger(__name__)
_PROBE_S = 1.0  # between two looks whether the store can be read again
_READ_ERRORS = (FetchError, CorruptError)


class Streams(Protocol):
    """What is needed of `zipmoe.streams.Streams`."""

    def open(self) -> Any:
        """Begin an empty sequence: a stream, with `tokens` and `length`."""

    def prefill(self, stream: Any, token_ids: list[int]) -> Tensor:
        """Append tokens; give the logits [vocabulary] after the last one."""

    def decode(self, streams: list[Any], token_ids: list[int]) -> Tensor:
        """Append one token to each; give the logits [streams, vocabulary]."""

    def truncate(self, stream: Any, length: int) -> int:
        """Forget all but the first tokens; give how many are left."""

    def fork(self, stream: Any, length: int) -> Any:
        """Begin a sequence with a copy of another's first tokens; None: it cannot be."""

    def close(self, stream: Any) -> None:
        """Free its memory; a prefill of it in another thread ends with `kv.UnwantedError`."""


class Scheduler:
    """Takes requests and computes their answers until it is closed.

    room: the memory for KV caches. urgent: entered around each step, so that a prompt that is being
    read waits for it. probe: tokens to compute when the store could not be read, to see whether it
    can be again.
    """

    def __init__(
        self,
        streams: Streams,
        *,
        room: KvRoom,
        limits: Limits,
        metrics: Metrics,
        probe: Sequence[int],
        popularity: Popularity,
        urgent: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._streams, self._limits, self._metrics = streams, limits, metrics
        self._probe_tokens, self._urgent, self._popularity = list(probe), urgent, popularity
        self._room = room
        self._changed = threading.Condition()
        self._waiting: list[Answer] = []
        self._reading: Answer | None = None
        self._running: list[Answer] = []
        self._failure: BaseException | None = None
        self._unreadable: ServingError | None = None
        self._is_stopping = self._is_closed = False
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name)
            for name, work in (("prefill", self._read_prompts), ("decode", self._step_answers))
        ]
        for thread in self._threads:
            thread.start()

    # -- from any thread -------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Take a request; its sink hears of all that follows.

        Raises
        ------
        ServingError
            429 when too many wait, 503 when the server stops or has failed.
        """
        with self._changed:
            if self._failure is not None:
                raise broken(self._failure)
            if self._is_stopping:
                raise stopping(self._limits.grace)
            if len(self._waiting) + len(request.answers) > self._limits.queue:
                raise queue_full(len(self._waiting), self._retry_after())
            self._waiting += request.answers
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """End a request whose client has left; its memory is free within a step."""
        with self._changed:
            request.is_cancelled = True
            if self._reading is not None and self._reading.request is request:
                self._streams.close(self._reading.stream)  # or it would be read to its end
            self._changed.notify_all()

    def fits(self, prompt: int, answer: int) -> bool:
        """Tell whether so many tokens can ever be let in."""
        return self._room.fits(prompt, answer)

    def status(self) -> tuple[str, str | None]:
        """Say how it is: "ok", "unreadable", "stopping" or "broken", and why."""
        with self._changed:
            if self._failure is not None:
                return "broken", broken(self._failure).message
            if self._is_stopping:
                return "stopping", None
            if self._unreadable is not None:
                return "unreadable", self._unreadable.message
            return "ok", None

    def load(self) -> dict[str, int]:
        """Count answers waiting and running, and bytes of KV cache used and there."""
        with self._changed:
            return {
                "waiting": len(self._waiting),
                "running": len(self._running) + (self._reading is not None),
                "kv_used": self._room.used,
                "kv_total": self._room.total,
            }

    def stop(self) -> None:
        """Take no more requests; those taken go on."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def close(self) -> None:
        """End what is left with an error, and both threads. Idempotent."""
        with self._changed:
            self._is_stopping = self._is_closed = True
            if self._reading is not None:
                self._streams.close(self._reading.stream)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for answer in self._all():
            answer.fail(stopping(self._limits.grace))
            self._room.release(answer, keep=False)
        self._waiting, self._reading, self._running = [], None, []
        self._room.close()

    # -- the two threads -------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run a thread's work; if it fails, everybody hears of it."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - everybody is told
            _log.exception("the server's loop has failed")
            with self._changed:
                self._failure = self._failure or error
                self._is_closed = True
                self._changed.notify_all()
                # Their memory stays until `close`: the other thread may be at work on it.
                for answer in self._all():
                    answer.fail(broken(error))

    def _read_prompts(self) -> None:
        while not self._is_closed:
            answer = self._next_prompt()
            if answer is not None:
                self._read(answer)
            elif self._unreadable is not None:
                self._probe()

    def _next_prompt(self) -> Answer | None:
        """Wait for an answer whose turn it is and for which there is room; None: none for now."""
        with self._changed:
            while not self._is_closed:
                self._sweep(self._waiting)
                is_free = len(self._running) < self._limits.streams
                if self._waiting and is_free and self._room.admit(self._waiting[0]):
                    self._reading = self._waiting.pop(0)
                    self._metrics.admitted(self._reading.request)
                    return self._reading
                is_idle = not self._waiting and not self._running
                if not self._changed.wait(self._patience()) and is_idle:
                    return None
        return None

    def _read(self, answer: Answer) -> None:
        """Read a prompt and choose the first token."""
        rest = answer.request.prompt[answer.stream.length :]
        started = time.monotonic()
        try:
            logits = self._streams.prefill(answer.stream, rest)
        except _READ_ERRORS as error:
            self._failed(answer, error)
        except (kv.UnwantedError, ValueError):  # closed while it was read, or just before
            if not (answer.request.is_cancelled or self._is_closed):
                raise
            answer.fail(gone() if answer.request.is_cancelled else stopping(self._limits.grace))
        else:
            self._readable()
            self._popularity.note()
            self._metrics.prompt_read(answer.request, len(rest), time.monotonic() - started)
            self._took(answer, logits)
        with self._changed:
            self._reading = None
            if answer.is_over:
                self._leave(answer)
            else:
                self._running.append(answer)
            self._changed.notify_all()

    def _patience(self) -> float | None:
        """Seconds until something has to be done though nothing was heard of."""
        if self._unreadable is not None:
            return _PROBE_S
        ends = [answer.request.deadline for answer in self._waiting]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _probe(self) -> None:
        """Compute a token while nobody else wants one, to see whether the store can be read."""
        stream = self._streams.open()
        try:
            self._streams.prefill(stream, self._probe_tokens)
        except _READ_ERRORS:
            return
        finally:
            self._streams.close(stream)
        self._readable()

    def _step_answers(self) -> None:
        while batch := self._next_batch():
            started = time.monotonic()
            try:
                rows = list(self._decode(batch))
            except _READ_ERRORS:
                rows = self._one_by_one(batch)
            else:
                self._readable()
            self._metrics.stepped(len(batch), time.monotonic() - started)
            self._popularity.note()
            for answer, logits in zip(batch, rows, strict=True):
                if logits is not None:
                    self._took(answer, logits)
            with self._changed:
                self._drop(self._running)

    def _next_batch(self) -> list[Answer]:
        """Wait until there is an answer to go on with; give all of them. None: closed."""
        with self._changed:
            while not self._is_closed:
                self._sweep(self._running)
                if self._running:
                    return list(self._running)
                self._changed.wait()
        return []

    def _decode(self, batch: list[Answer]) -> Tensor:
        streams = [answer.stream for answer in batch]
        with self._urgent():
            return self._streams.decode(streams, [answer.tokens[-1] for answer in batch])

    def _one_by_one(self, batch: list[Answer]) -> list[Tensor | None]:
        """Repeat a step in which a read failed: it ends only those that need what is missing."""
        rows: list[Tensor | None] = []
        for answer in batch:
            try:
                rows.append(self._decode([answer])[0])
            except _READ_ERRORS as error:
                rows.append(None)
                self._failed(answer, error)
        return rows

    # -- what happens to an answer ---------------------------------------------------------------

    def _took(self, answer: Answer, logits: Tensor) -> None:
        now = time.monotonic()
        try:
            answer.take(logits)
        except ServingError as error:
            answer.fail(error)
            return
        self._metrics.token(answer, now)
        answer.last_at = now

    def _failed(self, answer: Answer, error: FetchError | CorruptError) -> None:
        """End an answer for which the store could not be read."""
        told = unreadable(error)
        answer.fail(told)
        with self._changed:
            self._unreadable = told

    def _readable(self) -> None:
        with self._changed:
            self._unreadable = None

    def _sweep(self, answers: list[Answer]) -> None:
        """End and drop those whose client has left or whose time is over."""
        now = time.monotonic()
        for answer in answers:
            if answer.request.is_cancelled:
                answer.fail(gone())
            elif now > answer.request.deadline:
                answer.fail(too_late(self._limits.seconds))
        self._drop(answers)

    def _drop(self, answers: list[Answer]) -> None:
        """Take those that are over off a list, and their memory back."""
        over = [answer for answer in answers if answer.is_over]
        answers[:] = [answer for answer in answers if not answer.is_over]
        for answer in over:
            self._leave(answer)
        if over:
            self._changed.notify_all()

    def _leave(self, answer: Answer) -> None:
        # After an error nobody knows what the stream holds.
        is_whole = answer.error is None or answer.error.status == NO_READER
        self._room.release(answer, keep=is_whole)

    def _all(self) -> list[Answer]:
        reading = [] if self._reading is None else [self._reading]
        return [*self._waiting, *reading, *self._running]

    def _retry_after(self) -> int:
        rounds = 1 + len(self._waiting) // self._limits.streams
        return max(1, round(self._metrics.mean_seconds() * rounds))
