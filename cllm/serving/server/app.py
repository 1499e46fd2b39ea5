"""The routes of the server and its errors, all in the protocol's form."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from cllm.errors import UsageError
from cllm.serving.server.answer import Answer
from cllm.serving.server.guard import Guard
from cllm.serving.server.protocol import ChatRequest, CompletionRequest, Form, Generation, error, models
from cllm.serving.server.service import Service
from cllm.serving.server.worker import Busy, Closed, Failed

logger = logging.getLogger(__name__)
Body = TypeVar("Body", bound=BaseModel)
KINDS = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 503: "server_error"}
DONE = "data: [DONE]\n\n"


class ApiError(Exception):
    """An error to answer with, and its HTTP status."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status, self.content = status, error(message, kind, code, param)


@contextmanager
def api_errors() -> Iterator[None]:
    """Raises every error inside as an ApiError."""
    try:
        yield
    except ApiError:
        raise
    except UsageError as problem:
        raise ApiError(400, str(problem)) from None
    except Busy as problem:
        raise ApiError(429, str(problem), "busy") from None
    except Closed as problem:
        raise ApiError(503, str(problem)) from None
    except Failed as problem:
        raise ApiError(500, str(problem)) from None
    except Exception as problem:
        logger.error("a request failed: %s", problem, exc_info=problem)
        raise ApiError(500, "the server failed on this request; its log says why") from None


def create_app(service: Service, api_keys: Collection[str] = (), names: Collection[str] | None = None) -> FastAPI:
    """The application; when it shuts down, so does the service.

    ``api_keys``: if there are any, clients must send one of them. Keys and values are reused among prompts of one API key only.
    ``names``: the hosts that clients may ask for, None for any. Without keys this keeps off web pages whose own name was made
    to point at this machine (DNS rebinding); with keys it is not needed.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="CLLM", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_routes(app, service)
    paths = {getattr(route, "path", "") for route in app.routes}

    def count(path: str, status: int) -> None:
        service.metrics.requests.labels(path if path in paths else "other", str(status)).inc()

    if names is not None and not api_keys:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*names], www_redirect=False)
    app.add_middleware(Guard, max_body=service.limits.body_bytes, api_keys=api_keys, count=count)  # around the one above
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        ready = service.worker.ready
        return JSONResponse({"status": "ok" if ready else "shutting down"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return models(service.name, service.started, service.queue.decoder.context)

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return models(service.name, service.started, service.queue.decoder.context)["data"][0]

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _respond(service, request, await read_body(request, ChatRequest), chat=True)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _respond(service, request, await read_body(request, CompletionRequest), chat=False)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, problem: ApiError) -> JSONResponse:
        headers = {"retry-after": "1"} if problem.status in (429, 503) else None
        return JSONResponse(problem.content, problem.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, problem: HTTPException) -> JSONResponse:
        return await refused(request, ApiError(problem.status_code, f"{request.method} {request.url.path}: {problem.detail}"))


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The request's body as ``kind``. Raises ApiError where it is not one.

    Its Content-Type must be JSON: a page of another origin can send other types without the browser asking us first.
    """
    said = request.headers.get("content-type", "nothing")
    if said.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"the Content-Type must be application/json, got {said[:100]}")
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{place or 'body'}: {first['msg']}", param=place or None) from None


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(404, f"the model {name!r} does not exist; this server has {service.name!r}", "model_not_found", "model")


async def _respond(service: Service, request: Request, body: Generation, chat: bool) -> Response:
    _check_model(service, body.model)
    start = time.perf_counter()
    with api_errors():
        answer = await service.answer(body, request.headers.get("authorization", ""))
    writing = Writing(service, answer, start)
    form = Form(service.name, chat, bool(body.stream_options and body.stream_options.include_usage))
    if body.stream:
        return EventStream(_events(writing, form), writing, writing.deadline + 1)
    with writing:
        return JSONResponse(await _while_connected(request, _whole(writing, form)))


class Writing:
    """An answer being written to a client: entering submits it, leaving cancels what is unfinished and counts the cost.

    Entering raises ApiError where the worker does not accept it.
    """

    def __init__(self, service: Service, answer: Answer, start: float) -> None:
        self.answer, self._metrics, self._start = answer, service.metrics, start
        self._limit = service.limits.seconds
        self.deadline = asyncio.get_running_loop().time() + self._limit
        self._complete = False

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """Index, text and finish reason of each piece with either. Raises ApiError where the answer cannot continue."""
        first = True
        with api_errors():
            try:
                async for choice, piece in self.answer.pieces(self.deadline):
                    if piece and first:
                        first = False
                        self._metrics.first_seconds.observe(time.perf_counter() - self._start)
                    if piece or choice.reason:
                        yield choice.index, piece, choice.reason
            except TimeoutError:
                raise ApiError(408, f"the answer was not complete after {self._limit:g} seconds") from None
        self._complete = True

    def __enter__(self) -> Writing:
        with api_errors():
            self.answer.submit()
        return self

    def __exit__(self, *exception: object) -> None:
        self.answer.cancel()
        self._metrics.count(self.answer.usage)
        self._metrics.seconds.observe(time.perf_counter() - self._start)
        if not self._complete:
            self._metrics.cancelled.inc()


async def _whole(writing: Writing, form: Form) -> dict[str, Any]:
    async for _ in writing.pieces():
        pass
    choices = [("".join(choice.written), choice.reason or "") for choice in writing.answer.choices]
    return form.answer(choices, writing.answer.usage)


async def _events(writing: Writing, form: Form) -> AsyncIterator[str]:
    """Server-sent events; each may hold the text of several tokens."""
    try:
        for choice in writing.answer.choices:
            if opening := form.opening(choice.index):
                yield _event(opening)
        async for index, text, reason in writing.pieces():
            yield _event(form.piece(index, text, reason))
        if form.with_usage:
            yield _event(form.closing(writing.answer.usage))
    except ApiError as problem:
        yield _event(problem.content)
    yield DONE


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events inside a context, which exits when they end, when the client leaves, or at ``deadline`` (loop time)."""

    def __init__(self, events: Any, context: AbstractContextManager, deadline: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._context, self._deadline = context, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._context:
                async with asyncio.timeout_at(self._deadline):
                    await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("a client did not read its answer in time")


async def _while_connected(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The result of ``work``, which is cancelled when the client hangs up."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client hung up")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
