"""The check of a GPU, on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"


@pytest.mark.slow
def test_the_same_functions_on_a_cpu(tiny_model_dir: Path, tmp_path: Path) -> None:
    sizes = ["--length", "10", "--batches", "1", "2", "--output", str(tmp_path / "r.json")]
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--model", str(tiny_model_dir), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all that must hold holds" in done.stdout
    content = json.loads((tmp_path / "r.json").read_text())
    result = content["result"]
    assert content["environment"]["device"] == "cpu"
    assert set(result["texts equal"].values()) == {"12 of 12"} and len(result["texts equal"]) == 6
    assert result["waits of the host in 32 steps"] == {"off": {}}
    assert all(row["tokens/s, AR without prefill"] > 0 for row in result["speed"]["off"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr == "error: no CUDA device here; --device cpu runs the same checks without one\n"
