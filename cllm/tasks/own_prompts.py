"""Prompts of your own: JSONL of prompts or conversations, lines of text, or the log of an OpenAI-compatible server.

A row has ``messages``, as in a chat request, or ``prompt``, a text or a list of texts. A row of a log may be such a request, or
hold it as ``request`` or ``body``. In a ``.txt`` file every line is a prompt.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from cllm.files import open_text, read_rows
from cllm.tasks.base import BadField, Example, Message, NumberedRow, Task, text_field, user_turn

TEXT = ".txt"
_WRAPPED = ("request", "body")  # fields that hold the request in a log
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_CONVERSATION = {"form": "conversation"}  # the tag of prompts that need a chat template


class OwnPrompts(Task):
    """Any prompts. There is no right answer to them, but a reply can be compared with one in the data."""

    name = "own_prompts"
    description = "your own prompts: JSONL, lines of text, or a server's log of requests"
    fields = "prompt or messages, or a request with one of them as request or body"
    metric = "same_reply"
    plain_template: ClassVar[str] = "{question}\n"
    default_question = "What is the difference between weather and climate?"

    def open(self, path: Path, split: str) -> Iterator[NumberedRow]:
        return _lines(path) if path.name.removesuffix(".gz").endswith(TEXT) else read_rows(path)

    def example(self, row: Mapping[str, Any]) -> Example:
        request = _request(row)
        if "messages" in request:
            return _conversation(request["messages"])
        return Example(user_turn(text_field(request, "prompt").strip()))

    def examples(self, row: Mapping[str, Any], split: str) -> list[Example]:
        """One for each prompt, where a row has a list of them."""
        prompts = _request(row).get("prompt")
        if not isinstance(prompts, list) or "messages" in _request(row):
            return [self.example(row)]
        return [self.example({"prompt": text}) for text in prompts]

    def judgeable(self, example: Example) -> bool:
        return example.reference is not None

    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """``same_reply``: the reply is the one in the data, apart from surrounding white space."""
        return {"same_reply": reply.strip() == (example.reference or "").strip()}


def _lines(path: Path) -> Iterator[NumberedRow]:
    with open_text(path) as file:
        yield from ((number, {"prompt": line}) for number, line in enumerate(file, 1) if line.strip())


def _request(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request that a log wraps, or the row itself."""
    for name in _WRAPPED:
        if isinstance(row.get(name), dict):
            row = row[name]
    return row


def _conversation(turns: Any) -> Example:
    """A conversation without the reply that ends it, if there is one; that reply is the reference."""
    if not isinstance(turns, list):
        raise BadField("field 'messages' is not a list")
    messages = [_message(turn) for turn in turns]
    reference = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        raise BadField("the conversation does not end in a user turn")
    return Example(tuple(messages), reference, tags=_CONVERSATION)


def _message(turn: Any) -> Message:
    role = _ROLES.get(str(turn.get("role"))) if isinstance(turn, dict) else None
    if role is None:
        raise BadField(f"a role other than {', '.join(_ROLES)}")
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise BadField("a message with more than text")
        content = "".join(map(str, parts))
    return {"role": role, "content": text_field({"content": content}, "content")}


TASK = OwnPrompts()
