"""A chat completion from an OpenAI-compatible endpoint, over the standard library alone."""

import email.utils
import http.client
import json
import logging
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from cllm.errors import UsageError

logger = logging.getLogger(__name__)

PASSING = (408, 409, 425, 429)  # statuses that are worth another try, beside those from 500
HOPELESS = (401, 403, 404, 405)  # every other request would end in the same way
_ADDRESS = re.compile(r"https?://[!-~]+", re.IGNORECASE)
LARGEST = 1 << 24  # bytes of a reply
LONGEST_PAUSE, LONGEST_WISH = 60.0, 600.0  # seconds: our own back-off, and a Retry-After that we obey


class Refused(Exception):
    """The endpoint does not take this one request; another may do."""


class _Passing(Exception):
    """A fault that may be gone at the next try; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """``model`` at ``base_url`` (up to ``/v1``). Safe to use from several threads.

    Raises UsageError for an address that is not http or https.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None = None,
        *,
        timeout: float = 300,
        tries: int = 7,
        first_pause: float = 1.0,
        max_tokens: int = 2048,
    ) -> None:
        if not _is_address(base_url):
            raise UsageError(f"--judge_base_url must look like http://host:port/v1, got {base_url!r}")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.timeout, self.tries, self.first_pause = model, timeout, tries, first_pause
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._extras: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stopped = threading.Event()

    def complete(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the reply.

        Faults that may pass (429, 5xx, lost connections, replies that are no JSON) are tried again with exponential
        back-off, or after the time that the server asks for. Raises Refused where the endpoint refuses this request,
        and UsageError where it refuses every request or the tries are used up.
        """
        for attempt in range(self.tries):
            try:
                return self._once(messages)
            except _Passing as fault:
                if attempt + 1 == self.tries or self._stopped.is_set():
                    raise UsageError(
                        f"{self.url} gave no answer in {attempt + 1} tries, the last one: {fault}; "
                        "what was judged is kept, run again to go on"
                    ) from fault
                self._stopped.wait(self._pause(attempt, fault))
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End the pauses of requests under way: nobody waits for them any more."""
        self._stopped.set()

    def resume(self) -> None:
        self._stopped.clear()

    def _pause(self, attempt: int, fault: _Passing) -> float:
        own = min(LONGEST_PAUSE, self.first_pause * 2**attempt) * random.uniform(0.5, 1.0)
        pause = own if fault.wait is None else max(min(fault.wait, LONGEST_WISH), own if fault.wait <= 0 else 0.0)
        logger.info("judge: %s; next try in %.1f s", fault, pause)
        return pause

    def _once(self, messages: Sequence[Mapping[str, str]]) -> str:
        extras = dict(self._extras)
        body = json.dumps({"model": self.model, "messages": list(messages)} | extras).encode()
        request = urllib.request.Request(self.url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return _content(response.read(LARGEST))
        except urllib.error.HTTPError as error:
            with error:
                detail = _detail(error)
            if error.code == 400 and self._adapt(detail, extras):
                return self._once(messages)
            raise self._fault(error, detail) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error

    def _adapt(self, detail: str, sent: Mapping[str, Any]) -> bool:
        """Leave out, or name otherwise, a parameter that the model does not take; whether that is worth another try."""
        if "max_tokens" in sent and "max_tokens" in detail:
            self._extras = {**self._extras, "max_completion_tokens": sent["max_tokens"]}
            self._extras.pop("max_tokens", None)
            return True
        if "temperature" in sent and "temperature" in detail:
            self._extras = {name: value for name, value in self._extras.items() if name != "temperature"}
            return True
        return False

    def _fault(self, error: urllib.error.HTTPError, detail: str) -> Exception:
        message = f"HTTP {error.code}" + (f" ({detail})" if detail else "")
        spent = "insufficient_quota" in detail  # OpenAI's 429 for an account without money
        if error.code >= 500 or (error.code in PASSING and not spent):
            return _Passing(message, _retry_after(error.headers.get("Retry-After")))
        if 300 <= error.code < 400:
            target = error.headers.get("Location")
            return UsageError(f"{self.url} redirects to {target}; if you trust it, give that as the address")
        if error.code in HOPELESS or spent:
            return UsageError(f"{self.url} refuses requests: {message}")
        return Refused(message)


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(_ADDRESS.fullmatch(url) and parts.hostname and parts.port != 0)  # a port that is no number raises
    except ValueError:
        return False


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError) as error:
        raise _Passing("the reply is not JSON") from error
    except (KeyError, IndexError, TypeError) as error:
        raise _Passing("the reply has no choices[0].message.content") from error
    if isinstance(content, list):  # parts, as some servers send
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise _Passing("the reply has no text")
    return content


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        body = error.read(10_000)
        found = json.loads(body)["error"]
        parts = [found.get(name) for name in ("message", "code", "param")] if isinstance(found, dict) else [found]
        return ", ".join(str(part) for part in parts if part)[:500]
    except Exception:  # whatever a failing server sends
        return ""


def _retry_after(value: str | None) -> float | None:
    """Seconds, given as a number or as a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
