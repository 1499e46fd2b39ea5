"""What all commands share: exit codes, logging, and options that mean the same everywhere."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable

from cllm.errors import UsageError


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Run a command's ``main``: what a user caused is printed as one line, with exit status 2; Ctrl-C gives 130."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
        for noisy in ("httpx", "datasets", "transformers", "huggingface_hub"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        try:
            main(*args, **kwargs)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run


def parser(description: str, prog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_task_option(options: argparse.ArgumentParser, task: str | None) -> None:
    """``--task``, unless a per-dataset script has fixed it."""
    if task is not None:
        options.set_defaults(task=task)
        return
    from cllm.tasks import task_names

    options.add_argument("--task", required=True, help=f"one of: {', '.join(task_names())}")


def add_model_options(options: argparse.ArgumentParser, *names: str) -> None:
    """The model's path under ``names`` (stored as ``model``), and how to load it."""
    from cllm.attention import MASKABLE
    from cllm.models import DTYPES

    options.add_argument(*names, dest="model", required=True, metavar="PATH", help="checkpoint folder or hub name")
    options.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 elsewhere")
    options.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    options.add_argument("--attn_implementation", choices=MASKABLE, help="default: the model's own")
    options.add_argument(
        "--prompt_template",
        help="chat (the tokenizer's), plain (the task's), or a text with {question}; default: what the checkpoint was trained "
        "with, else chat where the tokenizer has it, else plain",
    )


def positive(text: str) -> int:
    """An option's value that must be an integer >= 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return value
