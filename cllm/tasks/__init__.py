"""The tasks, one file each. A file of this folder that has a ``TASK`` is a task; nothing else lists them."""

import importlib
import pkgutil

from cllm.errors import UsageError
from cllm.tasks.base import Task

__all__ = ["get_task", "task_names"]


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    return sorted(_tasks())


def get_task(name: str) -> Task:
    """The task called ``name``. Raises UsageError, naming the tasks there are, when there is none."""
    tasks = _tasks()
    if name not in tasks:
        raise UsageError(f"unknown task {name!r}; choose from {', '.join(sorted(tasks))}")
    return tasks[name]


def _tasks() -> dict[str, Task]:
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    tasks = (getattr(module, "TASK", None) for module in modules)
    return {task.name: task for task in tasks if isinstance(task, Task)}
