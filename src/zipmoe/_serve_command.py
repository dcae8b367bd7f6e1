"""The command `zipmoe serve`: options → a server, or one sentence why there is none.

Support of `cli.py`.
"""

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ._options import Compute, Context, Memory, Store
from ._terminal import Terminal, reporting

_KEY = "ZIPMOE_API_KEY"
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


Conversations = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Conversations as long as the context that there is memory for; of shorter ones "
        "there is room for more. Requests wait for room.",
    ),
]
Host = Annotated[
    str,
    typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 lets other machines connect."),
]
Port = Annotated[
    int, typer.Option(min=0, max=65535, metavar="PORT", help="0 takes one that is free.")
]
Name = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What clients call the model. Default: the folder's name."),
]
Key = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with the key that clients must know. Default: the environment's "
        f"{_KEY}; without either, no key is asked for.",
    ),
]
Streams = Annotated[
    int, typer.Option(min=1, max=256, metavar="N", help="Answers that are written at once.")
]
Queue = Annotated[
    int, typer.Option(min=1, metavar="N", help="Answers that may wait; more are refused with 429.")
]
MaxTokens = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Most tokens of an answer whose request names no limit."),
]
MaxChoices = Annotated[int, typer.Option(min=1, metavar="N", help="Most answers of one request.")]
MaxBody = Annotated[int, typer.Option(min=1000, metavar="BYTES", help="Most bytes of one request.")]
Timeout = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", help="Most that one request may take.")
]
Grace = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="SECONDS",
        help="What running answers get to end when the server is told to stop.",
    ),
]


def serve(
    store: Store,
    *,
    memory: Memory = None,
    context: Context = None,
    conversations: Conversations = 2,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    api_key: Key = None,
    streams: Streams = 16,
    queue: Queue = 64,
    max_tokens: MaxTokens = 1024,
    max_choices: MaxChoices = 8,
    max_body: MaxBody = 4_000_000,
    timeout: Timeout = 3600.0,
    grace: Grace = 30.0,
    compute: Compute = "native",
) -> None:
    """Serve a packed model to clients of OpenAI's API, inside a memory budget.

    It also serves a page to chat and to watch the machine. Needs the extra `serve`:
    pip install 'zipmoe[serve]'. One line of JSON for each request goes to stderr. SIGTERM or Ctrl-C
    lets running answers end.

    \b
    Examples:
      zipmoe serve my-store --memory 8GB
      curl http://127.0.0.1:8000/v1/models
    """
    terminal = Terminal(as_json=False)
    with reporting(terminal):
        _check_extra()
        key = _key(api_key)
        from .serve.limits import Limits

        limits = Limits(
            streams=streams,
            queue=queue,
            choices=max_choices,
            body_bytes=max_body,
            answer_tokens=max_tokens,
            seconds=timeout,
            grace=grace,
        )
        _serve(
            terminal,
            store,
            (host, port),
            limits,
            name=name or store.resolve().name,
            key=key,
            memory=memory,
            context=context,
            conversations=conversations,
            streams=streams,
            compute=compute,
        )


def _check_extra() -> None:
    from ._errors import ZipmoeError

    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise ZipmoeError(
            f"serving needs {', '.join(missing)}: install it by pip install 'zipmoe[serve]'"
        )


def _key(file: Path | None) -> str | None:
    from ._errors import ZipmoeError

    key = os.environ.get(_KEY) if file is None else file.read_text(encoding="utf-8")
    if key is not None and not key.strip():
        raise ZipmoeError(f"the key in {_KEY if file is None else file} is empty")
    return key.strip() if key is not None else None


def _serve(
    terminal: Terminal,
    store: Path,
    address: tuple[str, int],
    limits: Any,
    *,
    name: str,
    key: str | None,
    **options: Any,
) -> None:
    from .serve import server

    with server.bound_socket(*address) as taken:
        from ._session import loaded_model
        from .serve.api import build
        from .serve.service import Service
        from .streams import Streams as ModelStreams

        host, port = address[0], taken.getsockname()[1]
        is_local = server.is_loopback(host)
        if key is None and not is_local:
            terminal.say(f"anybody who can reach {host} can use this server: there is no key")
        with loaded_model(terminal, store, **options) as loaded:
            service = Service(loaded, ModelStreams(loaded), name, limits)
            try:
                app = build(service, _line(terminal), key=key, is_local=is_local)
                shown = f"[{host}]" if ":" in host else host
                ready = f"ready: {name} at http://{shown}:{port}"
                server.run(app, service, taken, lambda: terminal.say(ready))
            finally:
                service.close()
    terminal.say("stopped")


def _line(terminal: Terminal) -> Any:
    """Make the function that says one line for each request."""

    def say(document: dict[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        terminal.say(json.dumps({"time": now, **document}))

    return say
