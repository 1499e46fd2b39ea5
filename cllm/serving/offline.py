"""Replying to a file of prompts by continuous batching."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cllm.decoding import GREEDY, Queue, Request, Sampling
from cllm.errors import UsageError
from cllm.evaluation.environment import check_writable
from cllm.evaluation.guess import SAMPLE_PROMPTS
from cllm.files import BadRow, StrPath, read_rows
from cllm.models import weights_stamp
from cllm.open_model import OpenModel
from cllm.prompts import PromptTemplate
from cllm.result_file import ResultFile
from cllm.serving.arguments import GenerateArguments
from cllm.serving.decoder import open_decoder

ROLES = ("system", "user", "assistant")
logger = logging.getLogger(__name__)


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


def generate_file(args: GenerateArguments) -> tuple[int, Counter[str]]:
    """Answer a file of prompts by Jacobi decoding with continuous batching.

    Replies go to ``args.output`` as they finish; run again with the same arguments, it keeps them and answers the others.
    Returns how many replies there are, and how many rows have none, by reason. Raises UsageError where model, prompts and
    options do not fit together, and where the output was made with other settings.
    """
    sampling = args.sampling(args.seed)
    check_writable(args.output)
    total, bad = _count(args.prompts)
    opened, decoder = open_decoder(
        args, lambda opened: _samples(args.prompts, opened), batch_size=args.batch_size, sampling=sampling, seed=args.seed
    )
    settings = {
        "model": args.model,
        "weights": weights_stamp(args.model),
        "prompt_template": opened.template.text,
        "max_tokens": args.max_tokens,
        "dtype": opened.dtype,
        "sampling": asdict(sampling),
    }
    results = ResultFile(args.output, settings, args.resume, "--output")
    queue = Queue(decoder, args.batch_size, args.max_slots)
    waiting = (item for item in read_prompts(args.prompts) if isinstance(item, Prompt) and item.id not in results.rows)
    answers = answer(queue, opened.tokenizer, opened.template, waiting, max_tokens=args.max_tokens, sampling=sampling)
    with tqdm(total=total, initial=len(results.rows), unit="reply", file=sys.stderr, disable=None) as bar:
        for row in answers:
            results.append([row])
            bar.update()
    errors = sum("error" in row for row in results.rows.values())
    return len(results.rows) - errors, Counter({"prompts that cannot be answered (see `error`)": errors}) + bad


def _count(path: str) -> tuple[int, Counter[str]]:
    """How many prompts a file has, and its bad rows by reason. Raises UsageError where there is no prompt."""
    total, bad = 0, Counter[str]()
    for item in read_prompts(path):
        if isinstance(item, Prompt):
            total += 1
            continue
        bad[f"rows skipped: {item.reason}"] += 1
        logger.warning("%s: skipped %s", path, item)
    if not total:
        raise UsageError(f"no prompt in {path}; expected rows with `prompt` or `messages`")
    return total, bad


def _samples(path: str, opened: OpenModel) -> list[list[int]]:
    """The first prompts of a file as token ids, without those that the template refuses."""
    samples: list[list[int]] = []
    for item in read_prompts(path):
        if len(samples) == SAMPLE_PROMPTS:
            break
        if isinstance(item, Prompt):
            with suppress(UsageError):
                samples.append(opened.template.encode(item.messages, opened.tokenizer))
    return samples
