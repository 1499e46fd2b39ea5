"""Runs an application until it is told to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from cllm.errors import UsageError
from cllm.serving.server.worker import Worker

CONNECTIONS = 1024  # at a time; more get 503
SLACK = 5  # seconds for connections to close after their answers have ended
HEAD_SECONDS = 20.0  # for the headers of a client's first request to arrive
READ_SECONDS = 20.0  # for a client to drain a full send buffer


class Connection(H11Protocol):
    """Disconnects a client that sends no request or does not read its answer; uvicorn would wait for ever."""

    _cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._cut_in(HEAD_SECONDS)

    def handle_events(self) -> None:
        waiting = self.cycle is None
        super().handle_events()
        if waiting and self.cycle is not None:
            self._forget()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_in(READ_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _cut_in(self, seconds: float) -> None:
        self._forget()
        self._cut = self.loop.call_later(seconds, self.transport.abort)

    def _forget(self) -> None:
        if self._cut is not None:
            self._cut.cancel()


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT it accepts nothing new, gives running answers ``grace`` seconds to finish, then ends them."""

    def __init__(self, app: FastAPI, worker: Worker, grace: float) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            log_level="warning",
            access_log=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=int(grace) + SLACK,
            server_header=False,
        )
        super().__init__(config)
        self._worker, self._grace = worker, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.close()
        loop = asyncio.get_running_loop()
        ending = loop.call_later(self._grace, lambda: loop.run_in_executor(None, self._worker.stop))
        await super().shutdown(sockets)
        ending.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A socket for the server; port 0 picks a free one. Raises UsageError where the address cannot be used."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # clients that connect before the server is ready wait
    except (OSError, OverflowError) as error:
        listener.close()
        raise UsageError(f"cannot listen on {host} port {port}: {error}") from error
    return listener


def own_names(listener: socket.socket, host: str) -> frozenset[str] | None:
    """The hosts of a server that only this machine can reach; None where other machines can, by names we cannot know."""
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        return None
    return frozenset(("127.0.0.1", "localhost", "[::1]", host))


def address(listener: socket.socket) -> str:
    """Its URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
