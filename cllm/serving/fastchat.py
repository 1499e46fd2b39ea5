"""CLLMs in FastChat (optional package ``fschat``): its chat and its model worker decode with our decoder.

``cllm fastchat cli --model-path PATH`` calls :func:`register` and then runs ``fastchat.serve.cli``; other programs must call it
before they load a model. FastChat has a registry for adapters but none for generation functions, so its
``get_generate_stream_function`` is replaced. Tested with fschat 0.2.36.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from cllm.adapter import ADAPTER
from cllm.chat_template import apply_chat_template
from cllm.checkpoints import published_record
from cllm.decoding import JacobiDecoder, Sampling
from cllm.errors import LARGEST, UsageError
from cllm.models import attach_exported, context_length, folder_record, load_tokenizer, read_record, stop_token_ids
from cllm.prompts import CHAT, PromptTemplate, choose_template, prompt_ids
from cllm.serving.text import TextStream

logger = logging.getLogger(__name__)
Number = TypeVar("Number", int, float)
Item = TypeVar("Item", int, str)

DEFAULT_CONTEXT = 2048
PLAIN_CHAT = "USER: {question}\nASSISTANT: "  # for checkpoints without any template
_FASTCHAT_NAMES = {"vicuna": "vicuna_v1.1"}  # dialogues that FastChat has under another name, identical for all turns
_MARKS = ("the-first-question", "the-reply", "the-second-question", "the-system-message")


def register() -> None:
    """Make FastChat use this module for every CLLM. Idempotent.

    Raises UsageError if FastChat is not installed.
    """
    adapters, utils = _fastchat("fastchat.model.model_adapter"), _fastchat("fastchat.utils")
    if any(isinstance(adapter, CllmAdapter) for adapter in adapters.model_adapters):
        return
    ours = CllmAdapter()
    adapters.model_adapters.insert(0, ours)
    their_adapter, theirs = adapters.get_model_adapter, adapters.get_generate_stream_function
    their_context = utils.get_context_length

    def get_model_adapter(model_path: str) -> Any:
        """Ours first: FastChat's adapters match by the last part of the path, where any "vicuna" would win."""
        return ours if ours.match(model_path) else their_adapter(model_path)

    def get_generate_stream_function(model: Any, model_path: str) -> Any:
        return generate_stream if ours.match(model_path) else theirs(model, model_path)

    def get_context_length(config: Any) -> int:
        try:
            return their_context(config)
        except KeyError:  # fschat 0.2.36 expects rope_scaling["factor"], which transformers 5 no longer has
            return context_length(config) or DEFAULT_CONTEXT

    _replace("get_model_adapter", their_adapter, get_model_adapter)
    _replace("get_generate_stream_function", theirs, get_generate_stream_function)
    _replace("get_context_length", their_context, get_context_length)


def patch_streaming() -> None:
    """Fix streaming in FastChat's API server: fschat 0.2.36 calls ``json(ensure_ascii=False)``, which pydantic 2 refuses.

    Raises UsageError if FastChat is not installed.
    """
    protocol = _fastchat("fastchat.protocol.openai_api_protocol")
    for chunk in (protocol.ChatCompletionStreamResponse, protocol.CompletionStreamResponse):
        if hasattr(chunk, "model_dump_json"):  # pydantic 2, which never escapes non-ASCII characters
            chunk.json = lambda self, ensure_ascii=False, **options: self.model_dump_json(**options)


