"""The tokens that there is KV cache for: set aside for answers, or kept for a next turn.

An answer is let in when its whole length fits, so that none has to be thrown out half-way. What
an answer has filled is kept when it ends, for a request that continues it, as long as nobody
needs the room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zipmoe import kv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zipmoe.serve.answer import Answer
    from zipmoe.serve.scheduler import Streams

__all__ = ["KvRoom"]


class KvRoom:
    """Shares out `total` tokens. Not for several threads at once."""

    def __init__(self, streams: Streams, total: int) -> None:
        self._streams, self.total = streams, total
        self._reserved = 0
        self._kept: list[Any] = []  # streams, the longest unused first

    @property
    def used(self) -> int:
        """Tokens set aside or kept."""
        return self._reserved + sum(kv.room(stream.length) for stream in self._kept)

    @property
    def reserved(self) -> int:
        """Tokens set aside for answers that are being written."""
        return self._reserved

    def fits(self, prompt: int, answer: int) -> bool:
        """Tell whether a prompt and an answer of so many tokens can ever be let in."""
        return kv.room(prompt + answer) <= self.total

    def admit(self, answer: Answer) -> bool:
        """Give the answer a stream and set its tokens aside, if there is room for it.

        The stream holds as much of the prompt as a kept one shares with it. Kept conversations
        make room, the longest unused first.
        """
        need = kv.room(len(answer.request.prompt) + answer.max_tokens)
        if self._reserved + need > self.total:
            return False
        stream = self._take_kept(answer.request.prompt)
        while self._kept and self.used + need > self.total:
            self._streams.close(self._kept.pop(0))
        self._reserved += need
        answer.reserved = need
        answer.stream = stream if stream is not None else self._streams.open()
        answer.request.cached_tokens = max(answer.request.cached_tokens, answer.stream.length)
        return True

    def release(self, answer: Answer, *, keep: bool) -> None:
        """Take an answer's stream and tokens back; `keep` it for a request that continues it."""
        stream, answer.stream = answer.stream, None
        self._reserved -= answer.reserved
        answer.reserved = 0
        if stream is None:
            return
        if keep and stream.length and self.used + kv.room(stream.length) <= self.total:
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


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
