"""Soak test of ``cllm serve`` with many concurrent clients: errors, leaked rows, memory, equality of answers.

Some clients hang up, some send requests that must be refused, and some inject a fault that fails the whole batch
(:mod:`faulty`). Only their own requests may fail.

    python scripts/benchmarks/soak.py --model MODEL --seconds 300 --output docs/results/soak.json

Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import torch
from faulty import FAULT, MESSAGE

from cllm.evaluation.environment import environment
from cllm.files import write_json

ALLOWED = {408, 429}  # status codes allowed to an overloaded server
HANG_UP, BAD, FAULTY = 0.3, 0.1, 0.02  # shares of the requests
BAD_REQUESTS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 10**30},
    {"temperature": 1e30},
    {"temperature": 1.0, "top_p": -1},
    {"repetition_penalty": 1e300},
    {"seed": 2**63},
    {"max_tokens": 2**63},
    {"n": 2**40},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "user", "content": "word " * 10_000}]},
    {"bogus": 1},
]
GROWTH = 1.1  # allowed factor on memory from the first third of the time to the end
PROMPTS = 24
SAMPLES = 12  # measurements of memory
MEMORY, PREFIXES = "process_resident_memory_bytes", "cllm_prefix_cache_bytes"


def main(argv: Sequence[str] | None = None) -> None:
    args = options().parse_args(argv)
    serve = [sys.executable, str(Path(__file__).with_name("faulty.py")), "serve", args.model, "--served_model_name", "model"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([*serve, "--port", "0", *args.options], stdout=subprocess.PIPE, stderr=log, text=True)
        assert server.stdout
        first = server.stdout.readline().split()
        try:
            result = asyncio.run(Soak(first[2].rstrip(";"), args).run()) if first else {}
        finally:
            server.terminate()
            server.wait()
            log.seek(0)
            text = log.read()
    if not result:
        sys.exit(text)
    result["stack traces in the log"] = text.count("Traceback") - text.count(f"RuntimeError: {MESSAGE}")
    for name, value in result.items():
        print(f"{name}: {value}")
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "model")}
        content = {"benchmark": "soak", "settings": settings, "result": result, "environment": environment(torch.device("cpu"))}
        write_json(args.output, content)
    sys.exit(wrong(result))


def options() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    result.add_argument("--model", required=True)
    result.add_argument("--seconds", type=float, default=300.0)
    result.add_argument("--clients", type=int, default=64)
    result.add_argument("--length", type=int, default=32, help="maximum number of new tokens per answer")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--output", help="where to write the result as JSON")
    result.add_argument("options", nargs="*", help="more options of cllm serve, after --")
    return result


def wrong(result: dict[str, Any]) -> bool:
    """Whether the server violated anything."""
    memory = result["memory, MiB"]
    grown = memory[-1] > GROWTH * memory[len(memory) // 3]
    over = result["prefixes, MiB at most"] > result["prefixes, MiB allowed"]
    faults = ("errors", "unequal answers", "rows left over", "stack traces in the log")
    return grown or over or not result["answers"] or any(result[fault] for fault in faults)


class Soak:
    """Clients that at random compare answers, hang up, or send requests that must fail."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        self.url, self.args = url.removesuffix("/v1"), args
        self.counts: Counter[str] = Counter()
        self.expected: dict[tuple[str, int], str] = {}

    async def run(self) -> dict[str, Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits) as self.client:
            await self._ask_alone()
            start = time.monotonic()
            clients = [asyncio.create_task(self._talk(number, start + self.args.seconds)) for number in range(self.args.clients)]
            memory, prefixes = [await self._mebibytes(MEMORY)], [await self._mebibytes(PREFIXES)]
            for _ in range(SAMPLES):
                await asyncio.sleep(self.args.seconds / SAMPLES)
                memory.append(await self._mebibytes(MEMORY))
                prefixes.append(await self._mebibytes(PREFIXES))
            await asyncio.gather(*clients)
            rows, reused = await self._rows_left(), await self._metric("cllm_cached_prompt_tokens_total")
            allowed = await self._mebibytes("cllm_prefix_cache_budget_bytes")
        counted = ("answers", "hung up", "bad requests", "faulty requests", "refused", "errors", "unequal answers")
        kept = {"prefixes, MiB at most": max(prefixes), "prefixes, MiB allowed": allowed, "prompt tokens reused": reused}
        return {name: self.counts[name] for name in counted} | {"rows left over": rows, "memory, MiB": memory} | kept

    async def _ask_alone(self) -> None:
        """Record the answers that a single client gets, for comparison."""
        for number in range(PROMPTS):
            body = self._body(number, random.Random(number).randint(1, self.args.length))
            answer = await self.client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            self.expected[self._key(body)] = answer.json()["choices"][0]["message"]["content"]

    async def _talk(self, number: int, end: float) -> None:
        draw = random.Random(f"{self.args.seed} {number}")
        while time.monotonic() < end:
            (text, length), expected = draw.choice([*self.expected.items()])
            body = self._body(text, length)
            kind = draw.random()
            try:
                if kind < HANG_UP:
                    await self._hang_up(body, draw)
                elif kind < HANG_UP + BAD:
                    await self._fail("bad requests", HTTPStatus.BAD_REQUEST, body | draw.choice(BAD_REQUESTS), draw)
                elif kind < HANG_UP + BAD + FAULTY:
                    await self._fail("faulty requests", HTTPStatus.INTERNAL_SERVER_ERROR, body | {"seed": FAULT}, draw)
                else:
                    await self._compare(body, expected, stream=draw.random() < 0.5)
            except httpx.HTTPStatusError as error:
                self.counts["refused" if error.response.status_code in ALLOWED else "errors"] += 1
                await asyncio.sleep(draw.random())
            except httpx.HTTPError:
                self.counts["errors"] += 1

    async def _compare(self, body: dict[str, Any], expected: str, stream: bool) -> None:
        answer = await self.client.post("/v1/chat/completions", json=body | {"stream": stream})
        answer.raise_for_status()
        text = _streamed(answer.text) if stream else answer.json()["choices"][0]["message"]["content"]
        self.counts["answers"] += 1
        self.counts["unequal answers"] += text != expected

    async def _fail(self, name: str, status: int, body: dict[str, Any], draw: random.Random) -> None:
        """Expect exactly this error, as the status or, once a stream has started, as an event."""
        answer = await self.client.post("/v1/chat/completions", json=body | {"stream": draw.random() < 0.5})
        if answer.status_code == HTTPStatus.OK and status == HTTPStatus.INTERNAL_SERVER_ERROR:
            self.counts["errors"] += '"server_error"' not in answer.text
        elif answer.status_code != status:
            answer.raise_for_status()
            self.counts["errors"] += 1
        self.counts[name] += 1

    async def _hang_up(self, body: dict[str, Any], draw: random.Random) -> None:
        """Disconnect after a few events of a stream, or after a while without one."""
        self.counts["hung up"] += 1
        if draw.random() < 0.5:
            try:
                async with asyncio.timeout(draw.random()):
                    (await self.client.post("/v1/chat/completions", json=body)).raise_for_status()
            except TimeoutError:
                pass
            return
        events = draw.randint(0, 10)
        async with self.client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
            answer.raise_for_status()
            async for _ in answer.aiter_lines():
                events -= 1
                if events < 0:
                    return

    async def _rows_left(self) -> int:
        """The number of rows left some time after all clients have gone."""
        for _ in range(100):
            rows = await self._metric("cllm_rows_running") + await self._metric("cllm_requests_waiting")
            if not rows:
                return 0
            await asyncio.sleep(0.1)
        return int(rows)

    async def _mebibytes(self, name: str) -> float:
        return round(await self._metric(name) / 2**20, 3)

    async def _metric(self, name: str) -> float:
        lines = (await self.client.get("/metrics")).text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def _body(self, prompt: int | str, length: int) -> dict[str, Any]:
        text = prompt if isinstance(prompt, str) else f"What is {prompt} + {prompt * 7}?"
        asked = [{"role": "user", "content": text}]
        return {"model": "model", "messages": asked, "max_tokens": length, "temperature": 0}

    def _key(self, body: dict[str, Any]) -> tuple[str, int]:
        return body["messages"][0]["content"], body["max_tokens"]


def _streamed(text: str) -> str:
    """The text of a stream of server-sent events."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


if __name__ == "__main__":
    main()
