"""The HTTP side: routes, streams, errors, and one log line for each request."""

from __future__ import annotations

import asyncio
import json
import time
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest  # noqa: TC002 - FastAPI reads it

from zipmoe import __version__
from zipmoe.serve import schemas
from zipmoe.serve.errors import NO_READER, ServingError, no_model
from zipmoe.serve.listener import Listener
from zipmoe.serve.machine import Machine
from zipmoe.serve.security import BodyLimit, KeyRequired, LoopbackOnly

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from zipmoe.serve.answer import Delta, Request
    from zipmoe.serve.documents import ChatWriter, TextWriter
    from zipmoe.serve.service import Service

__all__ = ["build"]

KEEP_ALIVE_S = 5.0  # a stream says that it lives when it has said nothing for so long
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.ErrorBody, "description": "Not honoured, or too long"},
    401: {"model": schemas.ErrorBody, "description": "The key is missing or wrong"},
    404: {"model": schemas.ErrorBody, "description": "No such model"},
    413: {"model": schemas.ErrorBody, "description": "The body is too large"},
    422: {"model": schemas.ErrorBody, "description": "A field is wrong"},
    429: {"model": schemas.ErrorBody, "description": "Too many requests wait; see Retry-After"},
    503: {"model": schemas.ErrorBody, "description": "The store cannot be read, or the end"},
}
_STREAM: dict[str, Any] = {"text/event-stream": {}}


def build(
    service: Service, log: Callable[[dict[str, Any]], None], *, key: str | None, is_local: bool
) -> FastAPI:
    """Make the application.

    key: what clients must know, None for no key. is_local: only this machine can connect; then
    requests that name another host are refused, so that no web page can talk to it.
    """
    app = FastAPI(
        title="zipmoe",
        version=__version__,
        description="OpenAI's API. Fields that are not listed are refused by name.",
        docs_url=None,
        redoc_url=None,
    )
    _tell_errors(app, log)
    _add_answers(app, service, log)
    _add_information(app, service)
    page = resources.files("zipmoe.serve") / "page"
    app.mount("/", StaticFiles(directory=str(page), html=True), name="page")
    app.add_middleware(BodyLimit, most=service.limits.body_bytes)
    if key is not None:
        names = [f"/{path.name}" for path in page.iterdir()]
        app.add_middleware(KeyRequired, key=key, open_paths=frozenset(["/", "/health", *names]))
    if is_local:
        app.add_middleware(LoopbackOnly)
    return app


def _add_answers(app: FastAPI, service: Service, log: Callable[[dict[str, Any]], None]) -> None:
    async def answered(asked: Any, http: HttpRequest) -> Response:
        listener = Listener()
        request, writer = await asyncio.to_thread(service.request, asked, listener.sink)
        service.scheduler.submit(request)
        listener.watch(http.receive, lambda: service.scheduler.cancel(request))
        exchange = _Exchange(service, request, writer, listener, log)
        if not asked.stream:
            return await exchange.whole()
        has_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return await exchange.stream(has_usage=has_usage)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": schemas.Chat, "content": _STREAM}, **_ERRORS},
    )
    async def chat(asked: schemas.ChatRequest, http: HttpRequest) -> Response:
        """Answer the last message of a conversation."""
        return await answered(asked, http)

    @app.post(
        "/v1/completions",
        response_model=None,
        responses={200: {"model": schemas.Completion, "content": _STREAM}, **_ERRORS},
    )
    async def completion(asked: schemas.CompletionRequest, http: HttpRequest) -> Response:
        """Continue a text."""
        return await answered(asked, http)


