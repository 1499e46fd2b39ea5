"""Prompts of your own: JSONL of prompts or conversations, lines of text, or the log of an OpenAI-compatible server.

A row has ``messages``, as a chat request has them, or ``prompt``, a text or a list of texts. A log may hold such a request as
its row, or as ``request`` or ``body`` of it. In a ``.txt`` file every line is a prompt.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from cllm.files import open_text, read_rows
from cllm.tasks.base import BadField, BadRow, Example, Message, NumberedRow, Task, read_each, text_field

TEXT = ".txt"
_WRAPPED = ("request", "body")  # where a log has the request
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_CONVERSATION = {"form": "conversation"}  # the tag of prompts that only a chat template renders as they were meant


class OwnPrompts(Task):
    """Whatever people ask. There is no right answer to it, but a reply can be compared with one that is in the data."""

    name = "own_prompts"
    description = "your own prompts: JSONL, lines of text, or a server's log of requests"
    fields = "prompt or messages, or a request with one of them as request or body"
    metric = "same_reply"
    plain_template: ClassVar[str] = "{question}\n"
    default_question = "What is the difference between weather and climate?"

    def open(self, path: Path, split: str) -> Iterator[NumberedRow]:
        return _lines(path) if path.name.removesuffix(".gz").endswith(TEXT) else read_rows(path)

    def read(self, rows: Iterable[NumberedRow], split: str) -> Iterator[Example | BadRow]:
        return read_each(rows, lambda row, number: _examples(row, f"{self.name}-{split}-{number}"))

    def judgeable(self, example: Example) -> bool:
        return example.reference is not None

    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """``same_reply``: the reply is the one in the data, but for blanks around it."""
        return {"same_reply": reply.strip() == (example.reference or "").strip()}


def _lines(path: Path) -> Iterator[NumberedRow]:
    with open_text(path) as file:
        yield from ((number, {"prompt": line}) for number, line in enumerate(file, 1) if line.strip())


def _examples(row: Mapping[str, Any], row_id: str) -> Iterator[Example]:
    """What a row asks for. Raises BadField."""
    for name in _WRAPPED:
        if isinstance(row.get(name), dict):
            row = row[name]
    if "messages" in row:
        yield _conversation(row["messages"], row_id)
    elif isinstance(row.get("prompt"), list):
        texts = row["prompt"]
        if not all(isinstance(text, str) for text in texts):
            raise BadField("field 'prompt' is no text, and no list of texts")
        yield from (_question(text_field({"prompt": text}, "prompt"), f"{row_id}-{at}") for at, text in enumerate(texts, 1))
    else:
        yield _question(text_field(row, "prompt"), row_id)


def _question(text: str, row_id: str) -> Example:
    return Example(row_id, ({"role": "user", "content": text.strip()},))


def _conversation(turns: Any, row_id: str) -> Example:
    """A conversation up to the reply that is asked for; where the data ends in a reply, that is the reference."""
    if not isinstance(turns, list):
        raise BadField("field 'messages' is not a list")
    messages = [_message(turn) for turn in turns]
    reference = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        raise BadField("the conversation does not end in a user turn")
    return Example(row_id, tuple(messages), reference, tags=_CONVERSATION)


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
