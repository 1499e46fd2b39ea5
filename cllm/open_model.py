"""A checkpoint with all that decoding text needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.models import load_model, load_tokenizer, read_record, stop_token_ids
from cllm.options import ModelOptions
from cllm.prompts import QUESTION, PromptTemplate, choose_template


@dataclass(frozen=True)
class OpenModel:
    """A model, what its config.json says about its training, and the template that questions are asked in."""

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

    @property
    def facts(self) -> dict[str, Any]:
        """How it was opened, for reports."""
        attention = self.model.config._attn_implementation
        return {"prompt_template": self.template.text, "dtype": self.dtype, "attn_implementation": attention}


def open_model(options: ModelOptions, plain_template: str = QUESTION, choose: Callable[..., PromptTemplate] = choose_template) -> OpenModel:
    """Load what ``options`` name. ``choose`` is given the template option, the plain template, the tokenizer and the record."""
    tokenizer = load_tokenizer(options.model)
    model = load_weights(options, options.model)
    record = read_record(model.config)
    return OpenModel(model, tokenizer, record, choose(options.prompt_template, plain_template, tokenizer, record))


def load_weights(options: ModelOptions, path: str) -> PreTrainedModel:
    """The model in ``path``, loaded as ``options`` say."""
    return load_model(path, dtype=options.dtype, device=options.device, attn_implementation=options.attn_implementation)
