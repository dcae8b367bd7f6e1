"""A socket → a server that runs until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from zipmoe._errors import ZipmoeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi import FastAPI

    from zipmoe.serve.service import Service

__all__ = ["bound_socket", "is_loopback", "run"]

_LAST_WORDS_S = 2.0  # for the streams that were ended to be sent


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach that address."""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def bound_socket(host: str, port: int) -> socket.socket:
    """Take an address, before anything slow is done. Nobody can connect yet.

    Raises
    ------
    ZipmoeError
        It is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise ZipmoeError(
                f"port {port} of {host} is taken: stop what uses it, or choose another by --port"
            ) from error
        raise ZipmoeError(f"cannot listen at {host}, port {port}: {error}") from error
    return taken


class _Server(uvicorn.Server):
    """Gives running answers the grace that they have when it is told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], Any]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGTERM and SIGINT; unlike uvicorn's, do not die of them when all is done."""
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
        _tell_systemd("READY=1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.scheduler.stop()
        _tell_systemd("STOPPING=1")
        ending = asyncio.create_task(self._end_after_grace())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_after_grace(self) -> None:
        await asyncio.sleep(self._service.limits.grace)
        await asyncio.to_thread(self._service.close)


def _tell_systemd(state: str) -> None:
    """Tell the service manager, if one has started this process and wants to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(state.encode(), address.replace("@", "\0", 1))


def run(app: FastAPI, service: Service, taken: socket.socket, ready: Callable[[], Any]) -> None:
    """Serve until SIGTERM or SIGINT; running answers then have the grace to end.

    taken: of `bound_socket`. ready: called when clients can connect.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=round(service.limits.grace + _LAST_WORDS_S),
    )
    _Server(config, service, ready).run(sockets=[taken])
