"""The OpenAI protocol: what requests may contain, and what answers look like.

Source: the OpenAI API reference, "Chat" and "Completions". In addition, requests may have ``top_k``, ``min_p`` and
``repetition_penalty``, and ``usage`` has a field ``cllm``. A field that would change the answer and is not supported is
refused; a field that cannot change it is ignored.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from cllm.decoding import Sampling
from cllm.errors import LARGEST

MAX_STOPS = 16
LONGEST_ERROR = 280  # characters of a message, which may quote the client
DEFAULT_COMPLETION = 16  # tokens of a completion, where the request does not say


def _off(value: Any) -> Any:
    if value in (None, False, 0, "", [], {}):
        return value
    raise PydanticCustomError("unsupported", "is not supported here; leave it out")


def _no_logprobs(value: Any) -> Any:
    if value is None or value is False:
        return value
    raise PydanticCustomError("unsupported", "log-probabilities are not supported: Jacobi decoding does not keep them")


def _text_only(content: Any) -> Any:
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and (kind := part.get("type", "text")) != "text":
            message = "a part of type {kind} is not supported here, only text is"
            raise PydanticCustomError("unsupported", message, {"kind": repr(kind)})
    return content


Unsupported = Annotated[Any, AfterValidator(_off)]
NoLogprobs = Annotated[Any, AfterValidator(_no_logprobs)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(_Body):
    """What both kinds of request may contain. None stands for the server's default."""

    model: str
    n: Positive | None = None
    max_tokens: Positive | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    logprobs: NoLogprobs = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    logit_bias: Unsupported = None

    user: Any = None
    metadata: Any = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def length(self, most: int) -> int:
        """The most tokens that the answer may have, on a server that allows ``most``."""
        return self.max_tokens or most

    def sampling(self, default: Sampling) -> Sampling:
        """How tokens are chosen. Without a seed, each request draws differently.

        Raises UsageError for a value out of range.
        """
        said = {name: value for name in asdict(default) if (value := getattr(self, name)) is not None}
        return Sampling(**asdict(default) | {"seed": secrets.randbits(63)} | said)


class TextPart(_Body):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | Annotated[list[TextPart], Field(min_length=1)], BeforeValidator(_text_only)]
    name: Any = None
    annotations: Unsupported = None  # this and the following are empty in answers that clients send back
    audio: Unsupported = None
    function_call: Unsupported = None
    refusal: Unsupported = None
    tool_calls: Unsupported = None

    def plain(self) -> dict[str, Any]:
        """In the form that prompt templates take."""
        role = "system" if self.role == "developer" else self.role
        parts = self.content if isinstance(self.content, str) else [{"type": "text", "text": p.text} for p in self.content]
        return {"role": role, "content": parts}


class ChatRequest(Generation):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None

    top_logprobs: NoLogprobs = None
    tools: Unsupported = None
    functions: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    reasoning_effort: Unsupported = None
    modalities: list[Literal["text"]] | None = None
    response_format: TextFormat | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None

    moderation: Unsupported = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None

    def length(self, most: int) -> int:
        return self.max_completion_tokens or super().length(most)


class TextFormat(_Body):
    type: Literal["text"]


class CompletionRequest(Generation):
    """The body of ``/v1/completions``. ``prompt`` is a text, a list of token ids, or a list of either."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1)]
    )
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Unsupported = None
    suffix: Unsupported = None

    def length(self, most: int) -> int:
        return self.max_tokens or min(DEFAULT_COMPLETION, most)

    @property
    def prompts(self) -> list[str | list[int]]:
        several: Any = self.prompt if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else [self.prompt]
        return several


@dataclass(frozen=True)
class Usage:
    """What an answer cost. ``forwards`` adds up the forward passes of all its rows."""

    prompt_tokens: int
    cached_tokens: int  # of the prompts
    completion_tokens: int
    forwards: int

    @property
    def fast_forwarded(self) -> int:
        """Tokens beyond one per forward."""
        return self.completion_tokens - self.forwards

    def json(self) -> dict[str, Any]:
        per_forward = self.completion_tokens / self.forwards if self.forwards else 0.0
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "cllm": {
                "forwards": self.forwards,
                "tokens_per_forward": round(per_forward, 4),
                "fast_forwarded": self.fast_forwarded,
            },
        }


@dataclass(frozen=True)
class Form:
    """How answers to one request are written: whole, or as the chunks of a stream.

    ``with_usage``: the last chunk has the usage, and in all others it is null.
    """

    model: str
    chat: bool
    with_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, choices: list[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """The whole answer. A choice is a text and its finish reason."""
        written = [
            self._choice(index, {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}, reason)
            for index, (text, reason) in enumerate(choices)
        ]
        return self._frame("chat.completion" if self.chat else "text_completion", written) | {"usage": usage.json()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before any text, where the protocol has one."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None) if self.chat else None

    def piece(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """A chunk. The last one of a choice has its finish reason."""
        delta = {"content": text} if text or reason is None else {}
        return self._chunk(index, {"delta": delta} if self.chat else {"text": text}, reason)

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._frame(self._chunk_kind, []) | {"usage": usage.json()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index: int, content: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self.with_usage else {}
        return self._frame(self._chunk_kind, [self._choice(index, content, reason)]) | usage

    def _choice(self, index: int, content: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def models(name: str, created: int, context: int | None) -> dict[str, Any]:
    """The list of models, with the one there is."""
    only = {"id": name, "object": "model", "created": created, "owned_by": "cllm", "max_model_len": context}
    return {"object": "list", "data": [only]}


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error. Long texts, which may come from the client, are shortened."""
    return {"error": {"message": _shortened(message), "type": kind, "param": param and _shortened(param), "code": code}}


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_ERROR else text[:LONGEST_ERROR] + "..."
