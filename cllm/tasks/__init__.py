"""Tasks by name: those of this folder, those that installed packages register, and those in a file of your own.

A file of this folder that ends in ``TASK = SomeTask()`` is a task; nothing else lists them. Another package registers its tasks
in its pyproject.toml::

    [project.entry-points."cllm.tasks"]
    word_sums = "my_package.tasks:TASK"
"""

import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from cllm.errors import UsageError
from cllm.files import StrPath
from cllm.tasks.base import Task

__all__ = ["DEFAULT_TASK", "OWN_PROMPTS", "get_task", "is_task", "task_names"]

DEFAULT_TASK = "gsm8k"  # for commands that need the name of some task
OWN_PROMPTS = "own_prompts"  # the task of prompts that belong to no dataset

_GROUP = "cllm.tasks"
_FILE = ".py"
_SHAPE = "TASK must be an object of a class derived from cllm.tasks.base.Task, with example(row) and score(reply, example)"
_TEXTS = ("name", "description", "fields", "metric")

_from_files: dict[str, Task] = {}  # those that get_task was given by path


def task_names(*, others: bool = False) -> list[str]:
    """The names of all tasks, sorted; with ``others``, also the aliases that some of them have."""
    tasks = [*_built_in().values(), *_from_files.values()]
    names = {name for task in tasks for name in (task.name, *(task.other_names if others else ()))}
    return sorted(names | entry_points(group=_GROUP).names)


def is_task(name: StrPath) -> bool:
    """Whether ``name`` names a task or is the path of a Python file."""
    return str(name).endswith(_FILE) or str(name) in task_names(others=True)


def get_task(name: StrPath) -> Task:
    """The task called ``name``, or the one that the Python file ``name``, which ends in ``.py``, has as ``TASK``.

    A file is run at each call; from then on, this process also finds its task by name.

    Raises:
        UsageError: nothing has that name, several tasks have it, or what was found is not a task.
    """
    if not str(name).endswith(_FILE):
        found = _tasks_called(str(name))
        return _only(found) if found else _unknown(f"unknown task {str(name)!r}")
    path = Path(name).resolve()
    if not path.is_file():
        _unknown(f"no such file: {path}")
    task = _checked(str(path), lambda: _run(path).TASK)
    _from_files.pop(task.name, None)
    _only({str(path): task} | _tasks_called(task.name))
    _from_files[task.name] = task
    return task


def _tasks_called(name: str) -> dict[str, Task]:
    """The tasks of that name, by where they come from."""
    if name in _from_files:
        return {name: _from_files[name]}
    built_in = {module: task for module, task in _built_in().items() if name in (task.name, *task.other_names)}
    return built_in | {point.value: _of_package(point) for point in entry_points(group=_GROUP, name=name)}


def _only(found: dict[str, Task]) -> Task:
    (task, *others) = found.values()
    if others:
        raise UsageError(f"{len(found)} tasks are called {task.name!r}: {', '.join(sorted(found))}; each needs a name of its own")
    return task


def _unknown(problem: str) -> NoReturn:
    raise UsageError(f"{problem}; choose from {', '.join(task_names())}, or pass the path of a {_FILE} file that has a TASK")


def _built_in() -> dict[str, Task]:
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.__name__: module.TASK for module in modules if hasattr(module, "TASK")}


def _of_package(point: EntryPoint) -> Task:
    task = _checked(point.value, point.load)
    if task.name != point.name:
        raise UsageError(f"the entry point {point.name!r} must give the task of that name, got {task.name!r} from {point.value}")
    return task


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cllm_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # there dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return module


def _checked(place: str, load: Callable[[], Any]) -> Task:
    """What ``load`` gives, if it is a task. Raises UsageError otherwise, and for whatever ``load`` raises."""
    try:
        task = load()
    except (Exception, SystemExit) as error:
        raise UsageError(f"cannot load a task from {place} ({type(error).__name__}: {error}); {_SHAPE}") from error
    if not isinstance(task, Task):
        raise UsageError(f"{place} has {str(task)[:100]} as its task; {_SHAPE}")
    if missing := [name for name in _TEXTS if not isinstance(getattr(task, name, None), str)]:
        raise UsageError(f"the task of {place} has no {' or '.join(missing)}; it needs the texts {', '.join(_TEXTS)}")
    if not re.fullmatch(r"[\w-]+", task.name):
        raise UsageError(f"a task's name must be letters, digits, _ and -, got {task.name!r} in {place}")
    return task
