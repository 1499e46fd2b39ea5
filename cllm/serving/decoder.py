"""A decoder for a checkpoint, set up as the checkpoint says."""

from __future__ import annotations

from collections.abc import Callable

from cllm.decoding import GREEDY, JacobiDecoder, Sampling
from cllm.evaluation.guess import check_guess, pick_guess
from cllm.models import default_width
from cllm.open_model import OpenModel, open_model
from cllm.options import AUTO
from cllm.prompts import QUESTION
from cllm.serving.arguments import DecoderArguments

Samples = Callable[[OpenModel], list[list[int]]]  # prompts to measure with, as token ids


def open_decoder(
    args: DecoderArguments,
    samples: str | Samples = "",
    *,
    plain_template: str = QUESTION,
    batch_size: int = 1,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> tuple[OpenModel, JacobiDecoder]:
    """The model that ``args`` name, and a decoder with its window, its fresh guesses and its stop tokens.

    ``samples``: a question, or a function that gives prompts, which ``guess="auto"`` measures on at this ``batch_size`` and
    ``sampling``. ``plain_template``: for a tokenizer without a chat template. ``seed``: of the fresh guesses. Raises UsageError
    where the model cannot be loaded or decoded, and for an unknown guess.
    """
    check_guess(args.guess)
    opened = open_model(args, plain_template)
    width = args.block_size or default_width(opened.record)
    prompts: list[list[int]] = []
    if args.guess == AUTO:
        prompts = [encode(opened, samples)] if isinstance(samples, str) else samples(opened)
    guess = pick_guess(args.guess, opened, width, prompts, batch_size=batch_size, sampling=sampling)
    stops, cache = opened.stops, args.prefix_cache
    return opened, JacobiDecoder(opened.model, width, eos_token_ids=stops, guess=guess, seed=seed, prefix_cache=cache)


def encode(opened: OpenModel, question: str) -> list[int]:
    """The token ids that ask a question."""
    return opened.template.encode([{"role": "user", "content": question}], opened.tokenizer)
