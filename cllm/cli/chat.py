"""``cllm chat``, ``python -m cllm.inference.cli`` and ``scripts/chat.sh``."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper

from cllm.cli.command import add_options, command, parser, read
from cllm.errors import UsageError
from cllm.options import SamplingOptions, option
from cllm.serving.arguments import DecoderArguments
from cllm.tasks import DEFAULT_TASK, get_task, task_names

TASKS = task_names(others=True)
HELP = "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves"
COMMANDS = {
    "/stats": "the last answer's speed",
    "/ar": "switch between Jacobi and AR decoding; the last answer is written again for comparison",
    "/reset": "start a new conversation",
    "/save FILE": "write the conversation to a JSON file that the task sharegpt can read",
    "/help": "this list",
    "/exit": "leave",
}


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions, DecoderArguments):
    """The options of a chat."""

    cllm_type: str = option("whose plain template and default question to use", DEFAULT_TASK, choices=TASKS)
    max_new_seq_len: int = option("longest answer, in tokens", 512, least=1)
    seed: int | None = option("of the draws, for a reproducible conversation; default: a new one each time", None)
    stats: bool = option("show tokens per forward and tokens/s after every answer", False)


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser("Talk to a model; it answers by Jacobi decoding. Reads standard input, one turn a line.", "cllm chat")
    add_options(options, ChatOptions)
    args = read(ChatOptions, vars(options.parse_args(argv)))
    from cllm.serving.turns import MULTILINE_HELP, turns

    task = get_task(args.cllm_type)
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

    def __init__(self, args: ChatOptions, plain_template: str, question: str) -> None:
        from cllm.cli.screen import make_screen
        from cllm.decoding import JacobiDecoder
        from cllm.serving.chat import Conversation
        from cllm.serving.decoder import open_decoder

        sampling = args.sampling(random.getrandbits(32) if args.seed is None else args.seed)
        opened, self.jacobi = open_decoder(args, question, plain_template=plain_template, sampling=sampling)
        self.ar = JacobiDecoder(opened.model, 1, eos_token_ids=opened.stops, prefix_cache=args.prefix_cache)
        self.conversation = Conversation(self.jacobi, opened.tokenizer, opened.template, args.max_new_seq_len, sampling)
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
        """Switch from Jacobi to AR decoding or back; the last answer is written again."""
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