class CllmAdapter:
    """A FastChat model adapter (``fastchat.model.model_adapter.BaseModelAdapter``) for checkpoints that are CLLMs."""

    def match(self, model_path: str) -> bool:
        """Whether config.json has our record, or the path is the hub name of one of the paper's CLLMs."""
        return "target_model" in published_record(model_path) or bool(_local_record(model_path))

    def load_model(self, model_path: str, from_pretrained_kwargs: Mapping[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Raises UsageError for an adapter without its target model: transformers would switch it on for every token."""
        if Path(model_path, ADAPTER).is_file():
            raise UsageError(f"{model_path} holds only an adapter; for FastChat, `cllm export` it with its target model")
        kwargs = dict(from_pretrained_kwargs)
        kwargs["dtype"] = kwargs.pop("torch_dtype", None) or "auto"
        model = AutoModelForCausalLM.from_pretrained(model_path, **kwargs)
        attach_exported(model)
        return model.eval(), load_tokenizer(model_path)

    def load_compress_model(self, model_path: str, *args: Any, **kwargs: Any) -> Any:
        raise UsageError("FastChat's --load-8bit is not available for a CLLM")

    def get_default_conv_template(self, model_path: str) -> Any:
        """A FastChat ``Conversation`` that renders prompts as the checkpoint was trained with them."""
        tokenizer = load_tokenizer(model_path)
        record = _local_record(model_path) or read_record(AutoConfig.from_pretrained(model_path))
        template = choose_template(None, PLAIN_CHAT, tokenizer, record)
        conversations = _fastchat("fastchat.conversation")
        if template.text in _FASTCHAT_NAMES:
            return conversations.get_conv_template(_FASTCHAT_NAMES[template.text])
        parts = dialogue_parts(template, tokenizer)
        conversation = conversations.Conversation(
            name=f"cllm:{model_path}",
            sep_style=conversations.SeparatorStyle.NO_COLON_TWO,
            sep="",
            messages=[],
            stop_token_ids=sorted({tokenizer.eos_token_id, *template.stop_ids(tokenizer)}),
            **parts,
        )
        conversations.register_conv_template(conversation.copy(), override=True)  # for FastChat's !!load
        return conversation


def dialogue_parts(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments with which FastChat's ``Conversation`` renders prompts as ``template`` does.

    FastChat writes ``system_template`` with ``system_message``, then ``roles[0]`` question ``roles[1]`` reply ``sep2`` per turn.
    These parts are cut out of a rendered example. Raises UsageError for a template that drops, changes or reorders turns.
    """
    first, reply, second, system = _MARKS
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": second},
    ]
    start, prompt, between, last = _cut(_render(template, turns, tokenizer), (first, reply, second))
    user = _common_end(start, between)
    parts = {"roles": (user, last), "sep2": between[: len(between) - len(user)]}
    if prompt != last:
        logger.warning("the chat template ends the last question differently from earlier ones, which FastChat cannot do")
    before = start[: len(start) - len(user)]
    try:
        with_system = _render(template, [{"role": "system", "content": system}, *turns[:1]], tokenizer)
        head, tail, _ = _cut(with_system, (system, first))
    except UsageError:
        head, tail = "", ""
    tail = tail.removesuffix(user)
    if (head or tail) and before.startswith(head) and before.endswith(tail) and len(before) >= len(head + tail):
        default = before[len(head) : len(before) - len(tail)]
        return parts | {
            "system_template": _braces(head) + "{system_message}" + _braces(tail),
            "system_message": default,
        }
    return parts | {"system_template": "{system_message}", "system_message": before}


def generate_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    params: Mapping[str, Any],
    device: Any,
    context_len: int,
    stream_interval: int = 2,
    judge_sent_end: bool = False,
) -> Iterator[dict[str, Any]]:
    """FastChat's interface for generation: yields the text so far as it grows; the last item has the finish reason.

    Greedy unless ``params`` has a temperature. Raises ValueError if log-probabilities are requested, the prompt is empty, or a
    sampling option is out of range.
    """
    if params.get("logprobs") is not None:
        raise ValueError("Jacobi decoding gives no log-probabilities")
    sampling = _sampling(params)
    prompt = params["prompt"]
    ids = prompt_ids(prompt, tokenizer)
    if not ids:
        raise ValueError("the prompt is empty")
    room = max(1, min(_number(params, "max_new_tokens", 256, int), context_len - 2))
    ids = ids[-max(1, context_len - room - 1) :]
    eos = [*stop_token_ids(model, tokenizer), *_list_of(int, params, "stop_token_ids")]
    eos = [token for token in eos if 0 <= token <= LARGEST]
    decoder = JacobiDecoder(model, eos_token_ids=eos, prefix_cache=0)  # it serves only this request
    stream = TextStream(tokenizer, [stop for stop in _list_of(str, params, "stop") if stop])

    text = prompt if params.get("echo", True) else ""
    output: list[int] = []
    shown = 0
    for iteration in decoder.iterate([ids], max_new_tokens=room, sampling=sampling):
        new = iteration.choices_BW[0, : int(iteration.emitted_B[0])].tolist()
        output += new
        text += stream.put(new)
        if stream.stopped:
            break
        if len(output) - shown >= stream_interval:
            shown = len(output)
            yield _item(text, len(ids), len(output), None)
    text += stream.end()
    ended = stream.stopped or bool(output and output[-1] in eos)
    yield _item(text, len(ids), len(output), "stop" if ended else "length")


def _item(text: str, prompt_tokens: int, tokens: int, finish_reason: str | None) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    return {"text": text, "logprobs": None, "usage": usage, "finish_reason": finish_reason}


def _sampling(params: Mapping[str, Any]) -> Sampling:
    """The sampling that FastChat's own ``generate_stream`` would use: temperature or top_p near 0 is greedy, top_k -1 is off."""
    temperature, top_p = _number(params, "temperature", 0.0, float), _number(params, "top_p", 1.0, float)
    penalty = _number(params, "repetition_penalty", 1.0, float) or 1.0
    if temperature < 1e-5 or top_p < 1e-8:
        return Sampling(repetition_penalty=penalty)
    top_k = max(0, _number(params, "top_k", 0, int))
    return Sampling(temperature, top_k, top_p, repetition_penalty=penalty, seed=random.getrandbits(63))


def _number(params: Mapping[str, Any], name: str, default: Number, kind: Callable[[Any], Number]) -> Number:
    """A number that may be missing or null. Raises ValueError, the only exception that FastChat's worker survives."""
    value = params.get(name)
    try:
        return default if value is None else kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a number, got {value!r}") from error


def _list_of(kind: type[Item], params: Mapping[str, Any], name: str) -> list[Item]:
    """A parameter that may be one item, a list of items, or missing. Raises ValueError for items of another type."""
    value = params.get(name) or []
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, kind) for item in items):
        raise ValueError(f"{name} must hold items of type {kind.__name__} only, got {value!r}")
    return items


def _render(template: PromptTemplate, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if template.text != CHAT:
        return template.render(messages)
    return str(apply_chat_template(messages, tokenizer, add_generation_prompt=True, tokenize=False))


def _cut(text: str, marks: Sequence[str]) -> list[str]:
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            raise UsageError("the prompt template drops a turn, so it cannot be converted for FastChat")
        parts.append(part)
    return [*parts, text]


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _local_record(model_path: str) -> dict[str, Any]:
    """The record in a folder's config.json; {} for anything else, including damaged files."""
    try:
        return folder_record(model_path)
    except UsageError:
        return {}


def _fastchat(name: str) -> ModuleType:
    try:
        __import__(name)
    except ImportError as error:
        raise UsageError(f"this needs FastChat: pip install -e .[fastchat] (cannot import {error.name})") from error
    return sys.modules[name]


def _replace(function: str, old: Any, new: Any) -> None:
    """Replace a function in all modules of FastChat that have imported it by name."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "fastchat" and getattr(module, function, None) is old:
            setattr(module, function, new)
