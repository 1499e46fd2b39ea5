"""The public names: what they are, that importing them is light, and the four jobs without a command line."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import question_rows, write_rows
from tiny import save_tiny_checkpoint

import cllm
from cllm import options
from cllm.errors import UsageError

SOURCE = ast.parse(Path(cllm.__file__).read_text())


def seen_by_type_checkers() -> dict[str, str]:
    """Name -> module, of the imports under TYPE_CHECKING."""
    (block,) = (node for node in SOURCE.body if isinstance(node, ast.If))
    return {alias.name: str(line.module) for line in block.body if isinstance(line, ast.ImportFrom) for alias in line.names}


def test_each_name_is_the_one_that_type_checkers_see() -> None:
    seen = seen_by_type_checkers()
    assert sorted(seen) == sorted(cllm.__all__)
    for name, module in seen.items():
        assert getattr(cllm, name) is getattr(sys.modules[module], name)


@pytest.mark.parametrize("name", cllm.__all__)
def test_each_name_is_explained(name: str) -> None:
    text = getattr(cllm, name).__doc__
    assert text and not text.startswith(f"{name}(")  # what dataclasses write themselves


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'zork'"):
        cllm.zork  # noqa: B018


def test_importing_is_light() -> None:
    light = "import sys, cllm; cllm.get_task, cllm.SpeedArguments, cllm.CollectArguments; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", light], check=True)


@pytest.mark.usefixtures("one_thread")
def test_collect_train_and_measure(tmp_path: Path) -> None:
    """As in a notebook: nothing is read from a command line."""
    model, data = save_tiny_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", question_rows(6))
    on_data = {"task": "gsm8k", "filename": str(data), "device": "cpu"}
    collected = cllm.collect(
        cllm.CollectArguments(model=str(model), output=str(tmp_path / "t"), block_size=4, max_new_seq_len=12, **on_data)
    )
    assert collected.kept == len(cllm.TrajectoryDataset(collected.folder)) == 6 - sum(collected.dropped.values()) > 3

    inputs = cllm.TrainingInputs(model=str(model), trajectories=str(collected.folder))
    how = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    cllm.train(inputs, cllm.CllmTrainingArguments(str(tmp_path / "cllm"), **how))
    trainer = cllm.build_trainer(inputs, cllm.CllmTrainingArguments(str(tmp_path / "other"), **how))
    assert isinstance(trainer, cllm.CllmTrainer)

    on_data |= {"model": str(tmp_path / "cllm"), "data_size": 2}
    speed = cllm.measure_speed(cllm.SpeedArguments(max_new_seq_len=8, **on_data))
    assert speed["settings"]["block_size"] == 4 and speed["methods"]["jacobi"]["same_as_ar"] == 1.0
    accuracy = cllm.measure_accuracy(cllm.AccuracyArguments(max_tokens=6, output_file_name=str(tmp_path / "a.jsonl"), **on_data))
    assert accuracy["summary"]["answers"] == 2
    assert json.loads((tmp_path / "a.accuracy.json").read_text())["summary"] == json.loads(json.dumps(accuracy["summary"]))
    opened, decoder = cllm.open_decoder(cllm.DecoderArguments(model=on_data["model"], device="cpu"))
    assert decoder.block_size == 4 and opened.record["task"] == "gsm8k"


def test_a_task_with_options_of_its_own(tmp_path: Path) -> None:
    arguments = cllm.CollectArguments(model="m", task="gsm8k", task_options={"zork": 1})
    with pytest.raises(UsageError, match="task 'gsm8k' has no option zork"):
        cllm.collect(arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"baseline": ["ar", "zork"]}, "baseline must be one of ar, no_adapter, generate, prompt_lookup, got 'zork'"),
        ({"prefix_cache": -1}, "prefix_cache must be >= 0, got -1"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cllm.SpeedArguments(model="m", task="gsm8k", **values)


def test_options_have_the_types_of_their_fields() -> None:
    found = {option.name: option for option in options.options_of(cllm.TuneArguments)}
    assert "task" not in found and found["widths"].several and found["widths"].kind is int
    assert found["dtype"].choices == ("float32", "bfloat16", "float16") and found["data_size"].kind is int


def test_the_reference_page_has_them_all() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "python.md").read_text()
    for name in set(cllm.__all__) - {"get_task", "task_names"}:  # of the page's `members`
        assert f"::: {getattr(cllm, name).__module__}.{name}\n" in page, name
