"""Turning conversations into token ids with the tokenizer's chat template, a named template, or a plain-text one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cllm.chat_template import Messages, apply_chat_template, text_of
from cllm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"
PLAIN = "plain"
QUESTION = "{question}"
REPLY = "{reply}"


@dataclass(frozen=True)
class Dialogue:
    """A prompt template for checkpoints whose tokenizer has no chat template."""

    user: str  # a user turn, up to the start of the reply; contains {question}
    reply: str  # a reply with its end, when another user turn follows; contains {reply}
    system: str = ""  # the default system message
    system_end: str = ""
    stops: tuple[str, ...] = ()  # tokens that end a reply, if the vocabulary has them

    @property
    def text(self) -> str:
        """The template of a single question."""
        return (self.system + self.system_end if self.system else "") + self.user

    def render(self, messages: Messages) -> str:
        system = "".join(text_of(m["content"]) for m in messages if m["role"] == "system") or self.system
        turns = [
            self.reply.replace(REPLY, text_of(m["content"]))
            if m["role"] == "assistant"
            else self.user.replace(QUESTION, text_of(m["content"]))
            for m in messages
            if m["role"] != "system"
        ]
        return "".join([system + self.system_end if system else "", *turns])


DIALOGUES = {
    "abel": Dialogue(  # GAIR/Abel: the paper's GSM8K models
        user="Question:\n{question}\nAnswer:\nLet's think step by step.\n", reply="{reply}\n\n", system_end="\n\n"
    ),
    "deepseek-instruct": Dialogue(  # as the paper's Spider and CodeSearchNet models were trained
        user="### Instruction:\n{question}\n### Response:\n",
        reply="{reply}\n<|EOT|>\n",
        system_end="\n",
        stops=("<|EOT|>",),
    ),
    "vicuna": Dialogue(  # Vicuna v1.1 and later: the paper's ShareGPT models
        user="USER: {question} ASSISTANT:",
        reply=" {reply}</s>",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        system_end=" ",
        stops=("</s>",),
    ),
}
_BY_TEXT = {dialogue.text: dialogue for dialogue in DIALOGUES.values()} | DIALOGUES


@dataclass(frozen=True)
class PromptTemplate:
    """``text``: ``chat`` for the tokenizer's chat template, a name in DIALOGUES, or a text that contains ``{question}``.

    Raises UsageError for any other text.
    """

    text: str

    def __post_init__(self) -> None:
        if self.text != CHAT and self.text not in DIALOGUES and QUESTION not in self.text:
            raise UsageError(
                f"prompt_template must be one of {', '.join(template_names())}, or a text that contains {QUESTION}, got {self.text!r}"
            )

    @property
    def label(self) -> str:
        """Its name in reports."""
        if self.text == CHAT:
            return "chat template"
        return f"{self.text} template" if self.text in DIALOGUES else "plain text template"

    def encode(self, messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the conversation, up to the start of the reply.

        If a chat template refuses or drops the system message, it is put before the first question. Raises UsageError if
        the template still refuses the conversation or drops a part of it.
        """
        if self.text != CHAT:
            return prompt_ids(self.render(messages), tokenizer)
        try:
            ids: list[int] = apply_chat_template(messages, tokenizer, add_generation_prompt=True, tokenize=True, return_dict=False)
        except UsageError:
            if all(m["role"] != "system" for m in messages):
                raise
            ids = self.encode(_fold_system(messages), tokenizer)
        return ids

    def render(self, messages: Messages) -> str:
        """The conversation as text, up to the start of the reply; for any template but ``chat``."""
        return _BY_TEXT.get(self.text, Dialogue(self.text, "{reply}\n\n", system_end="\n\n")).render(messages)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids that end a reply in this template, apart from the tokenizer's end-of-sequence token."""
        if self.text == CHAT:
            return _turn_end(tokenizer)
        vocabulary = tokenizer.get_vocab()
        stops = _BY_TEXT[self.text].stops if self.text in _BY_TEXT else ()
        return [vocabulary[stop] for stop in stops if stop in vocabulary]

    def end_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The id that a model learns to write after a reply."""
        return (self.stop_ids(tokenizer) or [tokenizer.eos_token_id])[0]


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text to be continued: with the tokenizer's BOS, unless the text starts with it, and without its EOS."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not has_bos).input_ids
    return ids if has_bos else ids[: len(ids) - _appended(tokenizer)]


def _appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens the tokenizer appends to every text."""
    alone = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    return next((count for count in range(len(whole)) if whole[: len(whole) - count][-len(alone) :] == alone), 0)


def template_names() -> list[str]:
    return [CHAT, PLAIN, *DIALOGUES]


def choose_template(
    option: str | None, plain_template: str, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]
) -> PromptTemplate:
    """The first template found: the user's ``option``, the checkpoint record's, the tokenizer's, ``plain_template``.

    ``option``: ``chat``, ``plain`` (for ``plain_template``), a name in DIALOGUES, or a text that contains ``{question}``, in
    which backslash and n stand for a newline. Raises UsageError for any other text, and for ``chat`` without a chat template.
    """
    text = option and option.replace("\\n", "\n")
    text = text or record.get("prompt_template") or (CHAT if tokenizer.chat_template else PLAIN)
    if text == CHAT and not tokenizer.chat_template:
        raise UsageError("prompt_template is 'chat', but the tokenizer has no chat template; use another one or a text")
    return PromptTemplate(plain_template if text == PLAIN else text)


def _fold_system(messages: Messages) -> list[dict[str, Any]]:
    """The conversation with its system message put before the first user turn."""
    system = "\n\n".join(text_of(m["content"]) for m in messages if m["role"] == "system")
    turns = [dict(m) for m in messages if m["role"] != "system"]
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system}, *turns]
    first["content"] = f"{system}\n\n{text_of(first['content'])}"
    return turns


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the chat template puts after a reply, such as ``<|im_end|>``; [] if there is none."""
    mark = "reply-of-the-assistant"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    try:
        text = str(apply_chat_template(messages, tokenizer, tokenize=False))
    except UsageError:
        return []
    after = text.rpartition(mark)[2].lstrip() if mark in text else ""
    ids = tokenizer(after, add_special_tokens=False).input_ids if after else []
    token = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return [ids[0]] if token is not None and token.special else []
