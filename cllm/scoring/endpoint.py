"""A judge's replies from an OpenAI-compatible endpoint, through the package ``openai`` (extra ``[eval]``)."""

import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from cllm.errors import UsageError

TRANSIENT = (408, 409, 425, 429)  # statuses that may pass, as those from 500 do
FATAL = (401, 403, 404, 405)  # every other request would fail in the same way
GO_ON = "what was judged is kept, run again to go on"
_ADDRESS = re.compile(r"https?://[!-~]+", re.IGNORECASE)


class Refused(Exception):
    """The endpoint does not take this one request, but may take others."""


class Endpoint:
    """``model`` at ``base_url`` (up to ``/v1``). Safe to use from several threads.

    Raises UsageError for an address that is not http or https, and where ``openai`` is not installed.
    """

    def __init__(
        self, base_url: str, model: str, key: str | None = None, *, timeout: float = 300, retries: int = 6, max_tokens: int = 2048
    ) -> None:
        self.url, self.model, self.retries = base_url, model, retries
        self._openai, self._client = open_client(base_url, key, "--judge_base_url", retries=retries, timeout=timeout)
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}

    def complete(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the reply.

        Errors that may pass (429, 5xx, lost connections, replies that are no chat completion) are retried, with exponential
        back-off or after the time that the server asks for. Raises Refused where the endpoint refuses this request, and
        UsageError where it refuses every request or no retry helps.
        """
        for _ in range(self.retries + 1):
            if (text := self._ask(messages)) is not None:
                return text
        raise UsageError(f"{self.url} gave {self.retries + 1} replies that are no chat completions; {GO_ON}")

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The text of the reply, or None where there is none in it."""
        options = dict(self._options)
        try:
            reply = self._client.chat.completions.create(model=self.model, messages=list(messages), **options)
            return _text(reply.choices[0].message.content)
        except self._openai.APIStatusError as error:
            if error.status_code == 400 and self._adapt(error.response.text, options):
                return self._ask(messages)
            raise self._failure(error) from error
        except self._openai.APIConnectionError as error:
            problem = error.__cause__ or error
            raise UsageError(f"{self.url} gave no answer in {self.retries + 1} tries: {problem}; {GO_ON}") from error
        except (self._openai.APIResponseValidationError, ValueError, AttributeError, LookupError, TypeError):
            return None

    def _adapt(self, problem: str, sent: Mapping[str, Any]) -> bool:
        """Drop or rename an option that the model does not take. Returns whether that is worth another try."""
        if "max_tokens" in sent and "max_tokens" in problem:
            self._options = {**self._options, "max_completion_tokens": sent["max_tokens"]}
            self._options.pop("max_tokens", None)
            return True
        if "temperature" in sent and "temperature" in problem:
            self._options = {name: value for name, value in self._options.items() if name != "temperature"}
            return True
        return False

    def _failure(self, error: Any) -> Exception:
        status = error.status_code
        problem = f"HTTP {status} {' '.join(error.response.text.split())[:500]}"
        if 300 <= status < 400:
            target = error.response.headers.get("location")
            return UsageError(f"{self.url} redirects to {target}; if you trust it, give that as the address")
        if status >= 500 or status in TRANSIENT:
            return UsageError(f"{self.url} gave no answer in {self.retries + 1} tries, the last one: {problem}; {GO_ON}")
        if status in FATAL:
            return UsageError(f"{self.url} refuses requests: {problem}")
        return Refused(problem)


def _text(content: Any) -> str | None:
    if isinstance(content, list):  # parts, as some servers send them
        return "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else None


def open_client(base_url: str, key: str | None, option: str, *, retries: int, timeout: float = 300) -> tuple[Any, Any]:
    """The package ``openai`` and a client of it. ``option``: what ``base_url`` is called in messages.

    Raises UsageError for an address that is not http or https, and where the package is not installed.
    """
    if not _is_address(base_url):
        raise UsageError(f"{option} must look like http://host:port/v1, got {base_url!r}")
    try:
        import openai
    except ImportError as error:
        raise UsageError(f"{option} is asked through the package openai, which is missing: pip install openai") from error
    client = openai.OpenAI(
        base_url=base_url,
        api_key=key or "none",
        timeout=timeout,
        max_retries=retries,
        http_client=openai.DefaultHttpxClient(follow_redirects=False),  # a redirect would see prompts and keys
    )
    return openai, client


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(_ADDRESS.fullmatch(url) and parts.hostname and parts.port != 0)  # a port that is not a number raises
    except ValueError:
        return False
