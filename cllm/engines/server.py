"""Responses from a server that speaks the OpenAI protocol and says token ids, as vLLM's does (``return_token_ids``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from cllm.errors import UsageError
from cllm.scoring.endpoint import FATAL, TRANSIENT, open_client
from cllm.trajectory.collect import Prompt, Response
from cllm.trajectory.record import Dropped

NO_IDS = (
    "the server at {url} answers with text alone, and text does not tell which tokens it was; use one that knows return_token_ids "
    "(vLLM from 0.10.2 on), or store its text in a file and pass --responses FILE"
)
RETRIES = 6


class Server:
    """Greedy responses from the server at ``base_url``, of the model called ``model`` if it serves several.

    Raises UsageError if no such server answers at that address.
    """

    def __init__(self, base_url: str, model: str, stops: Sequence[int], max_new_tokens: int, key: str | None = None) -> None:
        self.url, self.max_new_tokens = base_url, max_new_tokens
        self._openai, self._client = open_client(base_url, key, "--base_url", retries=RETRIES)
        served = self._served()
        self.name = model if model in served or len(served) != 1 else next(iter(served))
        if self.name not in served:
            raise UsageError(f"{base_url} serves {', '.join(served) or 'no model'}, and not {model!r}")
        self.context = served[self.name]
        # All penalties are named, because vLLM takes those of the model's generation_config.json where a request says nothing.
        self._more = {"repetition_penalty": 1, "stop_token_ids": list(stops), "return_token_ids": True}

    def _served(self) -> dict[str, int | None]:
        """The names of the served models, and the longest text of each if the server says it."""
        try:
            return {card.id: getattr(card, "max_model_len", None) for card in self._client.models.list().data}
        except self._openai.OpenAIError as error:
            raise UsageError(f"{self.url} does not list its models: {error}") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise UsageError(f"{self.url} does not list its models as the OpenAI protocol says") from error

    def respond(self, prompts: Iterable[Prompt], together: int) -> Iterator[Response | Dropped]:
        """Responses as they finish, with ``together`` requests under way at once.

        Raises UsageError if the server gives no token ids, refuses every request, or does not answer.
        """
        source, running = iter(prompts), set[Future[Response | Dropped]]()
        pool = ThreadPoolExecutor(together)
        try:
            while True:
                running |= {pool.submit(self._ask, prompt) for prompt in islice(source, together - len(running))}
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, prompt: Prompt) -> Response | Dropped:
        room = self.max_new_tokens if self.context is None else min(self.max_new_tokens, self.context - len(prompt.ids))
        if room < 1:
            return Dropped(prompt.row_id, "prompt longer than the server's context")
        for _ in range(RETRIES + 1):
            try:
                reply = self._client.completions.create(
                    model=self.name, prompt=prompt.ids, max_tokens=room, temperature=0, extra_body=self._more
                )
                ids: Any = getattr(reply.choices[0], "token_ids", None)
            except self._openai.APIStatusError as error:
                return self._refused(prompt, error)
            except self._openai.APIConnectionError as error:
                problem = error.__cause__ or error
                raise UsageError(f"{self.url} gave no answer in {RETRIES + 1} tries: {problem}; run again to go on") from error
            except (self._openai.APIResponseValidationError, ValueError, AttributeError, LookupError, TypeError):
                continue  # no completion; the next try may give one
            if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
                raise UsageError(NO_IDS.format(url=self.url))
            return prompt, ids
        raise UsageError(f"{self.url} gave {RETRIES + 1} replies that are no completions; run again to go on")

    def _refused(self, prompt: Prompt, error: Any) -> Dropped:
        """The prompt left out, where the server refuses this request alone. Raises UsageError where it refuses all."""
        status, text = error.status_code, " ".join(error.response.text.split())[:500]
        if "return_token_ids" in text:
            raise UsageError(NO_IDS.format(url=self.url)) from error
        if status >= 500 or status in (*FATAL, *TRANSIENT) or 300 <= status < 400:
            raise UsageError(f"{self.url} refuses requests: HTTP {status} {text}; run again to go on") from error
        return Dropped(prompt.row_id, f"refused by the server: HTTP {status}")
