"""A task of somebody else, in a file of its own or in an installed package, goes all the way, with options and formats of its own."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import write_rows
from tiny import save_tiny_checkpoint

import cllm
import cllm.tasks
from cllm.cli import acc, collect, speedup, train
from cllm.cli import main as dispatch
from cllm.tasks import get_task, task_names

PACKAGE = Path(cllm.__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread")
FIFTH_TASK = """
import copy, json
from cllm.tasks.base import Example, Task, text_field, user_turn


class Echo(Task):
    name, description, fields, metric = "echo", "say it again", "text", "same"
    plain_template, default_question = "Say: {question}\\n", "Hello?"
    export_format = "lines"
    loud = strict = False

    def example(self, row):
        text = text_field(row, "text").upper() if self.loud else text_field(row, "text")
        return Example(user_turn(text), text, text, {"size": str(len(text) % 2)}, ("And again: " + text,))

    def score(self, reply, example):
        return {"same": reply == example.target, "length": float(len(reply))}

    def add_options(self, options, command):
        options.add_argument("--loud", action="store_true", help=f"upper case ({command})")
        options.add_argument("--strict", action="store_true")

    def configure(self, args):
        task = copy.copy(self)
        task.loud, task.strict = args.loud, args.strict
        return task

    def settings(self):
        return {"loud": True} if self.loud else {}

    def scoring_settings(self):
        return {"strict": True} if self.strict else {}

    def export(self, rows, path):
        path.write_text("".join(json.dumps(row["replies"]) + "\\n" for row in rows))
        return True

    def review(self, rows, path):
        return {"echoes": {"together": float(len(rows)), "nothing": None}}


TASK = Echo()
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "echoes"
version = "1"
[tool.setuptools]
py-modules = ["echoes"]
[project.entry-points."cllm.tasks"]
echo = "echoes:TASK"
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The path of the task's file, which is forgotten afterwards."""
    monkeypatch.setattr(cllm.tasks, "_from_files", {})
    path = tmp_path / "my_echo.py"
    path.write_text(FIFTH_TASK)
    return str(path)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A folder of installed packages, with one that registers the task."""
    pytest.importorskip("setuptools", "61", reason="installing a package needs setuptools 61")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "echoes.py").write_text(FIFTH_TASK)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder, source], check=True)
    return folder


@pytest.fixture
def package(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    yield "echo"
    sys.modules.pop("echoes", None)


@pytest.fixture(params=["file", "package"])
def echo(request):
    """What to write for TASK."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def data(tmp_path):
    rows = [{"text": f"hello number {n}"} for n in range(12)]
    return write_rows(tmp_path / "rows.jsonl", [*rows[:4], "{broken", {"words": 1}, *rows[4:]])


