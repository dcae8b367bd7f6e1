"""What a client can be told: a status, and an error in the shape of OpenAI's.

Messages name no path: a client has no business with the server's disk.
"""

from __future__ import annotations

import os
from typing import Any

from zipmoe._errors import CorruptError, FetchError

__all__ = [
    "NO_READER",
    "ServingError",
    "broken",
    "gone",
    "no_model",
    "queue_full",
    "refused",
    "stopping",
    "too_late",
    "too_long",
    "unreadable",
]

# Nobody reads what this status says: it is for the log line of a request whose client has left.
NO_READER = 499


class ServingError(Exception):
    """A request ends with this. `body` is what the client gets, `status` its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The document of the response."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def refused(param: str, why: str) -> ServingError:
    """Refuse a field that cannot be honoured."""
    return ServingError(400, f"{param}: {why}", param=param, code="unsupported_value")


def too_long(param: str, prompt: int, answer: int, why: str) -> ServingError:
    """Refuse a prompt, or prompt and answer, that can never fit."""
    return ServingError(
        400,
        f"the prompt has {prompt} tokens and the answer may have {answer}: {why}",
        param=param,
        code="context_length_exceeded",
    )


def no_model(asked: str, served: str) -> ServingError:
    """Refuse a model that is not the one served."""
    return ServingError(
        404,
        f"there is no model {asked!r} here; there is {served!r}",
        param="model",
        code="model_not_found",
    )


def queue_full(waiting: int, retry_after: int) -> ServingError:
    """Refuse a request when too many wait."""
    return ServingError(
        429,
        f"{waiting} requests are waiting already; try again in about {retry_after} s",
        kind="rate_limit_error",
        code="queue_full",
        retry_after=retry_after,
    )


def stopping(grace: float) -> ServingError:
    """Refuse or end a request because the server stops."""
    return ServingError(
        503,
        "the server is stopping",
        kind="server_error",
        code="stopping",
        retry_after=max(1, round(grace)),
    )


def too_late(seconds: float) -> ServingError:
    """End a request that took too long."""
    return ServingError(
        503,
        f"the answer was not complete after {seconds:g} s, the most that this server allows",
        kind="server_error",
        code="timeout",
    )


def gone() -> ServingError:
    """End a request whose client has left."""
    return ServingError(NO_READER, "the client has closed the connection", kind="client_error")


def broken(error: BaseException) -> ServingError:
    """End a request because the server's own loop has failed."""
    return ServingError(
        503,
        f"the server has failed ({type(error).__name__}) and must be started again",
        kind="server_error",
        code="broken",
    )


def unreadable(error: FetchError | CorruptError) -> ServingError:
    """End a request for which the store could not be read."""
    if isinstance(error, CorruptError):
        place = f"layer {error.layer}, expert {error.expert}"
        why = f"a record of the store is damaged ({place}): run `zipmoe verify`"
    else:
        why = "the store could not be read"
        if error.errno:
            why += f" ({os.strerror(error.errno)})"
    return ServingError(
        503, f"{why}; try again", kind="server_error", code="store_unreadable", retry_after=5
    )
