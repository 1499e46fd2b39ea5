"""What decoding for people is given. This module imports no torch, so ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from cllm.options import DecodingOptions, ModelOptions, SamplingOptions, option


@dataclass(frozen=True, kw_only=True)
class DecoderArguments(DecodingOptions, ModelOptions):
    """The options of :func:`cllm.serving.decoder.open_decoder`. Raises UsageError for a value that is out of range."""

    block_size: int | None = option("block size; default: what `cllm tune` or the training stored, else 16", None, least=1)


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(SamplingOptions, DecoderArguments):
    """The options of :func:`cllm.serving.offline.generate_file`. Raises UsageError for a value that is out of range."""

    prompts: str = field(
        metadata={
            "help": "JSONL or a JSON list, plain or .gz: rows with `prompt` or `messages`, and, if wanted, `id` and `max_tokens`",
            "metavar": "FILE",
        }
    )
    output: str = field(metadata={"help": "JSONL of {id, reply, tokens, forwards, stop}, as they finish", "metavar": "FILE"})
    max_tokens: int = option("new tokens per reply at most", 512, least=1)
    batch_size: int = option("prompts decoded together at most", 8, least=1)
    max_slots: int | None = option("bound of the key-value cache: prompts together times the longest text, in tokens", None, least=1)
    seed: int = option("of the draws and the fresh guesses", 0)
    resume: bool = option("keep the replies of an earlier run", True)
