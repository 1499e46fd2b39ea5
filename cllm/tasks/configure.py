"""A task with options of its own, for callers without a command line."""

from argparse import ArgumentParser, Namespace
from typing import Any

from cllm.errors import UsageError
from cllm.tasks import get_task
from cllm.tasks.base import Task


def configured_task(name: str, command: str, *, filename: str | None = None, model: str | None = None, **options: Any) -> Task:
    """The task called ``name`` as ``command`` (collect, speedup, acc or tune) uses it.

    ``options``: the task's own, by the names of their command-line options; the others have their defaults. Raises UsageError
    for an unknown task, an option that it does not have, and a combination that it refuses.
    """
    task, parser = get_task(name), ArgumentParser()
    task.add_options(parser, command)
    own = vars(parser.parse_args([]))
    if unknown := sorted(options.keys() - own.keys()):
        raise UsageError(f"task {name!r} has no option {', '.join(unknown)}; it has {', '.join(own) or 'none'}")
    return task.configure(Namespace(**own | options, filename=filename, model=model))
