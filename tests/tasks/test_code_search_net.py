"""cllm.tasks.code_search_net: three kinds of rows, scores by running programs, human-eval's format, pass@k."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
from rows import HUMAN_EVAL

from cllm.errors import UsageError
from cllm.files import read_rows
from cllm.scoring.sandbox import Limits, protection
from cllm.tasks import get_task
from cllm.tasks.base import BadRow, Example
from cllm.tasks.code_search_net import CodeSearchNet
from cllm.tasks.source import load_examples

CODE: Any = get_task("code_search_net")
FUNCTION = {"func_documentation_string": " Double it. ", "func_code_string": "def double(x):\n    return 2 * x"}
MBPP = {
    "task_id": 11,
    "text": "Write a function to double.",
    "code": "def helper(x):\r\n    return x\r\ndef double(x):\r\n    return 2 * helper(x)",
    "test_setup_code": "",
    "test_list": ["assert set([double(2)]) == {4}", "assert double(0) == 0"],
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "a.ipynb",
    "task_id": 601,
    "prompt": "Write a function to double.",
    "code": "def double(x):\n    return 2 * x",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(double(2), 4)"],
}
RIGHT = "```python\ndef double(x):\n    return x + x\n```"
WRONG = "```python\ndef double(x):\n    return x\n```"


@pytest.fixture
def sandboxed() -> None:
    try:
        protection()
    except UsageError as error:
        pytest.skip(str(error))


def read(row: dict[str, Any], split: str = "test", task: Any = CODE) -> list[Example | BadRow]:
    return list(task.read([(1, row)], split))


def example(row: dict[str, Any]) -> Example:
    found = read(row)[0]
    assert isinstance(found, Example), found
    return found


def configured(**given: Any) -> Any:
    options = ArgumentParser()
    CODE.add_options(options, "acc")
    args = options.parse_args([])
    return CODE.configure(Namespace(**(vars(args) | given)))


def test_training_rows_get_the_papers_prompt() -> None:
    (found,) = read(FUNCTION, "train")
    assert isinstance(found, Example)
    assert found.id == "code_search_net-train-1"
    assert found.messages == ({"role": "user", "content": "Please generate code based on the following doc:\nDouble it."},)
    assert found.reference == FUNCTION["func_code_string"]
    assert CODE.plain_template == "### Instruction:\n{question}\n### Response:\n"
    (same,) = read({"docstring": "Double it.", "code": FUNCTION["func_code_string"]}, "train")
    assert same == found


def test_problems_are_told_apart_by_their_fields() -> None:
    human_eval, mbpp, sanitized = example(HUMAN_EVAL), example(MBPP), example(SANITIZED | {"task_id": 12})
    assert (human_eval.id, mbpp.id, sanitized.id) == ("HumanEval/0", "MBPP/11", "MBPP/12")
    assert human_eval.tags == {"source": "HumanEval"} and mbpp.tags == {"source": "MBPP"}
    assert "def double(x)" in human_eval.messages[0]["content"]
    assert "assert double(0) == 0" in mbpp.messages[0]["content"]
    assert mbpp.target["entry_point"] == sanitized.target["entry_point"] == "double"
    assert json.loads(json.dumps(mbpp.target)) == mbpp.target


def test_only_the_test_split_of_mbpp_is_read() -> None:
    assert [len(read(MBPP | {"task_id": n})) for n in (10, 11, 510, 511, 974, 975)] == [0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("row", "split", "reason"),
    [
        ({"func_code_string": "x"}, "train", "no field 'func_documentation_string'"),
        (FUNCTION | {"func_code_string": " "}, "train", "empty func_code_string"),
        (FUNCTION | {"func_documentation_string": 1}, "train", "field 'func_documentation_string' is not text"),
        ({"question": "1?", "answer": "#### 1"}, "train", "no field 'func_documentation_string'"),
        (HUMAN_EVAL, "train", "a test problem, not a training row"),
        (MBPP, "train", "a test problem, not a training row"),
        (HUMAN_EVAL | {"test": ""}, "test", "empty test"),
        (HUMAN_EVAL | {"entry_point": "a b"}, "test", "entry_point is not a name"),
        (MBPP | {"test_list": []}, "test", "test_list is not a list of texts"),
        (MBPP | {"task_id": "x"}, "test", "task_id is not a number"),
        (MBPP | {"test_list": ["assert f(1)"]}, "test", "the tests call no function of the code"),
        (MBPP | {"test_imports": 5}, "test", "test_imports or test_setup_code is not text"),
        (MBPP | {"test_imports": "import math"}, "test", "test_imports or test_setup_code is not text"),
        (MBPP | {"test_setup_code": 3}, "test", "test_imports or test_setup_code is not text"),
    ],
)
def test_bad_rows(row: dict[str, Any], split: str, reason: str) -> None:
    assert read(row, split) == [BadRow(1, reason)]


def test_malformed_and_repeated_rows() -> None:
    rows = [(1, HUMAN_EVAL), (2, BadRow(2, "not valid JSON")), (3, HUMAN_EVAL)]
    found = list(CODE.read(rows, "test"))
    assert [getattr(item, "reason", "") for item in found] == ["", "not valid JSON", "id given twice"]


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    for split in ("train", "test"):
        with pytest.raises(UsageError, match="func_documentation_string.*found the fields question, answer"):
            list(load_examples(CODE, tmp_path / "rows.jsonl", split))


@pytest.mark.parametrize("row", [HUMAN_EVAL, MBPP, SANITIZED | {"task_id": 12}])
def test_scores(row: dict[str, Any], sandboxed: None) -> None:
    problem = example(row)
    assert CODE.score(RIGHT, problem) == {"pass@1": True, "parses": True}
    assert CODE.score(WRONG, problem) == {"pass@1": False, "parses": True}
    assert CODE.score("def double(x:", problem) == {"pass@1": False, "parses": False}
    assert CODE.score("", problem) == CODE.score(" \n", problem) == {"pass@1": False, "parses": False}
    assert CODE.score("import sys; sys.exit(0)", problem)["pass@1"] is False
    assert CODE.score(RIGHT, read(FUNCTION)[0]) == {"pass@1": False, "parses": False}


def test_many_are_scored_in_order_and_only_once(sandboxed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    task, problem = CodeSearchNet(), example(HUMAN_EVAL)
    pairs = [(RIGHT, problem), (WRONG, problem), (RIGHT, problem), ("", problem)]
    scores = task.score_all(pairs)
    assert [score["pass@1"] for score in scores] == [True, False, True, False]
    monkeypatch.setattr("cllm.scoring.sandbox.run", None)
    assert task.score_all(pairs) == scores


def test_export_is_what_human_eval_reads(tmp_path: Path) -> None:
    problem = example(HUMAN_EVAL)
    rows = [{"id": "HumanEval/0", "reply": RIGHT, "target": problem.target}]
    rows.append({"id": "MBPP/11", "reply": RIGHT, "target": example(MBPP).target})
    assert CODE.export(rows, tmp_path / "samples.jsonl")
    (sample,) = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert list(sample) == ["task_id", "completion"] and sample["task_id"] == "HumanEval/0"
    names: dict[str, Any] = {}  # as human-eval puts it together
    exec(HUMAN_EVAL["prompt"] + sample["completion"] + "\n" + HUMAN_EVAL["test"] + "\ncheck(double)", names)
    assert CODE.export(rows[1:], tmp_path / "mbpp.jsonl")
    assert "def double" in json.loads((tmp_path / "mbpp.jsonl").read_text())["completion"]
    assert not CODE.export([{"id": "1", "reply": "x", "target": None}], tmp_path / "none.jsonl")


def test_review_estimates_pass_at_k() -> None:
    target = example(HUMAN_EVAL).target
    other = target | {"task_id": "HumanEval/1"}
    rows = [{"target": target, "pass@1": passed} for passed in (True, False)]
    rows += [{"target": other, "pass@1": False}] * 2
    assert CODE.review(rows, Path("x")) == {"HumanEval (2 problems, 4 samples)": {"pass@1": 0.25}}
    two = configured(num_samples=2)
    assert next(iter(two.review(rows, Path("x")).values())) == {"pass@1": 0.25, "pass@2": 0.5}
    with pytest.raises(UsageError, match="num_samples is 2, but HumanEval/1 has 1 samples"):
        two.review(rows[:-1], Path("x"))


def test_rows_without_tests_are_for_speed_only(sandboxed: None) -> None:
    assert isinstance(read(FUNCTION)[0], Example)
    assert read(FUNCTION, task=configured()) == [BadRow(1, "no tests to judge with ('test' or 'test_list')")]
    assert CODE.configure(Namespace()) is CODE


@pytest.mark.parametrize("command", ["acc", "speedup"])
def test_commands_that_judge_need_a_sandbox(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UsageError("cannot be run safely")

    monkeypatch.setattr("cllm.scoring.sandbox.protection", refuse)
    for name in (command, "collect"):
        options = ArgumentParser()
        CODE.add_options(options, name)
        args = Namespace(**(vars(options.parse_args([])) | {"eval_only": False}))
        if name == "collect":
            assert CODE.configure(args) is CODE
        else:
            with pytest.raises(UsageError, match="cannot be run safely"):
                CODE.configure(args)


def test_what_can_be_judged(sandboxed: None) -> None:
    functions = [item for item in read(FUNCTION) if isinstance(item, Example)]
    assert CODE.judgeable(example(MBPP)) and functions and not CODE.judgeable(functions[0])
    assert configured(timeout=7).scoring_settings() == {"timeout": 7} and CODE.settings() == {}


def test_answer_files_with_several_samples(sandboxed: None) -> None:
    problem = example(HUMAN_EVAL)
    samples = [{"task_id": "HumanEval/0", "completion": text} for text in ("    return 2 * x\n", "    return x\n")]
    rows = CODE.answers(samples, [problem])
    assert [row["id"] for row in rows] == ["HumanEval/0", "HumanEval/0#2"]
    scored = [row | CODE.score(row["reply"], Example((), None, row["target"])) for row in rows]
    assert [row["pass@1"] for row in scored] == [True, False]
    own = [{"id": "a", "reply": "x", "question": "q", "target": None}] * 2
    assert [row["id"] for row in CODE.answers(own, [])] == ["a", "a#2"]
    with pytest.raises(UsageError, match="sample 1 answers 'HumanEval/9', which is not among the 1 problems"):
        CODE.answers([{"task_id": "HumanEval/9", "completion": "x"}], [problem])
    with pytest.raises(UsageError, match="sample 1 has no task_id"):
        CODE.answers([{"completion": "x"}], [problem])


def test_default_file_comes_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "human_eval" / "data").mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").touch()
    file = tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz"
    file.touch()
    assert CODE.default_file("train") is None
    monkeypatch.syspath_prepend(tmp_path)
    assert CODE.default_file("test") == file
    file.unlink()
    with pytest.raises(UsageError, match="install the package human-eval"):
        CODE.default_file("test")


def test_real_files(shared_data: Path) -> None:
    rows = list(load_examples(CODE, shared_data / "codesearchnet_python" / "csn_python_cosqa.jsonl.gz", "train"))
    assert len(rows) == 6246 and all(row.reference for row in rows)
    for name, count in {"humaneval/HumanEval.jsonl.gz": 164, "mbpp/mbpp.jsonl.gz": 500}.items():
        stream = load_examples(CODE, shared_data / name, "test")
        assert len(list(stream)) == count and not stream.bad
    stream = load_examples(CODE, shared_data / "mbpp" / "sanitized-mbpp.json.gz", "test")
    assert len(list(stream)) == 257 and not stream.bad


@pytest.mark.slow
def test_reference_solutions_of_mbpp_pass(shared_data: Path, sandboxed: None) -> None:
    examples = list(CODE.read(read_rows(shared_data / "mbpp" / "mbpp.jsonl.gz"), "test"))[::4]
    task = CodeSearchNet()
    task.limits = Limits(cpu_seconds=60, wall_seconds=240)  # one of them takes 5 seconds on a slow machine
    scores = task.score_all([(e.reference, e) for e in examples])
    assert [e.id for e, score in zip(examples, scores) if not score["pass@1"]] == []
