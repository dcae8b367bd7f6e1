"""A conversation in the terminal: lines typed by a person -> streamed answers, turn after turn.

Support of `cli.py`. Knows how a conversation is kept inside the context; knows nothing of how
tokens are made.
"""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ._errors import FetchError, ZipmoeError
from .generate import generate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._terminal import Terminal
    from .generate import GenerateResult
    from .model import Loaded

GREETING = "Type a message. Ctrl-C stops an answer, /new begins again, /exit or Ctrl-D leaves."
Message = dict[str, str]


class Chat:
    """One conversation. `options` go to `generate`: max_tokens, temperature, seed.

    `after` is told of each answer.
    """

    def __init__(
        self,
        terminal: Terminal,
        loaded: Loaded,
        *,
        system: str | None = None,
        after: Callable[[GenerateResult], object] = lambda _: None,
        **options: Any,
    ) -> None:
        self._after = after
        self._terminal, self._loaded, self._options = terminal, loaded, options
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []
        self._interrupts = _Interrupts()

    def run(self) -> None:
        """Talk until the person leaves."""
        if not getattr(self._loaded.tokenizer, "chat_template", None):
            raise ZipmoeError(
                "this model has no chat template: use `zipmoe generate`, which continues a text"
            )
        with suppress(ImportError):
            import readline  # noqa: F401, PLC0415 - gives input() a history and editing

        self._terminal.say(GREETING)
        with self._interrupts:
            while self._step():
                pass

    def _step(self) -> bool:
        """Read a line and do what it asks; say whether the conversation goes on."""
        try:
            line = self._read()
            if line == "/new":
                self._turns.clear()
                self._terminal.say("(a new conversation)")
            elif line is not None and line.startswith("/") and " " not in line:
                self._terminal.say(f"(no command {line}; there are /new and /exit)")
            elif line:
                self._turn(line)
        except KeyboardInterrupt:  # at the prompt, or a second one during an answer
            self._interrupts.count = 0
            self._forget_open_question()
            self._terminal.say("\n(/exit or Ctrl-D leaves)")
            return True
        return line is not None

    def _read(self) -> str | None:
        """Return the next line, or None when the person leaves."""
        with self._interrupts.waiting():
            try:
                line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
            except EOFError:
                self._terminal.say("")
                return None
        if line == "" and not sys.stdin.isatty():
            return None
        line = line.strip()
        return None if line in {"/exit", "/quit"} else line

    def _turn(self, line: str) -> None:
        self._turns.append({"role": "user", "content": line})
        if not self._fit():
            self._forget_open_question()
            return
        try:
            result = generate(
                self._loaded,
                [*self._opening, *self._turns],
                on_text=self._terminal.write,
                stop=lambda: self._interrupts.count,
                **{**self._options, "max_tokens": self._room()},
            )
        except FetchError as error:  # one read failed; the engine and the conversation live on
            self._forget_open_question()
            self._terminal.say(f"\nzipmoe: {error}; ask again")
            return
        self._terminal.write("\n")
        if self._interrupts.count:
            self._terminal.say("(stopped)")
        self._turns.append({"role": "assistant", "content": result.text})
        self._after(result)

    def _forget_open_question(self) -> None:
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()

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

    def _room(self) -> int:
        """Count the tokens that the answer may have."""
        return min(int(self._options["max_tokens"]), self._loaded.context - self._tokens())

    def _tokens(self) -> int:
        encoded = self._loaded.tokenizer.apply_chat_template(
            [*self._opening, *self._turns], add_generation_prompt=True, return_dict=True
        )
        return len(encoded["input_ids"])


class _Interrupts:
    """Ctrl-C while inside: raises at the prompt, and otherwise is counted.

    Whoever generates asks for the count between tokens, where stopping leaves everything whole. A
    second one before that raises too.
    """

    def __init__(self) -> None:
        self.count = 0
        self._raises = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: object) -> None:
        self.count += 1
        if self._raises or self.count > 1:
            raise KeyboardInterrupt

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While inside, a person is asked for a line."""
        self.count, self._raises = 0, True
        try:
            yield
        finally:
            self._raises = False
