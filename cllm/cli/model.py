"""What commands make of a model's path and the options beside it (:func:`cllm.cli.command.add_model_options`)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.models import load_model, load_tokenizer, read_record, stop_token_ids
from cllm.prompts import PromptTemplate, choose_template


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint, what its config.json says of its making, and the form in which it is asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    record: dict[str, Any]
    template: PromptTemplate

    @property
    def stops(self) -> list[int]:
        return stop_token_ids(self.model, self.tokenizer, self.template)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def open_model(args: argparse.Namespace, plain_template: str, choose: Callable[..., PromptTemplate] = choose_template) -> OpenModel:
    """Load what ``args`` name. ``choose`` is given the option, the plain template, the tokenizer and the record."""
    tokenizer = load_tokenizer(args.model)
    model = load_weights(args, args.model)
    record = read_record(model.config)
    return OpenModel(model, tokenizer, record, choose(args.prompt_template, plain_template, tokenizer, record))


def load_weights(args: argparse.Namespace, path: str) -> PreTrainedModel:
    """The model in ``path``, loaded as the options say."""
    return load_model(path, dtype=args.dtype, device=args.device, attn_implementation=args.attn_implementation)