class _Exchange:
    """One request from the first delta to the log line."""

    def __init__(
        self,
        service: Service,
        request: Request,
        writer: ChatWriter | TextWriter,
        listener: Listener,
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self._service, self._request, self._writer = service, request, writer
        self._listener, self._log = listener, log
        self._left = len(request.answers)
        self._finishes: list[str] = []

    async def whole(self) -> Response:
        """Wait for all of it."""
        deltas: list[Delta] = []
        try:
            while self._left:
                deltas.append(await self._next())
        except ServingError as error:
            self._end(error)
            return _failed(error)
        except asyncio.CancelledError:
            self._end(_cut())
            raise
        self._end(None)
        return JSONResponse(self._writer.document(deltas))

    async def stream(self, *, has_usage: bool) -> Response:
        """Wait for a first sign, so that an error has a status of its own; then stream."""
        try:
            first = await self._next(KEEP_ALIVE_S)
        except ServingError as error:
            self._end(error)
            return _failed(error)
        except asyncio.CancelledError:
            self._end(_cut())
            raise
        events = self._events(first, has_usage=has_usage)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def _events(self, delta: Delta | None, *, has_usage: bool) -> AsyncIterator[str]:
        usage = {"usage": None} if has_usage else {}
        ended: ServingError | None = _cut()
        try:
            for answer in self._request.answers:
                if opening := self._writer.opening(answer.index):
                    yield _event(opening | usage)
            while True:
                if delta is None:
                    yield ": still at work\n\n"
                else:
                    for chunk in self._writer.chunks(delta):
                        yield _event(chunk | usage)
                if not self._left:
                    break
                delta = await self._next(KEEP_ALIVE_S)
            if has_usage:
                yield _event(self._writer.usage_chunk())
            yield "data: [DONE]\n\n"
            ended = None
        except ServingError as error:
            ended = error
            yield _event(error.body)
        finally:
            self._end(ended)

    async def _next(self, patience: float | None = None) -> Any:
        """Give the next delta; None: nothing came for `patience` seconds."""
        delta = await self._listener.next(patience)
        if delta is not None:
            if delta.error is not None:
                raise delta.error
            if delta.finish is not None:
                self._left -= 1
                self._finishes.append(delta.finish)
        return delta

    def _end(self, error: ServingError | None) -> None:
        self._listener.close()
        self._service.scheduler.cancel(self._request)  # whatever of it is still at work
        request = self._request
        reason = error.code or error.kind if error else ",".join(sorted(set(self._finishes)))
        self._service.metrics.ended(request, reason)
        seconds = time.monotonic() - request.arrived
        line = {
            "request": request.id,
            "status": error.status if error else 200,
            "ended": reason,
            "prompt_tokens": len(request.prompt),
            "cached_tokens": request.cached_tokens,
            "completion_tokens": request.completion_tokens,
            "queued_s": _rounded(request.queued_s),
            "first_token_s": _rounded(request.first_token_s),
            "seconds": _rounded(seconds),
        }
        self._log(line)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _cut() -> ServingError:
    return ServingError(NO_READER, "the client has left", kind="client_error", code="gone")


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _failed(error: ServingError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _add_information(app: FastAPI, service: Service) -> None:
    machine = Machine(service)
    lossy = service.loaded.runtime.lossy
    model = schemas.Model(
        id=service.name,
        created=service.created,
        max_model_len=service.loaded.context,
        lossy=lossy.brief() if lossy else None,
    )

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> schemas.Models:
        """List the model that is served."""
        return schemas.Models(data=[model])

    @app.get("/v1/models/{name}", responses={401: _ERRORS[401], 404: _ERRORS[404]})
    async def one_model(name: str) -> schemas.Model:
        """Describe the model that is served."""
        if name != service.name:
            raise no_model(name, service.name)
        return model

    @app.get("/health", responses={503: {"model": schemas.Health}})
    async def health(response: Response) -> schemas.Health:
        """Say whether requests are answered."""
        status, reason = service.scheduler.status()
        response.status_code = 200 if status == "ok" else 503
        return schemas.Health(status=status, reason=reason)  # type: ignore[arg-type]

    @app.get(
        "/metrics",
        response_model=None,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Give what Prometheus collects."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/machine", responses={401: _ERRORS[401]})
    async def live() -> dict[str, Any]:
        """Give what the page shows of the machine."""
        return machine.picture()


def _tell_errors(app: FastAPI, log: Callable[[dict[str, Any]], None]) -> None:
    """Give every error the shape of OpenAI's, and a log line."""

    def refusal(error: ServingError) -> JSONResponse:
        log({"request": None, "status": error.status, "ended": error.code or error.kind})
        return _failed(error)

    @app.exception_handler(ServingError)
    async def known(_: HttpRequest, error: ServingError) -> Response:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        return refusal(_invalid(error))

    @app.exception_handler(HTTPException)
    async def http(_: HttpRequest, error: HTTPException) -> Response:
        told = ServingError(error.status_code, str(error.detail))
        response = refusal(told)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fault(_: HttpRequest, error: Exception) -> Response:
        # Starlette raises it again when the response is sent: it is logged with its traceback.
        why = f"the server has failed on this request ({type(error).__name__})"
        return refusal(ServingError(500, why, kind="server_error"))


def _invalid(error: RequestValidationError) -> ServingError:
    """Name the first field that is wrong: 400 where there is no such field or no JSON, else 422."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ServingError(400, "the body is not JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ServingError(
            400, f"{name}: this server does not honour it", param=name, code="unsupported_parameter"
        )
    why = str(first["msg"]).removeprefix("Value error, ")
    return ServingError(422, f"{name}: {why}" if name else why, param=name, code=first["type"])
