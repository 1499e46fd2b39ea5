"""The benchmarks run and write what they measured; figures come from the real model, not from here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cllm.tasks.arithmetic import generate

FOLDER = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in generate(2, seed=0)))
    return path


def run(name: str, tiny_model_dir, problems: Path, output: Path, *more: str) -> dict:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--model", str(tiny_model_dir), "--filename", str(problems)]
    sizes = ["--prompts", "2", "--block_size", "4", "--length", "12", "--output", str(output), *more]
    subprocess.run(command + sizes, check=True, timeout=200, cwd=output.parent)
    return json.loads(output.read_text())["result"]


@pytest.mark.slow
def test_collection(tiny_model_dir, problems, tmp_path):
    result = run("collection", tiny_model_dir, problems, tmp_path / "result.json")
    equal, _, states = result["states equal"].split()
    assert equal == states != "0"
    assert result["times fewer token-forwards"] > 1


@pytest.mark.slow
def test_training(tiny_model_dir, problems, tmp_path):
    result = run("training", tiny_model_dir, problems, tmp_path / "result.json")
    assert result["token-forwards per response, paper"] > result["token-forwards per response, ours, the paper's objective"]


@pytest.mark.slow
def test_iteration(tiny_model_dir, problems, tmp_path):
    result = run("iteration", tiny_model_dir, problems, tmp_path / "result.json", "--widths", "1", "4", "--batches", "2")
    assert result["batch 2, width 4"]["iterations"] > 0
