"""Turning a conversation into token ids: the tokenizer's chat template, a template with a name, or a plain text."""

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
PLACE = "{question}"
REPLY = "{reply}"


@dataclass(frozen=True)
class Dialogue:
    """A template with a name, for checkpoints whose tokenizer has no chat template."""

    user: str  # a user turn, up to where the reply starts; contains {question}
    reply: str  # a reply and its end, where another user turn follows; contains {reply}
    system: str = ""  # stands first; a system message takes its place
    system_end: str = ""
    stops: tuple[str, ...] = ()  # tokens that end a reply, where the vocabulary has them

    @property
    def text(self) -> str:
        """The template of a single question."""
        return (self.system + self.system_end if self.system else "") + self.user

    def render(self, messages: Messages) -> str:
        system = "".join(text_of(m["content"]) for m in messages if m["role"] == "system") or self.system
        turns = [
            self.reply.replace(REPLY, text_of(m["content"]))
            if m["role"] == "assistant"
            else self.user.replace(PLACE, text_of(m["content"]))
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
    """``text`` is ``chat`` for the tokenizer's own template, the name of a dialogue, or a text with ``{question}``."""

    text: str

    def __post_init__(self) -> None:
        if self.text != CHAT and self.text not in DIALOGUES and PLACE not in self.text:
            raise UsageError(
                f"prompt_template must be one of {', '.join(template_names())}, or a text that contains {PLACE}, got {self.text!r}"
            )

    @property
    def label(self) -> str:
        """What reports call it."""
        if self.text == CHAT:
            return "chat template"
        return f"{self.text} template" if self.text in DIALOGUES else "plain text template"

    def encode(self, messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the conversation up to where the reply starts.

        A chat template that takes no system message, or writes nothing of it, gets it in front of the first question.
        Raises UsageError where the template refuses the conversation or leaves some of it out all the same.
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
        """The conversation as text, for all but the tokenizer's own template; earlier turns stand first."""
        return _BY_TEXT.get(self.text, Dialogue(self.text, "{reply}\n\n", system_end="\n\n")).render(messages)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids that end a reply in this template, beside the tokenizer's end-of-sequence token."""
        if self.text == CHAT:
            return _turn_end(tokenizer)
        vocabulary = tokenizer.get_vocab()
        stops = _BY_TEXT[self.text].stops if self.text in _BY_TEXT else ()
        return [vocabulary[stop] for stop in stops if stop in vocabulary]

    def end_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """What a model learns to write behind a reply."""
        return (self.stop_ids(tokenizer) or [tokenizer.eos_token_id])[0]


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that goes on: with what the tokenizer puts before it (BOS), without what it puts after it (EOS).

    BOS is not doubled where the text begins with it, as chat templates write it.
    """
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not begun).input_ids
    return ids if begun else ids[: len(ids) - _appended(tokenizer)]


def _appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer puts after every text."""
    alone = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    return next((count for count in range(len(whole)) if whole[: len(whole) - count][-len(alone) :] == alone), 0)


def template_names() -> list[str]:
    return [CHAT, PLAIN, *DIALOGUES]


def choose_template(
    option: str | None, plain_template: str, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]
) -> PromptTemplate:
    """The template to use: the user's ``option``, else the checkpoint's record's, else the tokenizer's, else plain.

    ``option`` may be ``chat``, ``plain`` (the task's ``plain_template``), a name of DIALOGUES, or a text with
    ``{question}``, in which ``\\n`` may be written as backslash and n.
    """
    text = option and option.replace("\\n", "\n")
    text = text or record.get("prompt_template") or (CHAT if tokenizer.chat_template else PLAIN)
    if text == CHAT and not tokenizer.chat_template:
        raise UsageError("prompt_template is 'chat', but the tokenizer has no chat template; use another one or a text")
    return PromptTemplate(plain_template if text == PLAIN else text)


def _fold_system(messages: Messages) -> list[dict[str, Any]]:
    """The conversation with its system message in front of the first user turn."""
    system = "\n\n".join(text_of(m["content"]) for m in messages if m["role"] == "system")
    turns = [dict(m) for m in messages if m["role"] != "system"]
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system}, *turns]
    first["content"] = f"{system}\n\n{text_of(first['content'])}"
    return turns


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the chat template puts behind a reply, such as ``<|im_end|>``; [] where it puts none."""
    mark = "reply-of-the-assistant"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    try:
        text = str(apply_chat_template(messages, tokenizer, tokenize=False))
    except UsageError:
        return []
    behind = text.rpartition(mark)[2].lstrip() if mark in text else ""
    ids = tokenizer(behind, add_special_tokens=False).input_ids if behind else []
    token = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return [ids[0]] if token is not None and token.special else []
