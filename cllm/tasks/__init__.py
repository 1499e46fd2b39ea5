"""The tasks, one file each. A file of this folder that has a ``TASK`` is a task; nothing else lists them."""

import importlib
import pkgutil

from cllm.errors import UsageError
from cllm.tasks.base import Task

__all__ = ["DEFAULT_TASK", "OWN_PROMPTS", "get_task", "task_names"]

DEFAULT_TASK = "gsm8k"  # where a command is about none in particular
OWN_PROMPTS = "own_prompts"  # the task of prompts that belong to no dataset


def task_names(*, others: bool = False) -> list[str]:
    """The names of all tasks, sorted; with ``others`` also those that they have beside their own."""
    return sorted(name for task in _tasks().values() for name in (task.name, *(task.other_names if others else ())))


def get_task(name: str) -> Task:
    """The task called ``name``. Raises UsageError, naming the tasks there are, when there is none."""
    tasks = _tasks()
    for task in tasks.values():
        if name in (task.name, *task.other_names):
            return task
    raise UsageError(f"unknown task {name!r}; choose from {', '.join(sorted(tasks))}")


def _tasks() -> dict[str, Task]:
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    tasks = (getattr(module, "TASK", None) for module in modules)
    return {task.name: task for task in tasks if isinstance(task, Task)}
