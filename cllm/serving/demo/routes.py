"""The server's routes for the demo page and its race."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from cllm import decoding
from cllm.errors import UsageError
from cllm.serving.demo.race import ar_decoder, race
from cllm.serving.server.app import ApiError, EventStream, api_errors, read_body
from cllm.serving.server.protocol import Positive
from cllm.serving.server.service import Service

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
PATIENCE = 60.0  # seconds to wait for other requests to release the model


class RaceRequest(BaseModel):
    """The body of ``/demo/race``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: Annotated[str, Field(min_length=1)]
    max_tokens: Positive


def add_demo(app: FastAPI, service: Service, question: str, asks_key: bool = False) -> None:
    """Add the page at ``/``, with ``question`` as the initial prompt. ``asks_key``: show a field for the server's API key."""
    ar = ar_decoder(service.queue.decoder)  # kept between races, so that captured steps are reused
    page = files("cllm.serving.demo").joinpath("page.html").read_text(encoding="utf-8")
    settings = {"model": service.name, "question": question, "most": service.limits.new_tokens, "key": asks_key}
    page = page.replace("{{settings}}", json.dumps(settings).replace("<", "\\u003c"))

    @app.get("/")
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": POLICY})

    @app.post("/demo/race")
    async def run(request: Request) -> Response:
        body = await read_body(request, RaceRequest)
        with api_errors():
            prompt = service.template.encode([{"role": "user", "content": body.prompt}], service.tokenizer)
            service.queue.check(decoding.Request(prompt, body.max_tokens))
            if body.max_tokens > service.limits.new_tokens:
                raise UsageError(f"max_tokens must be at most {service.limits.new_tokens}, got {body.max_tokens}")
        events = _events(service, ar, prompt, body.max_tokens)
        return EventStream(events, closing(events), asyncio.get_running_loop().time() + service.limits.seconds)


def _events(service: Service, ar: decoding.JacobiDecoder, prompt: Sequence[int], max_tokens: int) -> Iterator[str]:
    """One server-sent event per forward pass, with exclusive use of the model."""
    if not service.worker.device.acquire(timeout=PATIENCE):
        yield 'data: {"error": "the model is busy; try again"}\n\n'
        return
    try:
        with api_errors():
            for step in race(ar, service.queue.decoder, service.tokenizer, prompt, max_tokens):
                yield f"data: {json.dumps(asdict(step))}\n\n"
    except ApiError as problem:
        yield f"data: {json.dumps({'error': str(problem)})}\n\n"
    finally:
        service.worker.device.release()
