"""The tokenizer's own chat template, given what each message says in the form that the template writes: a text, or parts.

Templates of models that also take images loop over a list of parts, and write nothing of a text; others write a text only,
and of a list its Python form. Which is which, only the template knows: it is asked with marks for contents.
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

MARK = "70315846"  # of digits, which no change of case, no trimming and no escaping touches
MARKS = re.compile(rf"{MARK}(\d{{8}})(\d{{8}})")
UNREAD = 10**8 - 1  # the number of a mark that only the Python form of a part has


def apply_chat_template(messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """``tokenizer.apply_chat_template(..., **options)`` with nothing left out.

    Raises UsageError where the template refuses the conversation, or leaves a message out in every form.
    """
    try:
        return tokenizer.apply_chat_template(_as_taken(messages, tokenizer), **options)
    except Exception as error:  # a template is a program: beside its own refusals, anything may go wrong in it
        raise UsageError(f"the tokenizer's chat template refuses the conversation: {error}") from error


def text_of(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _one_part(content: Content) -> Content:
    return [{"type": "text", "text": text_of(content)}]


def _as_it_is(content: Content) -> Content:
    return content


FORMS: tuple[Callable[[Content], Content], ...] = (_as_it_is, text_of, _one_part)


def _as_taken(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The messages, each in the first form that the template writes the whole of."""
    errors: list[Exception] = []

    @cache
    def written(form: Callable[[Content], Content]) -> set[int]:
        try:
            return _written([dict(message) | {"content": form(message["content"])} for message in messages], tokenizer)
        except Exception as error:
            errors.append(error)
            return set()

    def taken(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
        for form in FORMS:
            if number in written(form):
                return dict(message) | {"content": form(message["content"])}
        raise errors[0] if errors else ValueError(f"it leaves out message {number + 1}, of the {message['role']}")

    return [taken(number, message) for number, message in enumerate(messages)]


def _written(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The numbers of the messages whose texts, and nothing else of them, the template writes."""
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
