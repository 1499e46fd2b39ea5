"""Loading models and tokenizers, and what their configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cllm.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORD = "cllm"  # the key in config.json under which a CLLM says how it was made


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    path: str, *, dtype: str | None = None, device: str | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Load a causal language model for decoding or training.

    Defaults: CUDA where there is a GPU, bfloat16 on it and float32 elsewhere, the model's own choice of SDPA or eager
    attention. Raises UsageError where nothing can be loaded from ``path``.
    """
    device = device or default_device()
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    kind = DTYPES[dtype] if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, **extra)
        return model.to(device).eval()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UsageError(f"cannot load a causal language model from {path!r}: {_first_line(error)}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can stop and pad; a missing pad token is replaced by the end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot load a tokenizer from {path!r}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {path!r} has no end-of-sequence token, so no response could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(config: PretrainedConfig) -> int | None:
    """How many tokens the model can look at, None where its configuration sets no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the generation configuration's and the tokenizer's."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ids |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return sorted(ids)


def read_record(config: PretrainedConfig) -> dict[str, Any]:
    """What a CLLM's config.json says of its making ({} for a target model): block_size, prompt_template, ..."""
    return dict(getattr(config, RECORD, None) or {})


def write_record(config: PretrainedConfig, record: Mapping[str, Any]) -> None:
    setattr(config, RECORD, dict(record))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
