"""One answer in the making: logits → tokens → pieces of text, until something ends it.

A request has `n` of these. Whatever decides about an answer is its own: sampling, stop texts,
grammar, limit. So nothing of it depends on who else is served.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zipmoe.serve.pieces import Pieces, StopTexts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from zipmoe.serve.choose import Choice, Chooser
    from zipmoe.serve.errors import ServingError

__all__ = ["Answer", "Delta", "Request"]


@dataclass(frozen=True)
class Delta:
    """What is new of an answer. Its last one has a `finish` ("stop" or "length") or an `error`."""

    index: int
    text: str = ""
    choices: tuple[Choice, ...] = ()
    finish: str | None = None
    error: ServingError | None = None

    @property
    def is_last(self) -> bool:
        """Tell whether nothing follows."""
        return self.finish is not None or self.error is not None


@dataclass
class Request:
    """A prompt and what is wanted. `sink` takes what is new, from the threads that compute."""

    id: str
    prompt: list[int]
    sink: Callable[[Delta], object]
    deadline: float = float("inf")  # of time.monotonic()
    arrived: float = field(default_factory=time.monotonic)
    answers: list[Answer] = field(default_factory=list)
    is_cancelled: bool = False
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    queued_s: float | None = None
    first_token_s: float | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens of all its answers."""
        return sum(len(answer.tokens) for answer in self.answers)


class Answer:
    """One of a request's answers.

    index: its place among them. max_tokens: most tokens. ends: tokens that end it. tokens: those
    chosen so far, an ending one included.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        max_tokens: int,
        ends: frozenset[int],
        chooser: Chooser,
        pieces: Pieces,
        stops: Sequence[str] = (),
    ) -> None:
        self.request, self.index, self.max_tokens = request, index, max_tokens
        self.tokens: list[int] = []
        self.stream: Any = None  # its KV cache, while it has one
        self.reserved = 0  # tokens of KV cache set aside for it
        self.last_at = 0.0
        self._ends, self._chooser = ends, chooser
        self._pieces, self._stops = pieces, StopTexts(stops)
        self.is_over = False  # its last piece has been given away
        self.error: ServingError | None = None
        self._untold: list[Choice] = []

    def take(self, logits: Tensor) -> None:
        """Choose the next token by `logits` [vocabulary], and give away what text is certain."""
        choice = self._chooser.choose(logits, self.tokens)
        self.tokens.append(choice.token)
        if choice.token in self._ends:
            self._end(self._stops.rest(self._pieces.rest()), "stop")
            return
        self._untold.append(choice)
        text, is_stopped = self._stops.take(self._pieces.take(choice.token))
        if not is_stopped and self._chooser.is_complete:
            text, is_stopped = text + self._stops.rest(self._pieces.rest()), True
        if is_stopped:
            self._end(text, "stop")
        elif len(self.tokens) >= self.max_tokens:
            self._end(text + self._stops.rest(self._pieces.rest()), "length")
        elif text:
            self._tell(Delta(self.index, text, self._told()))

    def fail(self, error: ServingError) -> None:
        """End it with an error, unless it has ended."""
        if not self.is_over:
            self.is_over, self.error = True, error
            self._tell(Delta(self.index, error=error))

    def _end(self, text: str, finish: str) -> None:
        self.is_over = True
        self._tell(Delta(self.index, text, self._told(), finish=finish))

    def _told(self) -> tuple[Choice, ...]:
        told, self._untold = tuple(self._untold), []
        return told

    def _tell(self, delta: Delta) -> None:
        self.request.sink(delta)
