"""What a request must pass before it reaches the application: the API key, and limits on a body's size and the time it takes."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cllm.serving.server.protocol import error

OPEN_PATHS = ("/health", "/")  # need no key
BODY_SECONDS = 20.0  # for a body to arrive


class Gone(Exception):
    """The client has hung up."""


class Guard:
    """An ASGI application around another one, which receives whole bodies only. ``count`` is called with path and status."""

    def __init__(self, app: ASGIApp, max_body: int, api_keys: Collection[str], count: Callable[[str, int], None]) -> None:
        self.app, self.max_body, self.api_keys, self.count = app, max_body, api_keys, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
            await send(message)

        try:
            if refusal := await self._pass(scope, receive, counting):
                await refusal(scope, receive, counting)
        except Gone:
            return
        except asyncio.CancelledError:  # the server's grace period is over
            return

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self.api_keys and scope["path"] not in OPEN_PATHS:
            given = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
            if not sum(hmac.compare_digest(given, key.encode()) for key in self.api_keys):  # compares all, in constant time
                return JSONResponse(error("a valid API key is needed", "authentication_error", "invalid_api_key"), 401)
        length = headers.get("content-length", "0")
        return self._too_large() if not length.isdecimal() or int(length) > self.max_body else None

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> JSONResponse | None:
        """Pass the request on, or return the refusal to answer with; only once the body has started to arrive."""
        refusal = self._refusal(scope)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(receive, 0 if refusal else self.max_body)
        except TimeoutError:
            return refusal or JSONResponse(error("the request's body did not come in time", "timeout_error"), 408)
        if refusal or body is None:
            return refusal or self._too_large()
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, again, send)
        return None

    async def _read(self, receive: Receive, most: int) -> bytes | None:
        """The body; None if it is longer than ``most`` bytes. Raises Gone, also for a body that is not valid HTTP."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            body += message.get("body", b"")
            if len(body) > most:
                return None
            more = message.get("more_body", False)
        return bytes(body)

    def _too_large(self) -> JSONResponse:
        return JSONResponse(error(f"the body is larger than {self.max_body} bytes", "invalid_request_error"), 413)
