"""cllm.tasks: where tasks are found, what is refused as one, and that they stand apart from everything heavy."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused

import cllm.tasks
from cllm.cli import collect, make
from cllm.cli import tasks as command
from cllm.errors import UsageError
from cllm.files import BadRow
from cllm.tasks import get_task, task_names
from cllm.tasks.base import BadField, Example, Task, user_turn

REPOSITORY = Path(__file__).parents[2]

ECHO = """
from cllm.tasks.base import Example, Task, text_field, user_turn


class Echo(Task):
    name, description, fields, metric = "echo", "say it again", "text", "same"

    def example(self, row):
        text = text_field(row, "text")
        return Example(user_turn(text), text, text)

    def score(self, reply, example):
        return {"same": reply == example.target}


TASK = Echo()
"""


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cllm.tasks, "_from_files", {})


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


def scores(task: Task) -> bool:
    (example,) = task.read([(1, {"text": "hi"})], "test")
    assert isinstance(example, Example) and example.id == "echo-test-1"
    return task.score("hi", example) == {"same": True}


def test_a_file_of_the_folder_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo_task_of_test.py").write_text(ECHO)
    before = task_names()
    monkeypatch.setattr(cllm.tasks, "__path__", [*cllm.tasks.__path__, str(tmp_path)])
    try:
        assert task_names() == sorted([*before, "echo"]) and scores(get_task("echo"))
    finally:
        sys.modules.pop("cllm.tasks.echo_task_of_test", None)


def test_a_file_anywhere_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(ECHO)
    assert scores(get_task(path)) and scores(get_task("echo")) and "echo" in task_names()
    path.write_text(ECHO.replace("say it again", "changed"))
    assert get_task(path).description == get_task("echo").description == "changed"


def install(site: Path, value: str, name: str = "echo", package: str = "some_echo", text: str = ECHO) -> None:
    """What pip leaves of a package that registers a task."""
    (site / f"{package}.py").write_text(text)
    facts = site / f"{package}-1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[cllm.tasks]\n{name} = {value}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def test_a_package_registers_a_task(site: Path) -> None:
    install(site, "some_echo:TASK")
    assert "echo" in task_names() and scores(get_task("echo"))
    del sys.modules["some_echo"]


def test_a_broken_package_breaks_its_own_task_only(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "no_such_module:TASK")
    assert "echo" in task_names() and get_task("gsm8k").name == "gsm8k"
    assert "No module named 'no_such_module'" in refused(capsys, collect.main, "--task", "echo", "--model", "m")


def test_two_tasks_of_one_name(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in "12":
        install(site, f"echo_{number}:TASK", package=f"echo_{number}")
    both = "2 tasks are called 'echo': echo_1:TASK, echo_2:TASK; each needs a name of its own"
    assert refused(capsys, collect.main, "--task", "echo", "--model", "m") == both
    for number in "12":
        del sys.modules[f"echo_{number}"]
    path = tmp_path / "my.py"
    path.write_text(ECHO.replace('"echo"', '"gsm8k"'))
    message = refused(capsys, collect.main, "--task", path, "--model", "m")
    assert message == f"2 tasks are called 'gsm8k': {path}, cllm.tasks.gsm8k; each needs a name of its own"
    assert type(get_task("gsm8k")).__name__ == "Gsm8k"


def test_a_registered_name_is_the_tasks_own(site: Path) -> None:
    install(site, "other_echo:TASK", name="sound", package="other_echo")
    with pytest.raises(UsageError, match="entry point 'sound' must give the task of that name, got 'echo'"):
        get_task("sound")
    del sys.modules["other_echo"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no attribute 'TASK'"),
        ("TASK = 7\n", "has 7 as its task"),
        (ECHO.replace("TASK = Echo()", "TASK = Echo"), "as its task; TASK must be an object of a class derived from"),
        ("1 / 0\n", "(ZeroDivisionError: division by zero)"),
        ("import sys; sys.exit(3)\n", "(SystemExit: 3)"),
        ("def f(:\n", "SyntaxError"),
        ("import nonesuch\n", "No module named 'nonesuch'"),
        (ECHO.replace("def score", "def scores"), "abstract method"),
        (ECHO.replace("def example", "def examples"), "abstract method"),
        (ECHO.replace("description, ", "").replace('"say it again", ', ""), "has no description; it needs the texts name, description"),
        (ECHO.replace('"echo"', '"my echo:1"'), "must be letters, digits, _ and -, got 'my echo:1'"),
    ],
)
def test_what_is_no_task(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.py"
    path.write_text(text)
    for main, words in (collect.main, ["--task", path]), (command.main, [path]), (make.main, ["m", path, "out"]):
        error = refused(capsys, main, *words)
        assert message in error and str(path) in error
    assert not {"echo", "my echo:1"} & set(task_names())


def test_a_path_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none.py", tmp_path):
        error = refused(capsys, collect.main, "--task", path)
        assert str(path) in error and "choose from code_search_net, gsm8k" in error and "or pass the path of a .py file" in error


class Rows(Task):
    """Gives for each row what the row holds."""

    name = "rows"

    def example(self, row):  # type: ignore[no-untyped-def]
        return row["make"]()

    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        return {}


def test_rows_that_make_no_example() -> None:
    def bad() -> Example:
        raise BadField("odd", "17")

    made = Example(user_turn("?"), id="own")
    rows = [{"make": lambda: made}, {"make": bad}, {}, {"make": lambda: made}, {"make": lambda: Example(user_turn("!"))}]
    found = list(Rows().read([*enumerate(rows, 1), (6, BadRow(6, "not valid JSON"))], "train"))
    assert found == [
        made,
        BadRow(2, "odd", "17"),
        BadRow(3, "no field 'make'"),
        BadRow(4, "id given twice", "own"),
        Example(user_turn("!"), id="rows-train-5"),
        BadRow(6, "not valid JSON"),
    ]
    with pytest.raises(UsageError, match="task 'rows' must make an Example of a row, got NoneType"):
        list(Rows().read([(1, {"make": lambda: None})], "train"))


def test_tasks_never_import_torch_or_transformers() -> None:
    code = (
        "import sys, cllm.tasks, cllm.tasks.source\n"
        "for name in cllm.tasks.task_names(): cllm.tasks.get_task(name)\n"
        "from cllm.tasks.gsm8k import equal_numbers; assert equal_numbers('3', '3')\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
