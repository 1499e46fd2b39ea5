"""The benchmarks run and write their results. On tiny models the figures mean nothing.

They run in this process, where the imports, which take longer than most of them, have been done.
"""

import json
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sql_questions
from commands import succeeds, write_rows
from tiny import save_tiny_checkpoint

from cllm.cli.main import main as cllm_main

FOLDER = Path(__file__).parents[1] / "scripts" / "benchmarks"
PROBLEMS = [
    {
        "question": "Mina has 12 shells and finds 9 more. How many shells does she have now?",
        "answer": "Mina now has 12 + 9 = 21 shells.\n#### 21",
    },
    {
        "question": "A ticket costs $7. How many dollars do 6 tickets cost?",
        "answer": "Six tickets cost 6 * 7 = $42.\n#### 42",
    },
]
SIZES = "--prompts 2 --block_size 4 --length 12"
Run = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("problems") / "train.jsonl", PROBLEMS)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a benchmark with the given words; returns its result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)

    def run(name: str, *words: str) -> dict[str, Any]:
        script, output = str(FOLDER / f"{name}.py"), tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", [script, "--output", str(output), *shlex.split(" ".join(words))])
        succeeds(lambda: runpy.run_path(script, run_name="__main__"))
        assert str(tmp_path) not in output.read_text()
        result: dict[str, Any] = json.loads(output.read_text())["result"]
        return result

    return run


@pytest.fixture
def decoding(run: Run, tiny_model_dir: Path, problems: Path) -> Run:
    """Run one of the benchmarks that share options, on the tiny model and two problems."""
    return lambda name, *words: run(name, f"--model {tiny_model_dir} --filename {problems} {SIZES}", *words)


@pytest.mark.slow
def test_collection(decoding: Run) -> None:
    result = decoding("collection")
    equal, _, states = result["states equal"].split()
    assert equal == states != "0"
    assert result["times fewer token-forwards"] > 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("linear", ""), ("attention", "--context 40 --rounds 2")])
def test_one_layer(decoding: Run, name: str, more: str) -> None:
    result = decoding(name, "--widths 1 4 --batches 2", more)
    assert set(result) == {"batch 2, width 1", "batch 2, width 4"} and all(figures["times faster"] > 0 for figures in result.values())


@pytest.mark.slow
def test_training(decoding: Run) -> None:
    result = decoding("training")
    assert result["token-forwards per response, paper"] > result["token-forwards per response, ours, the paper's objective"]


