"""Who may ask, and how much they may send. Plain ASGI, before anything is parsed."""

from __future__ import annotations

import hmac
import json
import re
from typing import TYPE_CHECKING, Any

from zipmoe.serve.errors import ServingError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

__all__ = ["BodyLimit", "KeyRequired", "LoopbackOnly", "respond"]

_LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}


async def respond(error: ServingError, send: Send) -> None:
    """Send an error as a whole response."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= {name.lower(): value for name, value in error.headers.items()}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


class KeyRequired:
    """Lets those in who know the key; `open_paths` are for everybody."""

    def __init__(self, app: App, key: str, open_paths: frozenset[str]) -> None:
        self._app, self._key, self._open = app, key.encode(), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in self._open or self._knows(scope):
            await self._app(scope, receive, send)
            return
        why = "this server asks for a key: send it as `Authorization: Bearer KEY`"
        error = ServingError(401, why, kind="authentication_error", code="invalid_api_key")
        await respond(error, send)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # Takes as long whatever the key has in common with ours.
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


class LoopbackOnly:
    """Refuses requests that name another host than this machine, as a web page's would."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 400."""
        if scope["type"] == "http" and not _names_loopback(scope):
            why = "this server answers only to localhost: it was started for this machine alone"
            await respond(ServingError(400, why, code="invalid_host"), send)
            return
        await self._app(scope, receive, send)


def _names_loopback(scope: Scope) -> bool:
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    return re.sub(r":\d*$", "", host).lower() in _LOOPBACK


class BodyLimit:
    """Refuses bodies above `most` bytes with 413, whether or not their length is announced."""

    def __init__(self, app: App, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body read, or answer 413."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = bytearray(), not (announced.isdigit() and int(announced) > self._most)
        is_too_large = not more
        while more and not is_too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            is_too_large = len(body) > self._most
        if is_too_large:
            await respond(ServingError(413, f"a body may have {self._most} bytes"), send)
            return
        is_given = False

        async def replayed() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replayed, send)
