"""Turning a conversation into token ids: the tokenizer's chat template, or a plain text with a place for the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from cllm.errors import UsageError

CHAT = "chat"
PLAIN = "plain"
PLACE = "{question}"


@dataclass(frozen=True)
class PromptTemplate:
    """``text`` is ``chat`` for the tokenizer's own template, otherwise a text that contains ``{question}``."""

    text: str

    def __post_init__(self) -> None:
        if self.text != CHAT and PLACE not in self.text:
            raise UsageError(
                f"prompt_template must be {CHAT!r}, {PLAIN!r} or a text that contains {PLACE}, got {self.text!r}"
            )

    def encode(self, messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the conversation up to where the reply starts."""
        if self.text == CHAT:
            return tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        return tokenizer(self.render(messages)).input_ids

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A plain template's text; earlier turns stand in front of the last question."""
        return "".join(
            m["content"] + "\n\n" if m["role"] == "assistant" else self.text.replace(PLACE, m["content"])
            for m in messages
        )


def choose_template(
    option: str | None, plain_template: str, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]
) -> PromptTemplate:
    """The template to use: the user's ``option``, else what the checkpoint's record says, else the tokenizer's, else plain.

    ``option`` may be ``chat``, ``plain`` (the task's ``plain_template``) or a text with ``{question}``, in which ``\\n`` may
    be written as backslash and n.
    """
    text = option or record.get("prompt_template") or (CHAT if tokenizer.chat_template else PLAIN)
    if text == CHAT and not tokenizer.chat_template:
        raise UsageError("prompt_template is 'chat', but the tokenizer has no chat template; use 'plain' or a text")
    return PromptTemplate(plain_template if text == PLAIN else text.replace("\\n", "\n"))