@pytest.mark.slow
def test_throughput(decoding: Run) -> None:
    result = decoding("throughput", "--rounds 2")
    assert result["blocks"] == 3 and result["times faster, ours, the paper's objective"] > 0
    assert result["memory over fine-tuning, fine-tuning"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gsm8k", "copying"])
def test_decode(decoding: Run, tmp_path: Path, task: str) -> None:
    pytest.importorskip("matplotlib")
    contexts = "64 200" if task == "gsm8k" else "0"  # a prompt of 200 characters leaves no room
    batches = "1 2 4 --most_tokens 128" if task == "gsm8k" else "1 2"
    model = save_tiny_checkpoint(tmp_path / "m", max_position_embeddings=256 if task == "gsm8k" else 1024)
    sizes = f"--contexts {contexts} --batches {batches} --widths 4 --guess context pool"
    result = decoding("decode", f"--model {model} --task {task}", sizes)
    assert [cell["batch"] for cell in result["cells"]] == [1, 2]
    alone, pair = (cell["methods"] for cell in result["cells"])
    assert set(pair) == {"ar", "generate", "generate:onednn", "jacobi:4:context", "jacobi:4:pool"}
    assert set(alone) == {*pair, "prompt_lookup:4", "prompt_lookup:4:onednn", "paper:4"}
    assert all(figures["same_as_ar"] == 1 and figures["tokens_per_second"] > 0 for figures in [*alone.values(), *pair.values()])
    assert pair["jacobi:4:pool"]["iteration_over_bare"] > 0 and "iteration_over_bare" not in pair["generate"]
    assert (tmp_path / "result.png").stat().st_size > 1000


@pytest.mark.slow
def test_tuning(decoding: Run) -> None:
    result = decoding("tuning", "--widths 1 4 --guess pool --rounds 1")
    assert result["tune picks"] in result["sweep, tokens/s"] and 0 < result["pick over fastest"] <= 1


@pytest.mark.slow
def test_candidates(decoding: Run) -> None:
    result = decoding("candidates")
    alone, best = result["tokens per forward, the window alone"], result["best second candidate"]
    assert result["tokens per forward, with a second candidate"][best] >= alone >= 1


@pytest.mark.slow
def test_batching(decoding: Run) -> None:
    assert decoding("batching", "--batch_size 2 --rounds 1")["times faster than fixed batches"] > 0


@pytest.mark.slow
def test_exactness(run: Run, tiny_model_dir: Path, problems: Path) -> None:
    assert run("exactness", "tiny --cases 5")["different"] == 0
    assert run("exactness", "tiny --cases 5 --share 3 --prefixes")["different"] == 0
    words = f"--model {tiny_model_dir} --data gsm8k={problems} --prompts 2 --length 8"
    assert {way["texts that depart"] for way in run("exactness", "real", words)["ways"].values()} == {0}
    assert len(run("exactness", "bfloat16", words)["sides"]) == 4


@pytest.mark.slow
def test_prefix(decoding: Run, tmp_path: Path) -> None:
    sql_questions.main([str(tmp_path / "data"), "2", "12"])
    model = save_tiny_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    more = "--conversation 120 --question 8 --samples 3 --sampled 90 --rounds 2 --prompts 3"
    result = decoding("prefix", f"--model {model} --filename {tmp_path / 'data'}", more)
    (turn, questions, samples, nothing) = result.values()
    assert questions["texts that differ"] == nothing["texts that differ"] == 0
    assert samples["tokens through the model, with reuse"] == 89 + samples["of which windows"]
    assert all(part[name] > 0 for part in result.values() for name in part if "shorter" in name)
    assert turn["tokens"] <= 120


@pytest.mark.slow
def test_iteration(decoding: Run) -> None:
    result = decoding("iteration", "--widths 1 4 --batches 2")
    assert result["batch 2, width 4"]["iterations"] > 0


@pytest.mark.slow
def test_soak(run: Run, tiny_model_dir: Path) -> None:
    result = run("soak", f"--model {tiny_model_dir} --seconds 5 --clients 24")
    assert all(result[kind] for kind in ("answers", "hung up", "bad requests", "faulty requests"))


@pytest.mark.slow
def test_collapse(run: Run, tmp_path: Path) -> None:
    sql_questions.main([str(tmp_path / "data"), "2", "2"])
    model = save_tiny_checkpoint(tmp_path / "target", max_position_embeddings=1024)
    collect("spider", model, tmp_path / "data", tmp_path)
    result = run("collapse", f"--data {tmp_path} --prompts 2 --length 8 --learning_rate 1e-6")
    assert result["stopped at step"] == result["planned steps"] and result["step of the last good model"]


@pytest.mark.slow
def test_lossless_training(run: Run, tiny_model_dir: Path, problems: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    collect("gsm8k", tiny_model_dir, problems, tmp_path)
    words = f"--model {tiny_model_dir} --trajectories {tmp_path / 'trajectories'} --batch_size 2 --steps 2 --rounds 1"
    result = run("lossless_training", words, "-- --attn_implementation eager")
    assert result["times faster"] == result["times faster, by round"][0] > 0
    assert set(result["responses per second"]) == {"default objective", "lossless"}


def collect(task: str, model: Path, data: Path, folder: Path) -> None:
    words = f"collect --task {task} --model {model} --filename {data} --output {folder / 'trajectories'}"
    cllm_main(shlex.split(f"{words} --max_new_seq_len 12 --max_new_tokens 4 --device cpu"))


@pytest.mark.parametrize("name", ["vllm_speed", "vllm_collection"])
def test_a_benchmark_of_vllm_shows_its_options(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They run in the environment of scripts/vllm_check.sh; here is at least what they take from the others."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "--model" in shown and "--output" in shown
