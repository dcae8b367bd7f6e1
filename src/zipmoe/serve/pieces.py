"""Tokens → pieces of text that will not change any more, and the texts that end an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Pieces", "StopTexts"]

_UNFINISHED = "\ufffd"  # what half a character decodes to


class Pieces:
    """The text of one answer, token by token. keeps_special: special tokens are text too."""

    def __init__(self, tokenizer: Any, *, keeps_special: bool = False) -> None:
        self._tokenizer, self._skips = tokenizer, not keeps_special
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode = DecodeStream(skip_special_tokens=self._skips)
        self._tokens: list[int] = []
        self._told = ""

    def take(self, token: int) -> str:
        """Give the text that this token makes certain, often none."""
        self._tokens.append(token)
        if self._backend is not None:
            piece = self._decode.step(self._backend, token) or ""
        else:
            text = self._whole()
            piece = "" if text.endswith(_UNFINISHED) else text[len(self._told) :]
        self._told += piece
        return piece

    def rest(self) -> str:
        """Give what is left at the end: half a character, say."""
        text = self._whole()
        rest = text[len(self._told) :] if text.startswith(self._told) else ""
        self._told += rest
        return rest

    def _whole(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=self._skips))


class StopTexts:
    """Holds text back while it may be the beginning of one of the texts that end an answer."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def take(self, piece: str) -> tuple[str, bool]:
        """Give the text that is free to go, and whether a stop text was met; it is left out."""
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            free, self._held = self._held[: min(found)], ""
            return free, True
        kept = max((self._overlap(stop) for stop in self._stops), default=0)
        at = len(self._held) - kept
        free, self._held = self._held[:at], self._held[at:]
        return free, False

    def rest(self, piece: str = "") -> str:
        """Give what was held back, and a last piece: the answer ends without more text."""
        free, _ = self.take(piece)
        rest, self._held = self._held, ""
        return free + rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of what is held that begins `stop`."""
        most = min(len(stop) - 1, len(self._held))
        return next((size for size in range(most, 0, -1) if self._held.endswith(stop[:size])), 0)
