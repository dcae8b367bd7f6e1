"""A conversation in the terminal: lines typed by a person -> streamed answers, turn after turn.

Support of `cli.py`. Knows how a conversation is kept inside the context; knows nothing of how
tokens are made.
"""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._errors import FetchError, ZipmoeError
from .generate import generate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._terminal import Terminal
    from .model import Loaded

GREETING = "Type a message. Ctrl-C stops an answer, /new begins again, /exit or Ctrl-D leaves."
Message = dict[str, str]


class Chat:
    """One conversation. `options` go to `generate`: max_tokens, temperature, seed."""

    def __init__(
        self, terminal: Terminal, loaded: Loaded, *, system: str | None = None, **options: Any
    ) -> None:
        self._terminal, self._loaded, self._options = terminal, loaded, options
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []

    def run(self) -> None:
        """Talk until the person leaves."""
        if not getattr(self._loaded.tokenizer, "chat_template", None):
            raise ZipmoeError(
                "this model has no chat template: use `zipmoe generate`, which continues a text"
            )
        self._terminal.say(GREETING)
        while (line := self._read()) is not None:
            if line == "/new":
                self._turns.clear()
                self._terminal.say("(a new conversation)")
            elif line.startswith("/") and " " not in line:
                self._terminal.say(f"(no command {line}; there are /new and /exit)")
            elif line:
                self._turn(line)

    def _read(self) -> str | None:
        """Return the next line, or None when the person leaves."""
        while True:
            try:
                line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
            except EOFError:
                self._terminal.say("")
                return None
            except KeyboardInterrupt:
                self._terminal.say("\n(/exit or Ctrl-D leaves)")
                continue
            if line == "" and not sys.stdin.isatty():
                return None
            line = line.strip()
            return None if line in {"/exit", "/quit"} else line

    def _turn(self, line: str) -> None:
        self._turns.append({"role": "user", "content": line})
        if not self._fit():
            self._turns.pop()
            return
        with _stop_on_interrupt() as stopped:
            try:
                result = generate(
                    self._loaded,
                    [*self._opening, *self._turns],
                    on_text=self._terminal.write,
                    stop=stopped.__len__,
                    **self._options,
                )
            except FetchError as error:  # one read failed; the engine and the conversation live on
                self._terminal.say(f"\nzipmoe: {error}; ask again")
                self._turns.pop()
                return
        self._terminal.write("\n")
        if stopped:
            self._terminal.say("(stopped)")
        self._turns.append({"role": "assistant", "content": result.text})

    def _fit(self) -> bool:
        """Drop the oldest turns until question and answer fit into the context; say so."""
        context, longest = self._loaded.context, self._options["max_tokens"]
        room = context - min(longest, context // 2)
        dropped = 0
        while self._tokens() > room and len(self._turns) > 1:
            del self._turns[:2]
            dropped += 1
        if dropped:
            turns = "turn does" if dropped == 1 else f"{dropped} turns do"
            self._terminal.say(f"(the oldest {turns} not fit into the context and are forgotten)")
        if self._tokens() <= room:
            return True
        self._terminal.say(
            f"(too long: {self._tokens()} tokens, and {context - room} for an answer, exceed the "
            f"context of {context}; shorten it, or use --context)"
        )
        return False

    def _tokens(self) -> int:
        encoded = self._loaded.tokenizer.apply_chat_template(
            [*self._opening, *self._turns], add_generation_prompt=True, return_dict=True
        )
        return len(encoded["input_ids"])


@contextmanager
def _stop_on_interrupt() -> Iterator[list[int]]:
    """While inside, Ctrl-C fills the list that is given, and interrupts nothing by force.

    A second Ctrl-C before the answer has stopped is an ordinary one.
    """
    signals: list[int] = []

    def note(number: int, _frame: object) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)
