"""What all commands share: exit codes, logging, and options that mean the same everywhere."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from cllm.errors import LARGEST, UsageError, out_of_memory

if TYPE_CHECKING:
    from cllm.decoding import Sampling

# Written out here, because `--help` must not wait for torch; tests hold them to cllm.models and cllm.attention.
DTYPES = ("float32", "bfloat16", "float16")
MASKABLE = ("sdpa", "eager")
STARTS = ("context", "uniform", "filler")  # what trajectories can start from, and decoding fill its windows with
GUESSES = (*STARTS, "prompt_lookup", "pool")
AUTO = "auto"  # a --guess: measure and pick
PREFIX_BYTES = 1 << 30
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Run a command's ``main``: what a user caused is printed as one line, with exit status 2; Ctrl-C gives 130.

    The libraries' warnings and bars are silenced, unless the user's environment says otherwise.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
        for noisy in ("httpx", "datasets", "transformers", "huggingface_hub"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            main(*args, **kwargs)
        except UsageError as error:
            _fail(str(error))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            _fail(f"{error.strerror}: {error.filename or 'while writing'}")
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            _fail("out of memory; try a smaller batch size")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, in the place of argparse's page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (`{self.prog} --help` lists the options)")


def parser(description: str, prog: str) -> Parser:
    return Parser(prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_task_option(options: argparse.ArgumentParser, task: str | None, command: str = "", argv: Sequence[str] | None = None) -> None:
    """``--task``, unless a per-dataset script has fixed it, and the task's own options of ``command``.

    ``argv`` is searched for the task, since its options must be there before everything is parsed. Afterwards ``args.task`` is
    its name, also where the path of its file was given. Raises UsageError where there is no such task.
    """
    from cllm.tasks import get_task, task_names

    if task is None:
        early = Parser(prog=options.prog, add_help=False)
        early.add_argument("--task")
        task = early.parse_known_args(argv)[0].task
        explain = f"one of: {', '.join(task_names())}; or the path of a file with a task; --task NAME --help shows its own options too"
        options.add_argument("--task", required=True, type=lambda name: get_task(name).name, help=explain)
    else:
        options.set_defaults(task=task)
    if task is not None:
        chosen = get_task(task)
        own = options.add_argument_group(f"options of the task {chosen.name}")
        chosen.add_options(own, command)  # type: ignore[arg-type]


def add_model_options(options: argparse.ArgumentParser, *names: str, required: bool = True) -> None:
    """The model's path under ``names`` (stored as ``model``; a word of its own where there are none), and how to load it."""
    from cllm.prompts import DIALOGUES

    named = {"dest": "model", "required": required, "metavar": "PATH"} if names else {"metavar": "MODEL"}
    options.add_argument(*names or ["model"], help="checkpoint folder or hub name", **named)
    options.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 elsewhere")
    options.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    options.add_argument("--attn_implementation", choices=MASKABLE, help="default: the model's own")
    options.add_argument(
        "--prompt_template",
        help=f"chat (the tokenizer's), plain (the task's), {', '.join(DIALOGUES)}, or a text with {{question}}; "
        "default: what the checkpoint was trained with, else chat where the tokenizer has it, else plain",
    )


def add_sampling_options(options: argparse.ArgumentParser) -> None:
    """How tokens are chosen; :func:`sampling_of` reads them."""
    options.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding; above it, tokens are drawn")
    options.add_argument("--top_k", type=int, default=0, help="draw from the k most likely tokens only; 0: from all")
    options.add_argument("--top_p", type=float, default=1.0, help="draw from the most likely tokens that have this probability")
    options.add_argument("--min_p", type=float, default=0.0, help="draw from tokens this times as likely as the likeliest")
    options.add_argument("--repetition_penalty", type=float, default=1.0, help="on tokens of the prompt and the reply so far; 1: none")


def sampling_of(args: argparse.Namespace, seed: int = 0) -> Sampling:
    """The options of :func:`add_sampling_options` with a seed. Raises UsageError for a value that is out of range."""
    from cllm.decoding import Sampling

    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, seed)


def add_guess_option(options: argparse.ArgumentParser, several: bool = False) -> None:
    """``--guess``: a strategy for fresh guesses, or ``several`` of them."""
    more = "; several are measured in turn, as methods of their own" if several else ""
    options.add_argument(
        "--guess",
        metavar="NAME",
        nargs="+" if several else None,
        help=f"fresh guesses of Jacobi decoding: {', '.join(GUESSES)}, or some of them joined by +, as in "
        f"prompt_lookup+pool, tried in that order; {AUTO} measures and picks. They decide the speed, never the text; "
        f"default: what `cllm tune` stored, else what the model was trained with{more}",
    )


def add_prefix_option(options: argparse.ArgumentParser) -> None:
    """``--prefix_cache``: the memory for prefix reuse."""
    options.add_argument(
        "--prefix_cache",
        metavar="BYTES",
        type=natural,
        default=PREFIX_BYTES,
        help="of keys and values kept, so that prompts which start like earlier texts are computed from there on; 0: none",
    )


def positive(text: str) -> int:
    """An option's value that must be an integer >= 1, and at most LARGEST."""
    return _integer(text, 1, LARGEST)


def natural(text: str) -> int:
    """An option's value that must be an integer >= 0."""
    return _integer(text, 0)


def _integer(text: str, least: int, most: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"must be an integer <= {most}, got {text!r}")
    return value


def seconds(text: str) -> float:
    """An option's value that must be a number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0, got {text!r}")
    return value
