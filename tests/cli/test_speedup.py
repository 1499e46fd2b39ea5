"""The speedup command, end to end on a tiny model."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import refused
from tiny import save_tiny_checkpoint

from cllm.cli import speedup

QUESTIONS = ["What is 1 + 2?", "How many legs have 3 dogs?", "Tom has 5 apples and eats 2. How many are left?"]
SCRIPT = Path(__file__).parents[2] / "eval" / "gsm8k" / "speedup.py"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": f"x\n#### {n}"}) + "\n" for n, q in enumerate(QUESTIONS)))
    return path


def run(tmp_path, model, data, *more, task="gsm8k"):
    output = tmp_path / "out" / "speedup.json"
    words = ["--test_model", str(model), "--filename", str(data), "--max_new_tokens", "6", "--max_new_seq_len", "24"]
    speedup.main([*words, "--dtype", "float32", "--device", "cpu", "--output", str(output), *more], task=task)
    return json.loads(output.read_text())


def test_all_methods_against_a_target_model(tmp_path, tiny_model_dir, data, capsys):
    target = save_tiny_checkpoint(tmp_path / "target", seed=1)
    report = run(
        tmp_path,
        tiny_model_dir,
        data,
        "--baseline",
        "generate",
        "--baseline",
        "prompt_lookup",
        "--target_model",
        str(target),
    )
    assert list(report["methods"]) == ["jacobi", "ar", "generate", "prompt_lookup"]
    for figures in report["methods"].values():
        assert figures["responses"] == 3 and figures["same_as_ar"] == 1.0
        assert 0 < figures["prefill_seconds"] < figures["seconds"]
    assert report["divergences"] == []
    assert report["methods"]["ar"]["tokens_per_forward"] == 1.0
    assert report["methods"]["jacobi"]["tokens"] == sum(row["methods"]["jacobi"]["tokens"] for row in report["prompts"])
    assert sum(report["prompts"][0]["methods"]["jacobi"]["accepted"]) == report["prompts"][0]["methods"]["jacobi"]["tokens"]
    assert report["quality"]["jacobi"]["same_as_own_ar"] == 1.0
    assert report["quality"]["jacobi"]["nll_per_token"] > report["quality"]["target"]["nll_per_token"] > 0
    assert report["settings"]["block_size"] == 6 and report["settings"]["prompt_template"] == "chat"
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert [row["id"] for row in report["prompts"]] == ["gsm8k-test-1", "gsm8k-test-2", "gsm8k-test-3"]
    printed = capsys.readouterr().out
    for text in ("Jacobi 6 sliding", "HF prompt lookup 5", "target model", "NLL under the target", "prefix reuse within 1024"):
        assert text in printed


def test_an_explanation(tmp_path, tiny_model_dir, data, capsys):
    report = run(tmp_path, tiny_model_dir, data, "--explain")
    found = report["explanation"]
    assert [cost["width"] for cost in found["iterations"]] == [1, 2, 4, 6] and len(found["acceptance"]) == 5
    assert found["texts_checked"] == 3 and found["differences"] == [] and found["start"] == "context"
    printed = capsys.readouterr().out
    for text in ("per iteration", "Cold windows", "Prefill: ", "from context *", *found["findings"]):
        assert text in printed
    words = ["--test_model", tiny_model_dir, "--filename", data, "--explain", "--window", "block"]
    assert "--explain is about sliding windows" in refused(capsys, partial(speedup.main, task="gsm8k"), *words)


def test_every_guess_is_a_method(tmp_path, tiny_model_dir, data, capsys):
    guesses = ["--guess", "prompt_lookup", "context", "prompt_lookup"]
    report = run(tmp_path, tiny_model_dir, data, *guesses, "--prefix_cache", "0")
    assert list(report["methods"]) == ["jacobi", "jacobi:context", "ar"]
    assert [figures["same_as_ar"] for figures in report["methods"].values()] == [1.0] * 3
    assert report["settings"]["guess"] == ["prompt_lookup", "context"] and report["settings"]["prefix_cache"] == 0
    printed = capsys.readouterr().out
    assert "no prefix reuse" in printed
    assert printed.count("Jacobi 6 sliding, prompt_lookup") == printed.count("Jacobi 6 sliding, context") == 2


def test_stored_and_measured_guesses(tmp_path, data):
    model = save_tiny_checkpoint(tmp_path / "m", cllm={"decoding_guess": "prompt_lookup+pool"})
    assert run(tmp_path, model, data)["settings"]["guess"] == ["prompt_lookup+pool"]
    report = run(tmp_path, model, data, "--guess", "filler", "auto")
    assert report["settings"]["guess"][0] == "filler" and len(report["methods"]) == 3


def test_an_unknown_guess_is_refused_before_anything_is_loaded(tmp_path, data, capsys):
    words = ("--test_model", tmp_path / "none", "--filename", data, "--guess", "lucky")
    assert "unknown guess 'lucky'" in refused(capsys, partial(speedup.main, task="gsm8k"), *words)


@pytest.mark.parametrize("window", ["sliding", "block"])
def test_batches_give_the_same_texts(tmp_path, tiny_model_dir, data, window):
    def texts(*more):
        return [row["responses"] for row in run(tmp_path, tiny_model_dir, data, "--window", window, *more)["prompts"]]

    assert texts() == texts("--batch_size", "2")


def test_prompt_lookup_beside_a_batch(tmp_path, tiny_model_dir, data, capsys):
    report = run(tmp_path, tiny_model_dir, data, "--batch_size", "3", "--baseline", "prompt_lookup", "generate")
    assert [figures["same_as_ar"] for figures in report["methods"].values()] == [1.0] * 4
    assert "takes one prompt at a time" in capsys.readouterr().out


def test_a_model_against_itself_is_the_same(tmp_path, tiny_model_dir, data):
    report = run(tmp_path, tiny_model_dir, data, "--target_model", str(tiny_model_dir))
    assert report["quality"]["jacobi"]["same_as_target"] == 1.0
    assert report["quality"]["jacobi"]["nll_per_token"] == report["quality"]["target"]["nll_per_token"]


def test_block_size_and_template_come_from_the_checkpoints_record(tmp_path, data):
    record = {"block_size": 4, "prompt_template": "Q: {question}\nA:"}
    model = save_tiny_checkpoint(tmp_path / "m", cllm=record)
    output = tmp_path / "s.json"
    speedup.main(
        ["--test_model", str(model), "--filename", str(data), "--max_new_seq_len", "8", "--output", str(output)],
        task="gsm8k",
    )
    settings = json.loads(output.read_text())["settings"]
    assert (settings["block_size"], settings["prompt_template"]) == (4, record["prompt_template"])


def test_long_prompts_and_bad_rows_are_named(tmp_path, data, capsys):
    model = save_tiny_checkpoint(tmp_path / "m", max_position_embeddings=48)
    data.write_text(data.read_text() + "no json\n")
    report = run(tmp_path, model, data)
    assert report["data"]["too_long"] == ["gsm8k-test-3"] and report["data"]["prompts"] == 2
    assert report["data"]["bad_rows"] == {"not valid JSON": 1}
    assert all(row["prompt_tokens"] + row["methods"]["ar"]["tokens"] <= 48 for row in report["prompts"])
    assert "left out: 1 prompts that fill the context of 48 tokens: gsm8k-test-3" in capsys.readouterr().out


def test_data_size_takes_the_first(tmp_path, tiny_model_dir, data):
    assert [row["id"] for row in run(tmp_path, tiny_model_dir, data, "--data_size", "1")["prompts"]] == ["gsm8k-test-1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filename", "missing.jsonl"], "cannot read missing.jsonl"),
        (["--test_model", "no/such/model"], "no/such/model"),
        (["--max_new_tokens", "0"], "must be an integer >= 1, got '0'"),
        (["--max_new_tokens", "1000"], "block_size must be between 1 and the context length 256, got 1000"),
        (["--baseline", "magic"], "invalid choice: 'magic'"),
        (["--prompt_template", "no place"], "{question}"),
        (["--output", "."], "it is a folder"),
    ],
)
def test_usage_errors_exit_with_2(tmp_path, tiny_model_dir, data, words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, tiny_model_dir, data, *words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_no_prompt_fits(tmp_path, data, capsys):
    model = save_tiny_checkpoint(tmp_path / "m", max_position_embeddings=16)
    with pytest.raises(SystemExit):
        run(tmp_path, model, data)
    assert "all 3 prompts fill the model's context of 16 tokens" in capsys.readouterr().err


def test_a_target_with_another_vocabulary_is_refused(tmp_path, tiny_model_dir, data, capsys):
    target = save_tiny_checkpoint(tmp_path / "target")
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit):
        run(tmp_path, tiny_model_dir, data, "--target_model", str(target))
    assert "different vocabularies" in capsys.readouterr().err


def test_a_defect_in_float32_is_shouted(tmp_path, tiny_model_dir, data, monkeypatch, capsys):
    from cllm.evaluation.method import Engine

    decode = Engine.decode

    def wrong(self, prompts, max_new_tokens):
        responses = decode(self, prompts, max_new_tokens)
        if self.name == "jacobi":
            responses[0].token_ids[3] ^= 1
        return responses

    monkeypatch.setattr(Engine, "decode", wrong)
    report = run(tmp_path, tiny_model_dir, data)
    assert [d["token"] for d in report["divergences"]] == [3, 3, 3]
    assert report["methods"]["jacobi"]["same_as_ar"] == 0.0
    printed = capsys.readouterr().out
    assert "WARNING: in float32" in printed and "3 responses part from AR's" in printed


def test_the_papers_command(tmp_path, tiny_model_dir, data):
    """As the README has it, in the script's folder's place: finds ./test.jsonl without --filename."""
    words = [sys.executable, str(SCRIPT), "--test_model", str(tiny_model_dir), "--max_new_tokens", "16"]
    done = subprocess.run(
        [*words, "--max_new_seq_len", "16"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Jacobi 16 sliding" in done.stdout and (tmp_path / "speedup.json").exists()
