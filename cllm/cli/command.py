"""What all commands share: exit codes, logging, and options made from dataclasses."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any, NoReturn, TypeVar

from cllm.errors import LARGEST, UsageError, out_of_memory
from cllm.options import Options, options_of

Kind = TypeVar("Kind", bound=Options)
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Run a command's ``main``: a user's mistake is printed as one line, with exit status 2; Ctrl-C gives 130.

    The libraries' warnings and progress bars are silenced unless the user's environment says otherwise.
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
            leave_process_group()
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


def leave_process_group() -> None:
    """End the process group while the interpreter is whole: Gloo's threads may still hold tensors, and freeing one later aborts."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, instead of printing argparse's usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (`{self.prog} --help` lists the options)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves out defaults that say nothing: None, False, and empty ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default or type(action.default) in (int, float) else action.help


def parser(description: str, prog: str) -> Parser:
    return Parser(prog=prog, description=description, formatter_class=HelpFormatter)


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


def add_options(options: argparse.ArgumentParser, kind: type[Options]) -> None:
    """An option for each field of a dataclass of options; :func:`read` makes the dataclass of what was parsed."""
    for option in options_of(kind):
        metadata: dict[str, Any] = dict(option.field.metadata)
        default: Any = option.field.default
        flag, least = metadata.pop("flag", f"--{option.name}"), metadata.pop("least", None)
        how: dict[str, Any] = {"type": _parser_of(option.kind, least)}
        if option.choices:
            how["choices"] = option.choices
        if option.several:
            how["nargs"] = "+"
        if option.kind is bool:
            how = {"action": argparse.BooleanOptionalAction if default else "store_true"}
        if flag.startswith("-"):
            how |= {"dest": option.name, "default": default, "required": default is MISSING}
            if option.several:
                how["default"] = list(default)
        options.add_argument(flag, **how | metadata)


def read(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """The parsed options as their dataclass. Options that are not fields of it belong to the task."""
    names = {each.name for each in fields(kind)}
    others = {name: value for name, value in given.items() if name not in names}
    return kind(**{name: given[name] for name in given if name in names}, **({"task_options": others} if others else {}))


def read_with_output(options: argparse.ArgumentParser, kind: type[Kind], argv: Sequence[str] | None, output: str) -> tuple[Kind, str]:
    """Parse the options of ``kind`` and ``--output``, a file that must be writable; its default is ``output``."""
    add_options(options, kind)
    options.add_argument("--output", default=output, help="where the results go")
    given = vars(options.parse_args(argv))
    file = given.pop("output")
    args = read(kind, given)
    from cllm.evaluation.environment import check_writable

    check_writable(file)
    return args, file


def _parser_of(kind: type, least: float | None) -> Callable[[str], Any]:
    """What turns an option's word into its value."""
    if least is None:
        return kind
    return functools.partial(_integer, least=int(least)) if kind is int else functools.partial(_seconds, least=least)


@contextmanager
def memory_advice(message: str) -> Iterator[None]:
    """If memory runs out inside, raise UsageError with ``message``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UsageError(message) from error


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
    if value > LARGEST and least > 0:
        raise argparse.ArgumentTypeError(f"must be an integer <= {LARGEST}, got {text!r}")
    return value


def _seconds(text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds >= {least}, got {text!r}")
    return value


positive = functools.partial(_integer, least=1)  # the type of a script's option that counts something
