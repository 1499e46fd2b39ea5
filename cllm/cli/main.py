"""The ``cllm`` command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "make": "make a model faster, with the same text: all that follows, in one command",
    "sft": "fine-tune a general model on a task's answers: the target model",
    "collect": "store the Jacobi trajectories of a target model",
    "train": "fine-tune the target model into a CLLM",
    "speedup": "measure tokens per forward and tokens per second against AR decoding",
    "tune": "find the window width and the fresh guesses that are fastest on this device",
    "acc": "measure accuracy on a task",
    "generate": "answer a file of prompts",
    "chat": "talk to a model",
    "export": "write a checkpoint that decodes by Jacobi iteration in plain transformers",
    "report": "make one page and pictures from result files",
    "serve": "serve a model under the OpenAI protocol",
    "demo": "watch AR and Jacobi decoding side by side in a web page",
    "fastchat": "FastChat's chat, model worker and servers with our decoder (needs fschat)",
    "tasks": "list the tasks with their data, metric and prompt templates",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Dispatch ``cllm COMMAND ...``; each command module has its own ``main(argv)``."""
    words = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: cllm COMMAND [options]\n\n" + "\n".join(f"  {n:<10}{t}" for n, t in COMMANDS.items())
    if not words or words[0] in ("-h", "--help"):
        print(usage + "\n\n`cllm COMMAND --help` lists a command's options.")
        return
    if words[0] not in COMMANDS:
        print(f"error: unknown command {words[0]!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"cllm.cli.{words[0]}").main(words[1:])
