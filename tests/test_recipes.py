"""The recipes under scripts/recipes: the whole chain on tiny data, and the header of each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import question_rows, write_rows
from tiny import save_tiny_checkpoint

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "scripts" / "recipes").glob("*.sh") if path.name != "chain.sh")
STAGES = ["target", "trajectories", "cllm", "speedup of target", "accuracy of target", "speedup of cllm", "accuracy of cllm"]


def run(name: str, *files: Path, **environment: object) -> subprocess.CompletedProcess[str]:
    """Run a recipe in an environment marked as installed."""
    venv = Path(str(environment["OUT"])).parent / "venv"
    venv.mkdir(exist_ok=True)
    what = "cat requirements*.txt pyproject.toml | cksum; pwd"
    stamp = subprocess.run(what, shell=True, cwd=ROOT, capture_output=True, text=True)
    (venv / ".cllm-requirements.txt").write_text(stamp.stdout.rstrip("\n"))
    settings = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "VIRTUAL_ENV": venv, "PYTHONPATH": ROOT, "HOME": venv}
    settings |= {"OMP_NUM_THREADS": "1"} | {key: os.environ[key] for key in ("TMPDIR",) if key in os.environ} | environment
    command = ["bash", ROOT / "scripts" / "recipes" / f"{name}.sh", *files]
    settings = {key: str(value) for key, value in settings.items()}
    return subprocess.run(list(map(str, command)), env=settings, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_header_states_data_time_memory_and_result(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    head = path.read_text().partition("set -euo pipefail")[0]
    for fact in ("data", "tokens", "time", "memory", "result"):
        assert f"\n# {fact:<10}" in head, fact


def test_there_are_five_recipes() -> None:
    assert [path.stem for path in RECIPES] == ["code_search_net", "gsm8k_7b", "gsm8k_smollm2", "sharegpt", "spider_smollm2"]


@pytest.mark.slow
def test_gsm8k_from_the_general_model_to_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = question_rows(12)
    data, test = write_rows(tmp_path / "train.jsonl", rows[:8]), write_rows(tmp_path / "test.jsonl", rows[8:])
    where = {"OUT": tmp_path / "out", "MODEL": save_tiny_checkpoint(tmp_path / "m", seed=3), "REDUCED": 1}
    done = run("gsm8k_smollm2", data, test, **where, BLOCK=4, LENGTH=12)
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = (tmp_path / "out" / "seconds.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in seconds] == [*STAGES, "report"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
    state = json.loads((tmp_path / "out" / "cllm" / "trainer_state.json").read_text())
    assert any("probe_tpf" in entry for entry in state["log_history"])
    again = run("gsm8k_smollm2", data, test, **where, BLOCK=4, LENGTH=12)
    assert again.returncode == 0 and again.stdout.count("already done") == len(STAGES) + 1


@pytest.mark.slow
def test_gsm8k_with_a_consistency_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    rows = question_rows(24)
    data, test = write_rows(tmp_path / "train.jsonl", rows[:16]), write_rows(tmp_path / "test.jsonl", rows[16:])
    where = {"OUT": tmp_path / "out", "TARGET": save_tiny_checkpoint(tmp_path / "m", seed=3), "REDUCED": 1, "LOSSLESS": 1}
    done = run("gsm8k_smollm2", data, test, **where, LENGTH=12)
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = (tmp_path / "out" / "seconds.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in seconds] == ["make", *STAGES[3:], "report"]
    made = json.loads((tmp_path / "out" / "cllm" / "make.json").read_text())
    measured = json.loads((tmp_path / "out" / "cllm.speedup.json").read_text())
    assert measured["settings"]["block_size"] == made["stored_width"] and measured["methods"]["jacobi"]["same_as_ar"] == 1


@pytest.mark.parametrize("name", ["spider_smollm2", "sharegpt"])
def test_missing_arguments_are_named(name: str, tmp_path: Path) -> None:
    done = run(name, OUT=tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("usage: bash") and not (tmp_path / "out").exists()
