"""``cllm chat``, ``python -m cllm.inference.cli`` and ``scripts/chat.sh``."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper

from cllm.cli.command import (
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

HELP = "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves"
COMMANDS = {
    "/stats": "the last answer's speed",
    "/ar": "switch between Jacobi and AR decoding; the last answer is written again, to compare",
    "/reset": "start a new conversation",
    "/save FILE": "write the conversation into a JSON file, in the form that the task sharegpt reads",
    "/help": "this list",
    "/exit": "leave",
}


def build_parser() -> argparse.ArgumentParser:
    from cllm.tasks import DEFAULT_TASK, task_names

    options = parser("Talk to a model; it answers by Jacobi decoding. Reads standard input, one turn a line.", "cllm chat")
    add_model_options(options, "--model")
    options.add_argument(
        "--cllm_type",
        choices=task_names(others=True),
        default=DEFAULT_TASK,
        help="whose plain template and default question to use",
    )
    options.add_argument("--block_size", type=positive, help="default: what `cllm tune` or the training stored, else 16")
    options.add_argument("--max_new_seq_len", type=positive, default=512, help="longest answer, in tokens")
    add_guess_option(options)
    add_prefix_option(options)
    add_sampling_options(options)
    options.add_argument("--seed", type=int, help="of the draws, for a talk that can be repeated; default: a new one each time")
    options.add_argument("--stats", action="store_true", help="show tokens per forward and tokens/s after every answer")
    return options


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from cllm.serving.turns import MULTILINE_HELP, turns
    from cllm.tasks import get_task

    task = get_task(args.cllm_type)
    if args.seed is None:
        args.seed = random.getrandbits(32)
    chat = Chat(args, task.plain_template, task.default_question)
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if interactive:
        print(f"{HELP}\n{MULTILINE_HELP}\nAn empty line asks: {task.default_question}")
    for turn in turns(_prompt if interactive else _piped()):
        text = turn.strip()
        if text == "/exit":
            return
        if text or interactive:
            chat.take(text or task.default_question)
    if interactive:
        print()


class Chat:
    """A conversation with the model of ``args``, and its commands. ``question``: a sample of it, for ``--guess auto``."""

    def __init__(self, args: argparse.Namespace, plain_template: str, question: str) -> None:
        from cllm.cli.guess import check_guess, pick_guess
        from cllm.cli.model import open_model
        from cllm.cli.screen import make_screen
        from cllm.decoding import JacobiDecoder
        from cllm.models import default_width
        from cllm.serving.chat import Conversation

        sampling = sampling_of(args, args.seed)
        check_guess(args.guess)
        of = open_model(args, plain_template)
        size = args.block_size if args.block_size is not None else default_width(of.record)
        sample = of.template.encode([{"role": "user", "content": question}], of.tokenizer)
        guess = pick_guess(args.guess, of, size, [sample], sampling=sampling)
        self.jacobi = JacobiDecoder(of.model, size, eos_token_ids=of.stops, guess=guess, prefix_cache=args.prefix_cache)
        self.ar = JacobiDecoder(of.model, 1, eos_token_ids=of.stops, prefix_cache=args.prefix_cache)
        self.conversation = Conversation(self.jacobi, of.tokenizer, of.template, args.max_new_seq_len, sampling)
        self.screen, self.always_statistics = make_screen(), args.stats

    def take(self, turn: str) -> None:
        """A question or a command. Ctrl-C stops an answer, not the program."""
        command, _, rest = turn.partition(" ")
        try:
            match command:
                case "/help":
                    print("\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items()))
                case "/stats":
                    last = self.conversation.last
                    print(last.statistics() if last else "nothing has been answered yet")
                case "/reset":
                    self.conversation.reset()
                case "/save":
                    self.save(rest.strip())
                case "/ar":
                    self.switch()
                case _ if turn.startswith("/"):
                    print(f"unknown command {turn}; {HELP}")
                case _:
                    self.ask(turn)
        except KeyboardInterrupt:
            print("(stopped)")

    def ask(self, question: str) -> None:
        try:
            with self.screen as screen:
                reply = self.conversation.ask(question, screen.show)
        except UsageError as error:
            if not self.conversation.messages and not sys.stdin.isatty():
                raise
            print(f"error: {error}; /reset starts a new conversation", file=sys.stderr)
            return
        if self.always_statistics:
            print(f"[{reply.statistics()}]")

    def switch(self) -> None:
        """From Jacobi to AR decoding or back; the last answer is written again."""
        to_ar = self.conversation.decoder is self.jacobi
        self.conversation.decoder = self.ar if to_ar else self.jacobi
        print("AR decoding from now on" if to_ar else f"Jacobi decoding from now on, block size {self.jacobi.block_size}")
        if before := self.conversation.last:
            with self.screen as screen:
                reply = self.conversation.answer_again(screen.show)
            print(f"[{reply.statistics()}]\n[{reply.compared_with(before)}]")

    def save(self, path: str) -> None:
        if not path:
            print("say where: /save FILE")
            return
        try:
            self.conversation.save(path)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
        else:
            print(f"{len(self.conversation.messages)} messages saved in {path}")


def _prompt(prompt: str) -> str:
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() history and line editing
    return input(prompt)


def _piped() -> Callable[[str], str]:
    lines = iter(sys.stdin)

    def read(prompt: str) -> str:
        for line in lines:
            return line.removesuffix("\n")
        raise EOFError

    return read
