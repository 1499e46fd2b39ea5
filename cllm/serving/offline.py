"""Replying to a file of prompts by continuous batching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from cllm.decoding import GREEDY, Queue, Request, Sampling
from cllm.errors import UsageError
from cllm.files import BadRow, StrPath, read_rows
from cllm.prompts import PromptTemplate

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """One conversation to reply to."""

    id: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int | None = None  # None: the run's limit


def read_prompts(path: StrPath) -> Iterator[Prompt | BadRow]:
    """Read the rows of a JSONL file or JSON list, plain or ``.gz``, lazily.

    A row has ``prompt``, a string, or ``messages``, a conversation that ends with a user's turn, and optionally ``id``
    (default: its number) and ``max_tokens``. Raises UsageError if the file cannot be read.
    """
    seen: set[str] = set()
    for number, row in read_rows(path):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            prompt = _prompt(row, number)
        except ValueError as error:
            yield BadRow(number, str(error))
            continue
        if prompt.id in seen:
            yield BadRow(number, "id given twice", prompt.id)
            continue
        seen.add(prompt.id)
        yield prompt


def _prompt(row: Mapping[str, Any], number: int) -> Prompt:
    messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    if "messages" not in row and "prompt" not in row:
        raise ValueError("neither prompt nor messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError("prompt is not a text, or messages is not a list of {role, content}")
    if messages[-1]["role"] != "user":
        raise ValueError("the last message is not the user's")
    max_tokens = row.get("max_tokens")
    if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1):
        raise ValueError("max_tokens is not an integer >= 1")
    return Prompt(str(row.get("id", number)), tuple(messages), max_tokens)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return False
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())


def answer(
    queue: Queue,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    prompts: Iterable[Prompt],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[dict[str, Any]]:
    """Yield rows ``{id, reply, tokens, forwards, stop}`` as replies finish.

    A prompt that cannot be answered (refused by the template, too long for the context or the cache) yields ``{id, error}``
    and does not affect the others. Each prompt has its own seed, derived from ``sampling.seed`` and its id.
    """
    names: dict[int, str] = {}
    numbers = count()
    refused: list[dict[str, Any]] = []

    def requests() -> Iterator[Request]:
        for prompt in prompts:
            try:
                ids = template.encode(prompt.messages, tokenizer)
                request = Request(ids, prompt.max_tokens or max_tokens, sampling.derive(prompt.id))
                queue.check(request)
            except UsageError as error:
                refused.append({"id": prompt.id, "error": str(error)})
                continue
            names[next(numbers)] = prompt.id
            yield request

    for number, result in queue.run(requests()):
        yield from refused
        refused.clear()
        reply = tokenizer.decode(result.token_ids, skip_special_tokens=True)
        statistics = {"tokens": len(result.token_ids), "forwards": result.forwards, "stop": result.stop}
        yield {"id": names.pop(number), "reply": reply} | statistics
    yield from refused
