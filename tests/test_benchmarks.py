"""The benchmarks run and write their results. On tiny models the figures mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sql_questions
from commands import write_rows
from tiny import save_tiny_checkpoint

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


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("problems") / "train.jsonl", PROBLEMS)


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
def test_linear(tiny_model_dir, problems, tmp_path):
    result = run("linear", tiny_model_dir, problems, tmp_path / "result.json", "--widths", "1", "4", "--batches", "2")
    assert set(result) == {"batch 2, width 1", "batch 2, width 4"} and all(figures["times faster"] > 0 for figures in result.values())


@pytest.mark.slow
def test_attention(tiny_model_dir, problems, tmp_path):
    sizes = ["--widths", "1", "4", "--batches", "2", "--context", "40", "--rounds", "2"]
    result = run("attention", tiny_model_dir, problems, tmp_path / "result.json", *sizes)
    assert set(result) == {"batch 2, width 1", "batch 2, width 4"} and all(figures["times faster"] > 0 for figures in result.values())


@pytest.mark.slow
def test_training(tiny_model_dir, problems, tmp_path):
    result = run("training", tiny_model_dir, problems, tmp_path / "result.json")
    assert result["token-forwards per response, paper"] > result["token-forwards per response, ours, the paper's objective"]


@pytest.mark.slow
def test_throughput(tiny_model_dir, problems, tmp_path):
    result = run("throughput", tiny_model_dir, problems, tmp_path / "result.json", "--rounds", "2")
    assert result["blocks"] == 3 and result["times faster, ours, the paper's objective"] > 0
    assert result["memory over fine-tuning, fine-tuning"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gsm8k", "copying"])
def test_decode(tiny_model_dir, problems, tmp_path, task):
    pytest.importorskip("matplotlib")
    contexts = ["64", "200"] if task == "gsm8k" else ["0"]  # a prompt of 200 characters leaves no room
    batches = ["1", "2", "4", "--most_tokens", "128"] if task == "gsm8k" else ["1", "2"]
    sizes = ["--task", task, "--contexts", *contexts, "--batches", *batches, "--widths", "4", "--guess", "context", "pool"]
    model = save_tiny_checkpoint(tmp_path / "m", max_position_embeddings=256 if task == "gsm8k" else 1024)
    result = run("decode", model, problems, tmp_path / "result.json", *sizes)
    assert [cell["batch"] for cell in result["cells"]] == [1, 2]
    alone, pair = (cell["methods"] for cell in result["cells"])
    assert set(pair) == {"ar", "generate", "generate:onednn", "jacobi:4:context", "jacobi:4:pool"}
    assert set(alone) == {*pair, "prompt_lookup:4", "prompt_lookup:4:onednn", "paper:4"}
    assert all(figures["same_as_ar"] == 1 and figures["tokens_per_second"] > 0 for figures in [*alone.values(), *pair.values()])
    assert pair["jacobi:4:pool"]["iteration_over_bare"] > 0 and "iteration_over_bare" not in pair["generate"]
    assert (tmp_path / "result.png").stat().st_size > 1000


@pytest.mark.slow
def test_tuning_and_candidates_and_batching(tiny_model_dir, problems, tmp_path):
    few = ["--widths", "1", "4", "--guess", "pool", "--rounds", "1"]
    result = run("tuning", tiny_model_dir, problems, tmp_path / "t.json", *few)
    assert result["tune picks"] in result["sweep, tokens/s"] and 0 < result["pick over fastest"] <= 1
    result = run("candidates", tiny_model_dir, problems, tmp_path / "c.json")
    alone, best = result["tokens per forward, the window alone"], result["best second candidate"]
    assert result["tokens per forward, with a second candidate"][best] >= alone >= 1
    result = run("batching", tiny_model_dir, problems, tmp_path / "b.json", "--batch_size", "2", "--rounds", "1")
    assert result["times faster than fixed batches"] > 0


@pytest.mark.slow
def test_exactness(tiny_model_dir, problems, tmp_path):
    def part(*words: str) -> dict:
        output = tmp_path / f"{words[0]}.json"
        command = [sys.executable, str(FOLDER / "exactness.py"), *words, "--output", str(output)]
        subprocess.run(command, check=True, timeout=200, cwd=tmp_path)
        assert str(tmp_path) not in output.read_text()
        return json.loads(output.read_text())["result"]

    assert part("tiny", "--cases", "5")["different"] == 0
    assert part("tiny", "--cases", "5", "--share", "3", "--prefixes")["different"] == 0
    words = ["--model", str(tiny_model_dir), "--data", f"gsm8k={problems}", "--prompts", "2", "--length", "8"]
    assert {way["texts that depart"] for way in part("real", *words)["ways"].values()} == {0}
    assert len(part("bfloat16", *words)["sides"]) == 4


@pytest.mark.slow
def test_prefix(tmp_path):
    sql_questions.main([str(tmp_path / "data"), "2", "12"])
    model = save_tiny_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    more = ["--conversation", "120", "--question", "8", "--samples", "3", "--sampled", "90", "--rounds", "2", "--prompts", "3"]
    result = run("prefix", model, tmp_path / "data", tmp_path / "result.json", *more)
    (turn, questions, samples, nothing) = result.values()
    assert questions["texts that differ"] == nothing["texts that differ"] == 0
    assert samples["tokens through the model, with reuse"] == 89 + samples["of which windows"]
    assert all(part[name] > 0 for part in result.values() for name in part if "shorter" in name)
    assert turn["tokens"] <= 120


@pytest.mark.slow
def test_iteration(tiny_model_dir, problems, tmp_path):
    result = run("iteration", tiny_model_dir, problems, tmp_path / "result.json", "--widths", "1", "4", "--batches", "2")
    assert result["batch 2, width 4"]["iterations"] > 0


@pytest.mark.slow
def test_soak(tiny_model_dir, tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, str(FOLDER / "soak.py"), "--model", str(tiny_model_dir), "--output", str(output)]
    subprocess.run([*command, "--seconds", "5", "--clients", "24"], check=True, timeout=200, cwd=tmp_path)
    result = json.loads(output.read_text())["result"]
    assert all(result[kind] for kind in ("answers", "hung up", "bad requests", "faulty requests"))


@pytest.mark.slow
def test_collapse(tmp_path):
    sql_questions.main([str(tmp_path / "data"), "2", "2"])
    model = save_tiny_checkpoint(tmp_path / "target", max_position_embeddings=1024)
    words = ["collect", "--task", "spider", "--model", model, "--filename", tmp_path / "data", "--max_new_seq_len", "12"]
    words += ["--max_new_tokens", "4", "--output", tmp_path / "trajectories", "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "cllm", *map(str, words)], check=True, timeout=200)
    words = ["--data", tmp_path, "--prompts", "2", "--length", "8", "--output", tmp_path / "result.json"]
    command = [sys.executable, FOLDER / "collapse.py", *words, "--learning_rate", "1e-6"]
    subprocess.run(list(map(str, command)), check=True, timeout=200)
    result = json.loads((tmp_path / "result.json").read_text())["result"]
    assert result["stopped at step"] == result["planned steps"] and result["step of the last good model"]
    assert str(tmp_path) not in (tmp_path / "result.json").read_text()


@pytest.mark.slow
def test_lossless_training(tiny_model_dir, problems, tmp_path):
    pytest.importorskip("peft")
    words = ["collect", "--task", "gsm8k", "--model", tiny_model_dir, "--filename", problems, "--max_new_seq_len", "12"]
    words += ["--max_new_tokens", "4", "--output", tmp_path / "trajectories", "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "cllm", *map(str, words)], check=True, timeout=200)
    words = ["--model", tiny_model_dir, "--trajectories", tmp_path / "trajectories", "--batch_size", "2", "--steps", "2"]
    command = [sys.executable, FOLDER / "lossless_training.py", *words, "--rounds", "1", "--output", tmp_path / "result.json"]
    subprocess.run([*map(str, command), "--", "--attn_implementation", "eager"], check=True, timeout=200)
    result = json.loads((tmp_path / "result.json").read_text())["result"]
    assert result["times faster"] == result["times faster, by round"][0] > 0
    assert set(result["responses per second"]) == {"default objective", "lossless"}
    assert str(tmp_path) not in (tmp_path / "result.json").read_text()


@pytest.mark.parametrize("name", ["vllm_speed", "vllm_collection"])
def test_a_benchmark_of_vllm_shows_its_options(name):
    """They run in the environment of scripts/vllm_check.sh; here is at least what they take from the others."""
    shown = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), "--help"], check=True, capture_output=True, text=True).stdout
    assert "--model" in shown and "--output" in shown
