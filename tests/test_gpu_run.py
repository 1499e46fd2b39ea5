"""The prepared run on a GPU: packed, rehearsed on a CPU, killed, and what is refused."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import question_rows
from tiny import save_tiny_checkpoint

from cllm.evaluation.results import read_results

FOLDER = Path(__file__).parents[1] / "scripts" / "gpu"
STAGES = ["environment", "tests", "speed", "gsm8k", "sql", "training"]
STUB = """#!{python}
import sys, time
from cllm.files import write_json
if "--output" in sys.argv:
    time.sleep(0.1)
    write_json(sys.argv[sys.argv.index("--output") + 1], {{"benchmark": "stub", "result": {{"words": sys.argv[1:]}}}})
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rows = tmp_path_factory.mktemp("data"), question_rows(40)
    for name, part in {"train": rows[:32], "test": rows[32:]}.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    return folder


@pytest.fixture(scope="module")
def parts(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model = save_tiny_checkpoint(folder / "model", seed=3, max_position_embeddings=2048)
    done = pack(folder / "parts", data, model)
    assert done.returncode == 0, done.stderr
    sizes = [line for line in done.stdout.splitlines() if line.startswith("part ")]
    assert len(sizes) == 2 and all(line.endswith(" MiB") for line in sizes)
    return folder / "parts"


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A Python whose stages take a moment and write a file."""
    path = tmp_path / "stub"
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    return path


def pack(*words: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", FOLDER / "pack.sh", *words]
    return subprocess.run(list(map(str, command)), env=os.environ | {"WHEELS": ""}, capture_output=True, text=True, timeout=100)


def command(*words: object) -> list[str]:
    return ["bash", str(FOLDER / "run.sh"), *map(str, words)]


def run(*words: object, python: object = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*words), env=environment, capture_output=True, text=True, timeout=600)


def results(output: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (output / "results").glob("*.json")}


@pytest.mark.slow
def test_every_stage_is_rehearsed_once(parts: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("sqlglot")
    done = run(parts, tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    assert set(found) == set(STAGES)
    assert all(json.loads(content)["rehearsal"] for content in found.values())
    tests = json.loads(found["tests"])["result"]
    assert not tests["failures"] and len(tests["seconds"]) + len(tests["not run"]) > 10
    assert "REHEARSAL" in done.stdout and "holds: sql: 0 texts depart" in done.stdout
    shown = read_results(tmp_path / "results")
    assert len(shown.speeds) == 2 and len(shown.benchmarks) == len(STAGES) - 2 and set(shown.skipped) == {"log.txt"}
    again = run(parts, tmp_path, "--rehearse")
    assert again.returncode == 0 and again.stdout.count("done before") == len(STAGES) and results(tmp_path) == found


def test_killed_at_random_moments_it_goes_on(parts: Path, tmp_path: Path, stub: Path) -> None:
    draw, environment, before = random.Random(1), os.environ | {"PYTHON": str(stub)}, {}
    for _ in range(10):
        running = subprocess.Popen(command(parts, tmp_path / "out"), env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0, 1.5))
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        found = results(tmp_path / "out")
        assert all(json.loads(content) for content in found.values())
        assert found | before == found, "a stage that had ended was run again"
        before = found
    assert run(parts, tmp_path / "out", python=stub).returncode == 0
    assert results(tmp_path / "out").keys() == set(STAGES) and results(tmp_path / "out") | before == results(tmp_path / "out")


@pytest.mark.parametrize(("minutes", "stages"), [("2.5", 2), ("5", 3), ("8.4", 4), ("8.5", 5), ("11.5", 6)])
def test_the_last_stages_are_left_out(parts: Path, tmp_path: Path, stub: Path, minutes: str, stages: int) -> None:
    done = run(parts, tmp_path / "out", "--minutes", minutes, python=stub)
    assert done.returncode == 0 and results(tmp_path / "out").keys() == set(STAGES[:stages])
    assert done.stdout.count("left out") == len(STAGES) - stages
    if stages > 3:  # what is over goes to the recipe
        words = json.loads(results(tmp_path / "out")["gsm8k"])["result"]["words"]
        assert words[words.index("--seconds") + 1] == ("300" if minutes == "11.5" else "180")


def test_the_first_part_suffices_for_what_needs_no_model(parts: Path, tmp_path: Path, stub: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1").symlink_to(parts / "1")
    assert run(tmp_path / "parts", tmp_path / "out", "--minutes", 2.5, python=stub).returncode == 0
    more = run(tmp_path / "parts", tmp_path / "out", python=stub)
    assert more.returncode == 2 and "is not whole" in more.stdout and len(results(tmp_path / "out")) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(parts: Path, tmp_path: Path) -> None:
    done = run(parts, tmp_path / "out")
    assert done.returncode == 2 and "error: no CUDA device here; --rehearse" in done.stdout and not results(tmp_path / "out")


def test_what_is_refused(parts: Path, data: Path, tmp_path: Path) -> None:
    for words, message in {
        (parts,): "PARTS and OUTPUT are needed, got 1 folders",
        (parts, tmp_path, "--fast"): "unknown option --fast",
        (parts, tmp_path, "--minutes", "soon"): "--minutes must be a number, got 'soon'",
        (parts, tmp_path, "--minutes"): "--minutes must be a number, got ''",
        (data, tmp_path): "no folder of scripts/gpu/pack.sh",
    }.items():
        done = run(*words)
        assert done.returncode == 2 and message in done.stderr
    large = tmp_path / "model.gguf"
    with large.open("wb") as file:
        file.truncate(130 << 20)
    for words, message in {
        (tmp_path / "new", data, large): "more than two parts of 63 MiB",
        (parts, data): "PARTS must be new",
        (tmp_path / "new", tmp_path): "no train.jsonl.gz",
        (tmp_path / "new", data, tmp_path / "none"): "no such file or folder",
    }.items():
        done = pack(*words)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "new").exists()
