"""``cllm generate``: answer a file of prompts."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from cllm.cli.command import (
    AUTO,
    add_guess_option,
    add_model_options,
    add_prefix_option,
    add_sampling_options,
    command,
    parser,
    positive,
    sampling_of,
)
from cllm.errors import UsageError

if TYPE_CHECKING:
    from cllm.cli.model import OpenModel

logger = logging.getLogger(__name__)


def options() -> argparse.ArgumentParser:
    result = parser(
        "Answer a file of prompts by Jacobi decoding with continuous batching. Run again, it goes on where it was stopped.",
        "cllm generate",
    )
    add_model_options(result, "--model")
    result.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="JSONL or a JSON list, plain or .gz: rows with `prompt` or `messages`, and, if wanted, `id` and `max_tokens`",
    )
    result.add_argument("--output", required=True, metavar="FILE", help="JSONL of {id, reply, tokens, forwards, stop}, as they finish")
    result.add_argument("--block_size", type=positive, help="default: what `cllm tune` or the training stored, else 16")
    result.add_argument("--max_tokens", type=positive, default=512, help="new tokens per reply at most")
    result.add_argument("--batch_size", type=positive, default=8, help="prompts decoded together at most")
    result.add_argument(
        "--max_slots", type=positive, help="bound of the key-value cache: prompts together times the longest text, in tokens"
    )
    add_guess_option(result)
    add_prefix_option(result)
    add_sampling_options(result)
    result.add_argument("--seed", type=int, default=0, help="of the draws and the fresh guesses")
    result.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="keep the replies of an earlier run")
    return result


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = options().parse_args(argv)
    sampling = sampling_of(args, args.seed)
    from tqdm import tqdm

    from cllm.cli.guess import check_guess, pick_guess
    from cllm.cli.model import open_model
    from cllm.decoding import JacobiDecoder, Queue
    from cllm.evaluation.environment import check_writable
    from cllm.models import default_width, weights_stamp
    from cllm.prompts import QUESTION
    from cllm.result_file import ResultFile
    from cllm.serving.offline import Prompt, answer, read_prompts

    check_guess(args.guess)
    check_writable(args.output)
    total, bad = _count(args.prompts)
    of = open_model(args, QUESTION)
    width = args.block_size or default_width(of.record)
    settings = {
        "model": args.model,
        "weights": weights_stamp(args.model),
        "prompt_template": of.template.text,
        "max_tokens": args.max_tokens,
        "dtype": of.dtype,
        "sampling": asdict(sampling),
    }
    results = ResultFile(args.output, settings, args.resume, "--output")
    samples = _samples(args.prompts, of) if args.guess == AUTO and len(results.rows) < total else []
    guess = pick_guess(args.guess, of, width, samples, batch_size=args.batch_size, sampling=sampling)
    decoder = JacobiDecoder(of.model, width, eos_token_ids=of.stops, guess=guess, seed=args.seed, prefix_cache=args.prefix_cache)
    queue = Queue(decoder, args.batch_size, args.max_slots)
    waiting = (item for item in read_prompts(args.prompts) if isinstance(item, Prompt) and item.id not in results.rows)
    answers = answer(queue, of.tokenizer, of.template, waiting, max_tokens=args.max_tokens, sampling=sampling)
    with tqdm(total=total, initial=len(results.rows), unit="reply", file=sys.stderr, disable=None) as bar:
        for row in answers:
            results.append([row])
            bar.update()
    errors = sum("error" in row for row in results.rows.values())
    print(f"{len(results.rows) - errors} replies in {args.output}")
    for reason, number in {"prompts that cannot be answered (see `error`)": errors, **bad}.items():
        if number:
            print(f"  {number} {reason}")


def _count(path: str) -> tuple[int, Counter[str]]:
    """How many prompts a file has, and its bad rows by reason. Raises UsageError where there is no prompt."""
    from cllm.serving.offline import Prompt, read_prompts

    total, bad = 0, Counter[str]()
    for item in read_prompts(path):
        if isinstance(item, Prompt):
            total += 1
            continue
        bad[f"rows passed over: {item.reason}"] += 1
        logger.warning("%s: passed over %s", path, item)
    if not total:
        raise UsageError(f"no prompt in {path}; expected rows with `prompt` or `messages`")
    return total, bad


def _samples(path: str, of: OpenModel) -> list[list[int]]:
    """The first prompts of a file as token ids, without those that the template refuses."""
    from cllm.cli.guess import SAMPLE_PROMPTS
    from cllm.serving.offline import Prompt, read_prompts

    samples: list[list[int]] = []
    for item in read_prompts(path):
        if len(samples) == SAMPLE_PROMPTS:
            break
        if isinstance(item, Prompt):
            with suppress(UsageError):
                samples.append(of.template.encode(item.messages, of.tokenizer))
    return samples
