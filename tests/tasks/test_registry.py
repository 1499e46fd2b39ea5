"""cllm.tasks: tasks are found by their files, and stand apart from everything heavy."""

import subprocess
import sys
from pathlib import Path

import pytest

import cllm.tasks
from cllm.errors import UsageError
from cllm.tasks import get_task, task_names
from cllm.tasks.base import Task

REPOSITORY = Path(__file__).parents[2]

FIFTH_TASK = """
from cllm.tasks.base import Example, Task, text_field


class Echo(Task):
    name, description, fields, metric = "echo", "say it again", "text", "same"
    plain_template, default_question = "{question}\\n", "Hello?"

    def read(self, rows, split):
        for number, row in rows:
            text = text_field(row, "text")
            yield Example(f"echo-{split}-{number}", ({"role": "user", "content": text},), text, text)

    def score(self, reply, example):
        return {"same": reply == example.target}


TASK = Echo()
"""


@pytest.mark.parametrize("name", task_names())
def test_tasks_are_complete(name: str) -> None:
    task = get_task(name)
    assert isinstance(task, Task) and task.name == name
    assert task.description and task.fields and task.default_question
    assert task.plain_template.count("{question}") == 1
    assert task.hub is None or set(task.hub.splits) & {"train", "test"}


def test_unknown_task() -> None:
    with pytest.raises(UsageError, match=r"unknown task 'gsm'; choose from (\w+, )*gsm8k"):
        get_task("gsm")


def test_a_task_is_added_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo_task_of_test.py").write_text(FIFTH_TASK)
    before = task_names()
    monkeypatch.setattr(cllm.tasks, "__path__", [*cllm.tasks.__path__, str(tmp_path)])
    try:
        assert task_names() == sorted([*before, "echo"])
        example = next(iter(get_task("echo").read([(1, {"text": "hi"})], "test")))
        assert get_task("echo").score("hi", example) == {"same": True}  # type: ignore[arg-type]
    finally:
        sys.modules.pop("cllm.tasks.echo_task_of_test", None)


def test_tasks_never_import_torch_or_transformers() -> None:
    code = (
        "import sys, cllm.tasks, cllm.tasks.source\n"
        "for name in cllm.tasks.task_names(): cllm.tasks.get_task(name)\n"
        "from cllm.tasks.gsm8k import equal_numbers; assert equal_numbers('3', '3')\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