def test_a_fifth_task_goes_all_the_way(tmp_path, echo, data, capsys):
    target, trajectories, trained = (tmp_path / name for name in ("target", "trajectories", "cllm"))
    save_tiny_checkpoint(target)
    on = ["--device", "cpu", "--dtype", "float32"]

    collect.main(
        ["--task", echo, "--model", str(target), "--filename", str(data), "--max_new_tokens", "4", *on,
         "--max_new_seq_len", "24", "--output", str(trajectories), "--use_labels", "--loud"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "responses stored" in printed
    assert "1 rows skipped: not valid JSON" in printed and "1 rows skipped: no field 'text'" in printed
    settings = json.loads((trajectories / "settings.json").read_text())
    assert settings["task"] == "echo" and settings["task_options"] == {"loud": True}

    train.main(
        ["--model", str(target), "--trajectories", str(trajectories), "--output_dir", str(trained), "--max_steps", "2",
         "--per_device_train_batch_size", "2", "--use_cpu", "--report_to", "none", "--save_strategy", "no",
         "--disable_tqdm", "true", "--probe_prompts", "2", "--probe_task", echo, "--probe_file", str(data), "--probe_length", "8"]
    )  # fmt: skip
    record = json.loads((trained / "config.json").read_text())["cllm"]
    assert (record["task"], record["block_size"], record["prompt_template"]) == ("echo", 4, "chat")

    output = tmp_path / "speedup.json"
    speedup.main(
        ["--task", echo, "--test_model", str(trained), "--filename", str(data), "--data_size", "3", *on,
         "--max_new_seq_len", "12", "--output", str(output)]
    )  # fmt: skip
    report = json.loads(output.read_text())
    assert (report["settings"]["metric"], report["settings"]["block_size"], report["data"]["prompts"]) == ("same", 4, 3)

    answers = tmp_path / "answers.jsonl"
    command = ["--task", echo, "--model_dir", str(trained), "--use_consistency_decoding", "--filename", str(data), *on]
    command += ["--max_tokens", "10", "--output_file_name", str(answers)]
    capsys.readouterr()
    acc.main(command)
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == 12 and all(len(row["replies"]) == 2 and row["reply"] == row["replies"][1] for row in rows)
    report = json.loads((tmp_path / "answers.accuracy.json").read_text())
    assert list(report["summary"]["scores"]) == ["same", "length"] and "size=0" in report["summary"]["groups"]
    assert report["review"] == {"echoes": {"together": 12.0, "nothing": None}}
    exported = (tmp_path / "answers.export.jsonl").read_text().splitlines()
    assert len(exported) == 12 and str(tmp_path / "answers.export.jsonl") in printed
    assert "echoes" in printed and "together" in printed

    acc.main([*command, "--strict"])
    assert "scored with strict=True" in capsys.readouterr().out
    report = json.loads((tmp_path / "answers.accuracy.json").read_text())
    assert report["settings"]["scoring_options"] == {"strict": True}
    with pytest.raises(SystemExit):
        acc.main([*command, "--loud"])
    assert "task_options" in capsys.readouterr().err


def test_make_takes_it(tmp_path, echo, data):
    pytest.importorskip("peft")
    target = save_tiny_checkpoint(tmp_path / "target")
    figures = cllm.make(str(target), f"{echo}:{data}", tmp_path / "made", max_new_seq_len=8, device="cpu", dtype="float32")
    record = json.loads((tmp_path / "made" / "config.json").read_text())["cllm"]
    assert record["data"] == ["rows.jsonl"] and figures["tokens_per_forward"] >= 1 and figures["same_as_ar"] == 1.0


def test_its_options_are_its_own(echo, capsys):
    with pytest.raises(SystemExit) as exit_:
        collect.main(["--task", echo, "--help"])
    assert exit_.value.code == 0 and "--loud" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        collect.main(["--task", "gsm8k", "--model", "m", "--loud"])
    assert exit_.value.code == 2 and "--loud" in capsys.readouterr().err


def test_a_script_with_a_fixed_task_has_its_options(echo, capsys):
    with pytest.raises(SystemExit):
        acc.main(["--help"], task=echo)
    text = capsys.readouterr().out
    assert "--loud" in text and "options of the task echo" in text and "--task" not in text


def test_unknown_tasks_are_named(echo, capsys):
    for main in (collect.main, speedup.main, acc.main):
        with pytest.raises(SystemExit) as exit_:
            main(["--task", "echos"])
        assert exit_.value.code == 2 and "unknown task 'echos'; choose from" in capsys.readouterr().err


def test_it_is_listed(echo, capsys):
    dispatch.main(["tasks", echo])
    text = capsys.readouterr().out
    assert "echo: say it again" in text and "local only" in text and "'Say: {question}\\n'" in text and "lines" in text


# ------------------------------------------------------------ no task's name in shared code

APART = ("tasks", "scoring")  # what belongs to single tasks
DATA = {"checkpoints.py"}  # a table of names


def shared_files():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.split("/")[0] not in APART and name not in DATA:
            yield name, ast.parse(path.read_text())


def task_modules():
    """The files of the tasks: gsm8k, spider, ..."""
    return {type(get_task(name)).__module__ for name in task_names()}


def test_shared_code_names_no_task():
    names = set(task_names())
    found = {
        (file, node.value)
        for file, tree in shared_files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert not found


def test_shared_code_imports_no_task():
    modules = task_modules()
    found = {
        (file, name)
        for file, tree in shared_files()
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name in modules
    }
    assert not found


def test_the_scripts_of_a_task_only_name_it():
    """data/generate_trajectory_TASK.py and eval/TASK/*.py hold a call each."""
    root = PACKAGE.parent
    scripts = [*root.glob("data/generate_trajectory_*.py"), *root.glob("eval/*/*.py")]
    if not scripts:
        pytest.skip("no scripts beside the package")
    for path in scripts:
        task = path.stem.removeprefix("generate_trajectory_") if path.parent.name == "data" else path.parent.name
        tree = ast.parse(path.read_text())
        assert task in task_names() and len(path.read_text().splitlines()) <= 30
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.For)], path
        assert {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} >= {task}
