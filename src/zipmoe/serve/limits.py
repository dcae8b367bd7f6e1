"""What the server allows. One place for every limit that a request can run into."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Limits of one server.

    streams: answers that are written at once. queue: answers that may wait for their turn.
    choices: most of one request (`n`). body_bytes: most of one request's body. answer_tokens: most
    of an answer whose request names no limit. seconds: how long a request may take in all, waiting
    included. grace: seconds that running answers get when the server stops.
    """

    streams: int = 16
    queue: int = 64
    choices: int = 8
    body_bytes: int = 4_000_000
    answer_tokens: int = 1024
    seconds: float = 3600.0
    grace: float = 30.0
