"""Turns requests of the protocol into answers. This part of the server does not know HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cllm.decoding import GREEDY, Queue, Request, Sampling
from cllm.errors import UsageError
from cllm.prompts import PromptTemplate, prompt_ids
from cllm.serving.server.answer import Answer
from cllm.serving.server.metrics import Metrics
from cllm.serving.server.protocol import ChatRequest, CompletionRequest, Generation
from cllm.serving.server.worker import Worker
from cllm.serving.text import TextStream


@dataclass(frozen=True)
class Limits:
    """What one client may ask for."""

    body_bytes: int = 1 << 20
    new_tokens: int = 1024  # of one response
    waiting: int = 128  # responses that wait to join the batch, of all clients together
    seconds: float = 600.0  # for an answer, including the wait


class Service:
    """A model that answers requests. ``sampling`` has the defaults for what a request leaves open."""

    def __init__(
        self,
        name: str,
        queue: Queue,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        limits: Limits,
        sampling: Sampling = GREEDY,
    ) -> None:
        self.name, self.queue, self.limits = name, queue, limits
        self.tokenizer, self.template, self.sampling = tokenizer, template, sampling
        self.started = int(time.time())
        self.worker = Worker(queue, limits.waiting)
        self.metrics = Metrics(self.worker)
        self._encoding = ThreadPoolExecutor(1, "encoding")  # long prompts must not block the event loop

    async def answer(self, body: Generation, client: str = "") -> Answer:
        """An answer to ``body``, not yet submitted, with ``n`` choices for each prompt.

        Prompts share cached keys and values only with others of the same ``client``. Raises UsageError for a request that can
        never be answered.
        """
        most = self.limits.new_tokens
        if (length := body.length(most)) > most:
            raise UsageError(f"max_tokens must be at most {most} here, got {length}")
        sampling = body.sampling(self.sampling)
        copies = body.n or 1
        prompts = len(body.prompts) if isinstance(body, CompletionRequest) else 1
        if copies * prompts > self.limits.waiting:
            raise UsageError(f"at most {self.limits.waiting} choices can be asked for at a time, got {copies * prompts}")
        encoded = await asyncio.get_running_loop().run_in_executor(self._encoding, self._encode, body)
        requests = []
        for number, ids in enumerate(encoded):
            draws = [sampling, *(sampling.derive(f"choice {choice}") for choice in range(1, copies))]
            requests += [Request(ids, length, draw, client) for draw in draws]
            self.queue.check(requests[-1], "the prompt" if len(encoded) == 1 else f"prompt {number}")
        texts = [TextStream(self.tokenizer, body.stops) for _ in requests]
        return Answer(self.worker, requests, texts, copies)

    def close(self) -> None:
        """Stop everything. Answers not yet complete end with an error."""
        self.worker.stop()
        self._encoding.shutdown()

    def _encode(self, body: Generation) -> list[list[int]]:
        """Token ids of each prompt."""
        if isinstance(body, ChatRequest):
            return [self.template.encode([message.plain() for message in body.messages], self.tokenizer)]
        assert isinstance(body, CompletionRequest)
        return [self._ids(prompt) for prompt in body.prompts]

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return prompt_ids(prompt, self.tokenizer)
        return list(prompt)
