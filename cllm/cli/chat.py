"""``cllm chat``, ``python -m cllm.inference.cli`` and ``scripts/chat.sh``."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper

from cllm.cli.command import (
    add_guess_option,
    add_model_options,
    add_sampling_options,
    command,
    parser,
    positive,
    sampling_of,
)
from cllm.errors import UsageError

HELP = "/stats shows the last answer's speed, /reset starts a new conversation, /exit leaves (so does Ctrl-D)"


def build_parser() -> argparse.ArgumentParser:
    from cllm.tasks import task_names

    options = parser("Talk to a model; it answers by Jacobi decoding. Reads standard input, one turn a line.", "cllm chat")
    add_model_options(options, "--model")
    options.add_argument(
        "--cllm_type", choices=task_names(), default="gsm8k", help="whose plain template and default question to use"
    )
    options.add_argument("--block_size", type=int, help="default: the one the checkpoint was trained with, else 16")
    options.add_argument("--max_new_seq_len", type=positive, default=512, help="longest answer, in tokens")
    add_guess_option(options)
    add_sampling_options(options)
    options.add_argument("--seed", type=int, help="of the draws, for a talk that can be repeated; default: a new one each time")
    options.add_argument("--stats", action="store_true", help="show tokens per forward and tokens/s after every answer")
    return options


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from cllm.tasks import get_task

    task = get_task(args.cllm_type)
    if args.seed is None:
        args.seed = random.getrandbits(32)
    conversation = _open(args, task.plain_template, task.default_question)
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if interactive:
        print(f"{HELP}\nAn empty line asks: {task.default_question}")
    statistics = "nothing has been answered yet"
    for line in _turns(interactive):
        question = line.strip()
        if question == "/exit":
            return
        if question == "/reset":
            conversation.reset()
        elif question == "/stats":
            print(statistics)
        elif question.startswith("/"):
            print(f"unknown command {question}; {HELP}")
        elif question or interactive:
            statistics = _answer(conversation, question or task.default_question, args.stats) or statistics


def _open(args: argparse.Namespace, plain_template: str, question: str):
    """The conversation to come; ``question`` is a sample of it, for ``--guess auto``."""
    from cllm.cli.guess import check_guess, pick_guess
    from cllm.cli.model import open_model
    from cllm.decoding import JacobiDecoder
    from cllm.models import default_width
    from cllm.serving.chat import Conversation

    sampling = sampling_of(args, args.seed)
    check_guess(args.guess)
    of = open_model(args, plain_template)
    size = args.block_size if args.block_size is not None else default_width(of.record)
    sample = of.template.encode([{"role": "user", "content": question}], of.tokenizer)
    guess = pick_guess(args.guess, of, size, [sample], sampling=sampling)
    decoder = JacobiDecoder(of.model, size, eos_token_ids=of.stops, guess=guess)
    return Conversation(decoder, of.tokenizer, of.template, args.max_new_seq_len, sampling)


def _turns(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from sys.stdin
        return
    try:
        import readline  # noqa: F401  # gives input() history and line editing
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _answer(conversation, question: str, show_statistics: bool) -> str | None:
    """Stream one answer; Ctrl-C stops the answer, not the program."""
    try:
        reply = conversation.ask(question, lambda piece: print(piece, end="", flush=True))
    except KeyboardInterrupt:
        print("\n(stopped)")
        return None
    except UsageError as error:
        if not conversation.messages and not sys.stdin.isatty():
            raise
        print(f"error: {error}; /reset starts a new conversation", file=sys.stderr)
        return None
    print()
    if show_statistics:
        print(f"[{reply.statistics()}]")
    return reply.statistics()
