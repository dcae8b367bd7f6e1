"""The memory for KV caches: set aside for answers, or kept for a next turn.

An answer is let in when its whole length fits, so that none has to be thrown out half-way. What
an answer has filled is kept when it ends, for a request that continues it, as long as nobody
needs the room. What one that is being written shares with a new prompt is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zipmoe.serve.answer import Answer
    from zipmoe.serve.scheduler import Streams

__all__ = ["KvRoom"]


LEAST_SHARED = 16  # tokens of a running answer's cache that are worth a copy


class KvRoom:
    """Shares out `total` bytes. size: bytes for so many tokens. Not for several threads at once."""

    def __init__(self, streams: Streams, total: int, size: Callable[[int], int]) -> None:
        self._streams, self.total, self._size = streams, total, size
        self._reserved = 0
        self._given: list[Any] = []  # streams of answers that are being written
        self._kept: list[Any] = []  # streams, the longest unused first

    @property
    def used(self) -> int:
        """Bytes set aside or kept."""
        return self._reserved + sum(self._size(stream.length) for stream in self._kept)

    @property
    def reserved(self) -> int:
        """Bytes set aside for answers that are being written."""
        return self._reserved

    def fits(self, prompt: int, answer: int) -> bool:
        """Tell whether a prompt and an answer of so many tokens can ever be let in."""
        return self._size(prompt + answer) <= self.total

    def admit(self, answer: Answer) -> bool:
        """Give the answer a stream and set its bytes aside, if there is room for it.

        The stream holds as much of the prompt as a kept one shares with it, or one of an answer
        that is being written. Kept conversations make room, the longest unused first.
        """
        prompt = answer.request.prompt
        need = self._size(len(prompt) + answer.max_tokens)
        if self._reserved + need > self.total:
            return False
        stream = self._take_kept(prompt)
        while self._kept and self.used + need > self.total:
            self._streams.close(self._kept.pop(0))
        self._reserved += need
        answer.reserved = need
        answer.stream = stream or self._copy_given(prompt) or self._streams.open()
        self._given.append(answer.stream)
        if answer.index == 0:  # the others' prompt is that of the first
            answer.request.cached_tokens = answer.stream.length
        return True

    def release(self, answer: Answer, *, keep: bool) -> None:
        """Take an answer's stream and bytes back; `keep` it for a request that continues it."""
        stream, answer.stream = answer.stream, None
        self._reserved -= answer.reserved
        answer.reserved = 0
        if stream is None:
            return
        self._given.remove(stream)
        if keep and stream.length and self.used + self._size(stream.length) <= self.total:
            self._kept.append(stream)
        else:
            self._streams.close(stream)

    def close(self) -> None:
        """Let go of every kept conversation."""
        while self._kept:
            self._streams.close(self._kept.pop())

    def _take_kept(self, prompt: Sequence[int]) -> Any:
        """Take the kept stream that shares most with the prompt, cut to what is shared.

        One that shares less than half of what it holds stays: it is another conversation, whose
        turn may come again. The prompt's last token is always left to compute: its logits are
        wanted.
        """
        best, most = None, 0
        for stream in self._kept:
            shared = _shared(stream.tokens, prompt[:-1])
            if shared > most and 2 * shared >= stream.length:
                best, most = stream, shared
        if best is not None:
            self._kept.remove(best)
            self._streams.truncate(best, most)
        return best

    def _copy_given(self, prompt: Sequence[int]) -> Any:
        """Copy what a running answer's stream shares with the prompt, another answer to it, say."""
        shares = [(_shared(stream.tokens, prompt[:-1]), stream) for stream in self._given]
        most, best = max(shares, key=lambda pair: pair[0], default=(0, None))
        return self._streams.fork(best, most) if most >= LEAST_SHARED else None


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
