"""The tokenizer's chat template, with each message's content in a form that the template can render: a string or parts.

Templates of multimodal models loop over a list of parts and may skip a string; others take a string and would render a list as
its Python repr. To find out, the template is rendered with marks in place of the contents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from cllm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Content = str | Sequence[Mapping[str, Any]]  # a text, or parts {"type": "text", "text": ...}

MARK = "70315846"  # digits only: changing case, trimming and escaping leave them alone
MARKS = re.compile(rf"{MARK}(\d{{8}})(\d{{8}})")
UNREAD = 10**8 - 1  # part number of a mark that only the repr of a part contains


def apply_chat_template(messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """``tokenizer.apply_chat_template(..., **options)``, with every message in a form that the template renders in full.

    Raises UsageError if the template refuses the conversation, or drops a message in every form.
    """
    try:
        return tokenizer.apply_chat_template(_renderable(messages, tokenizer), **options)
    except Exception as error:  # a template is a program, so anything can go wrong in it
        raise UsageError(f"the tokenizer's chat template refuses the conversation: {error}") from error


def text_of(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _one_part(content: Content) -> Content:
    return [{"type": "text", "text": text_of(content)}]


def _unchanged(content: Content) -> Content:
    return content


FORMS: tuple[Callable[[Content], Content], ...] = (_unchanged, text_of, _one_part)


def _renderable(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The messages, each in the first of FORMS that the template renders in full."""
    errors: list[Exception] = []

    @cache
    def rendered(form: Callable[[Content], Content]) -> set[int]:
        try:
            return _rendered([dict(message) | {"content": form(message["content"])} for message in messages], tokenizer)
        except Exception as error:
            errors.append(error)
            return set()

    def renderable(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
        for form in FORMS:
            if number in rendered(form):
                return dict(message) | {"content": form(message["content"])}
        raise errors[0] if errors else ValueError(f"it leaves out message {number + 1}, from the {message['role']}")

    return [renderable(number, message) for number, message in enumerate(messages)]


def _rendered(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The indices of the messages of which the template renders all text and nothing else."""
    marked = [message | {"content": _marked(number, message["content"])} for number, message in enumerate(messages)]
    text = str(tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False))
    found: dict[int, set[int]] = {}
    for number, part in MARKS.findall(text):
        found.setdefault(int(number), set()).add(int(part))
    parts = [1 if isinstance(message["content"], str) else len(message["content"]) for message in messages]
    return {number for number, count in enumerate(parts) if found.get(number, set()) == set(range(count))}


def _marked(number: int, content: Content) -> Content:
    if isinstance(content, str):
        return _mark(number, 0)
    return [{"type": "text", "text": _mark(number, part), "unread": _mark(number, UNREAD)} for part in range(len(content))]


def _mark(number: int, part: int) -> str:
    return f"{MARK}{number:08}{part:08}"
