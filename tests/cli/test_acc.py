"""The acc command, end to end on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_checkpoint, tiny_tokenizer

from cllm.cli import acc
from cllm.errors import UsageError
from cllm.evaluation.accuracy_run import choose_prompt
from cllm.scoring.sandbox import protection
from cllm.tasks import get_task

QUESTIONS = ["What is 1 + 2?", "How many legs have 3 dogs?", "Tom has 5 apples and eats 2. How many are left?"]
SCRIPT = Path(__file__).parents[2] / "eval" / "gsm8k" / "acc.py"
PLAIN = get_task("gsm8k").plain_template
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [
        {"question": q, "target": str(n), "source": "GSM8K" if n else "math", "tag": {"level": str(n % 2)}} for n, q in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, model, data, *more):
    words = ["--model_dir", str(model), "--filename", str(data), "--max_tokens", "20", "--dtype", "float32"]
    acc.main([*words, "--device", "cpu", "--output_file_name", str(tmp_path / "answers.jsonl"), *more], task="gsm8k")
    return json.loads((tmp_path / "answers.accuracy.json").read_text())


def test_guesses_change_no_reply_and_belong_to_the_settings(tmp_path, tiny_model_dir, data, capsys):
    run(tmp_path, tiny_model_dir, data, "--use_consistency_decoding")
    first = answers(tmp_path)
    words = (tmp_path, tiny_model_dir, data, "--use_consistency_decoding", "--guess", "pool+prompt_lookup")
    with pytest.raises(SystemExit):
        run(*words)
    assert "guess was 'context' and is 'pool+prompt_lookup'" in capsys.readouterr().err
    assert run(*words, "--no-resume")["settings"]["guess"] == "pool+prompt_lookup"
    assert [row["reply"] for row in answers(tmp_path)] == [row["reply"] for row in first]


def test_a_measured_guess_goes_on_with_its_file(tmp_path, tiny_model_dir, data, caplog):
    words = (tmp_path, tiny_model_dir, data, "--use_consistency_decoding", "--guess", "auto")
    with caplog.at_level("INFO"):
        assert run(*words)["settings"]["guess"] == run(*words)["settings"]["guess"] == "auto"
    assert caplog.text.count("--guess auto: ") == 1  # the second time there is nothing left to answer


def answers(tmp_path):
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


def test_consistency_and_ar_decoding_answer_the_same(tmp_path, tiny_model_dir, data, capsys):
    consistent = run(tmp_path, tiny_model_dir, data, "--use_consistency_decoding", "--max_new_tokens_for_consistency", "6")
    first = {row["id"]: row["reply"] for row in answers(tmp_path)}
    assert "Jacobi decoding, block size 6" in capsys.readouterr().out
    plain = run(tmp_path, tiny_model_dir, data, "--no-resume", "--batch_size", "1")
    assert {row["id"]: row["reply"] for row in answers(tmp_path)} == first and len(first) == 3
    assert plain["summary"]["tokens_per_forward"] == 1.0 <= consistent["summary"]["tokens_per_forward"]
    assert (plain["settings"]["block_size"], consistent["settings"]["block_size"]) == (1, 6)
    printed = capsys.readouterr().out
    for text in ("autoregressive decoding", "accuracy", "strict", "source=GSM8K", "level=0", "3 questions"):
        assert text in printed


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, tiny_model_dir, data, capsys):
    whole = run(tmp_path, tiny_model_dir, data, "--batch_size", "1")
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text(lines[0] + lines[1][:25])
    again = run(tmp_path, tiny_model_dir, data, "--batch_size", "1")
    assert (tmp_path / "answers.jsonl").read_text() == "".join(lines)
    assert again["summary"] == whole["summary"]


def test_draws_depend_on_the_seed_and_the_question_alone(tmp_path, tiny_model_dir, data, capsys):
    """Not on the block size, the batch, or where an earlier run was stopped."""
    options = ["--temperature", "0.9", "--top_p", "0.95", "--top_k", "50"]
    plain = run(tmp_path, tiny_model_dir, data, *options, "--batch_size", "1")
    assert "autoregressive decoding, temperature 0.9, top_k 50, top_p 0.95, float32" in capsys.readouterr().out
    assert plain["settings"]["sampling"] == {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 0,
    }
    first = {row["id"]: row["reply"] for row in answers(tmp_path)}
    run(tmp_path, tiny_model_dir, data, *options, "--no-resume", "--use_consistency_decoding")
    assert {row["id"]: row["reply"] for row in answers(tmp_path)} == first
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text(lines[0])
    run(tmp_path, tiny_model_dir, data, *options, "--use_consistency_decoding")
    assert {row["id"]: row["reply"] for row in answers(tmp_path)} == first
    run(tmp_path, tiny_model_dir, data, *options, "--no-resume", "--seed", "1")
    assert {row["id"]: row["reply"] for row in answers(tmp_path)} != first
    with pytest.raises(SystemExit):
        run(tmp_path, tiny_model_dir, data, "--seed", "1")
    assert "sampling was {'temperature': 0.9" in capsys.readouterr().err


def test_resume_never_decodes_twice(tmp_path, tiny_model_dir, data, monkeypatch):
    run(tmp_path, tiny_model_dir, data, "--data_size", "2")
    assert len(answers(tmp_path)) == 2
    asked = []
    generate = acc_decoder().generate

    def spy(self, prompts, **options):
        asked.append(len(prompts))
        return generate(self, prompts, **options)

    monkeypatch.setattr(acc_decoder(), "generate", spy)
    assert run(tmp_path, tiny_model_dir, data)["summary"]["answers"] == 3
    assert asked == [1]


def acc_decoder():
    from cllm.decoding import JacobiDecoder

    return JacobiDecoder


def test_resume_with_other_settings_is_refused(tmp_path, tiny_model_dir, data, capsys):
    run(tmp_path, tiny_model_dir, data)
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, tiny_model_dir, data, "--max_tokens", "21")
    assert exit_.value.code == 2
    assert "max_tokens was 20 and is 21" in capsys.readouterr().err


def test_eval_only_scores_without_the_model(tmp_path, tiny_model_dir, data, capsys):
    run(tmp_path, tiny_model_dir, data)
    rows = answers(tmp_path)
    for row in rows:
        row["reply"] = f"#### {row['target']}"
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(tmp_path, "no_model_here", "no_file_here", "--eval_only")
    assert report["summary"]["scores"]["strict"]["mean"] == 1.0 == report["summary"]["scores"]["accuracy"]["mean"]
    assert run(tmp_path, "no_model_here", "no_file_here", "--eval_only", "--dev_set", "math")["summary"]["answers"] == 1
    assert report["settings"]["block_size"] == 1


def test_eval_only_without_answers(tmp_path, tiny_model_dir, data, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, tiny_model_dir, data, "--eval_only")
    assert exit_.value.code == 2 and "no answers in" in capsys.readouterr().err


def rescored(tmp_path, *more, task="gsm8k"):
    acc.main(["--eval_only", "--output_file_name", str(tmp_path / "answers.jsonl"), *more], task=task)
    return json.loads((tmp_path / "answers.accuracy.json").read_text())


def test_eval_only_knows_the_model_from_the_answers(tmp_path, tiny_model_dir, data, capsys):
    run(tmp_path, tiny_model_dir, data)
    for more in ([], ["--model_dir", "another"]):
        assert rescored(tmp_path, *more)["settings"]["model"] == str(tiny_model_dir)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        acc.main(["--filename", str(data)], task="gsm8k")
    assert "required: --model_dir" in capsys.readouterr().err


def test_answers_of_another_task_are_refused(tmp_path, tiny_model_dir, data, capsys):
    run(tmp_path, tiny_model_dir, data)
    with pytest.raises(SystemExit) as exit_:
        rescored(tmp_path, task="sharegpt")
    assert exit_.value.code == 2
    assert "answers.jsonl holds answers of task 'gsm8k', not 'sharegpt'" in capsys.readouterr().err
    (tmp_path / "answers.jsonl.settings.json").unlink()
    rows = [row | {"target": {"question_id": 1}} for row in answers(tmp_path)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as exit_:
        rescored(tmp_path)
    assert exit_.value.code == 2
    assert "answers that are none of task 'gsm8k', such as gsm8k-test-1" in capsys.readouterr().err


def test_a_reply_that_is_no_text_is_refused(tmp_path, tiny_model_dir, data, capsys):
    run(tmp_path, tiny_model_dir, data)
    rows = [row | {"reply": None} for row in answers(tmp_path)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as exit_:
        rescored(tmp_path)
    assert exit_.value.code == 2 and "reply of row 'gsm8k-test-1' is not text" in capsys.readouterr().err


def test_dev_set_takes_one_source(tmp_path, tiny_model_dir, data):
    assert run(tmp_path, tiny_model_dir, data, "--dev_set", "gsm8k")["summary"]["answers"] == 2
    assert {row["tags"]["source"] for row in answers(tmp_path)} == {"GSM8K"}


def test_a_long_prompt_counts_as_wrong(tmp_path, data, capsys):
    model = save_tiny_checkpoint(tmp_path / "m", max_position_embeddings=48)
    summary = run(tmp_path, model, data)["summary"]
    assert summary["answers"] == 3 and summary["too_long"] == ["gsm8k-test-3"]
    assert "1 prompts fill the model's context and count as wrong: gsm8k-test-3" in capsys.readouterr().out
    assert run(tmp_path, model, data)["summary"] == summary and len(answers(tmp_path)) == 3


@pytest.mark.parametrize(
    ("option", "prompt_type", "record", "chat", "expected"),
    [
        ("chat", "math-single", {"prompt_template": "R {question}"}, True, "chat"),
        ("plain", None, {"prompt_template": "R {question}"}, True, PLAIN),
        (None, "math-single", {"prompt_template": "R {question}"}, True, "R {question}"),
        (None, "math-single", {"prompt_template": "chat"}, True, "chat"),
        (None, "math-single", {}, True, PLAIN),
        (None, "math-single", {}, False, PLAIN),
        (None, None, {}, True, "chat"),
        (None, None, {}, False, PLAIN),
    ],
)
def test_which_prompt_wins(option, prompt_type, record, chat, expected):
    assert choose_prompt(option, PLAIN, tiny_tokenizer(chat), record, prompt_type=prompt_type).text == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-0.7"], "temperature must be 0 (greedy) or between 1e-05 and 100000, got -0.7"),
        (["--temperature", "1", "--seed", str(1 << 63)], "seed must be between -2**63 and 2**63 - 1, got 9223372036854775808"),
        (["--top_p", "-1"], "top_p must be between 0 and 1, got -1.0"),
        (["--filename", "missing.jsonl"], "cannot read missing.jsonl"),
        (["--dev_set", "svamp"], "no row has the source 'svamp'; choose from all, math, gsm8k"),
        (["--eval_only", "--data_size", "2"], "leave out --data_size"),
        (["--prompt_type", "math-few"], "invalid choice: 'math-few'"),
        (["--results", "."], "it is a folder"),
        (["--max_new_tokens_for_consistency", "1000", "--use_consistency_decoding"], "got 1000"),
    ],
)
def test_usage_errors_exit_with_2(tmp_path, tiny_model_dir, data, words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, tiny_model_dir, data, *words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_papers_command(tmp_path, tiny_model_dir, data):
    """Word for word, in a folder with a test.jsonl."""
    words = f"--model_dir {tiny_model_dir} --max_new_tokens_for_consistency 16 --temperature 0.0 --top_p 1.0 "
    words += "--output_file_name cllm_generated_gsm8k.jsonl --dev_set gsm8k --prompt_type math-single --max_tokens 32 "
    words += "--use_consistency_decoding"
    command = [sys.executable, str(SCRIPT), *words.split()]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "gsm8k, 2 questions" in done.stdout and "plain text template" in done.stdout
    assert len((tmp_path / "cllm_generated_gsm8k.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "cllm_generated_gsm8k.accuracy.json").exists()


def problems(tmp_path):
    """A file of one problem in the form of HumanEval."""
    try:
        protection()
    except UsageError as error:
        pytest.skip(str(error))
    problem = {
        "task_id": "Mine/0",
        "prompt": "def double(x):\n",
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    return str(tmp_path / "problems.jsonl")


def score_samples(tmp_path, *samples, more=()):
    """``acc --eval_only`` of the code task on samples of one problem."""
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps({"task_id": "Mine/0", "completion": code}) + "\n" for code in samples))
    words = ["--eval_only", "--filename", problems(tmp_path), *more]
    acc.main([*words, "--output_file_name", str(file)], task="code_search_net")
    return json.loads((tmp_path / "samples.accuracy.json").read_text())


def test_several_samples_of_a_problem_all_count(tmp_path):
    right, wrong = "    return 2 * x\n", "    return x\n"
    report = score_samples(tmp_path, right, wrong, right, wrong, more=["--num_samples", "2"])
    assert report["summary"]["answers"] == 4 and report["summary"]["scores"]["pass@1"]["mean"] == 0.5
    assert report["settings"]["scoring_options"] == {"timeout": 5}
    figures = report["review"]["Mine (1 problems, 4 samples)"]
    assert figures["pass@1"] == 0.5 and figures["pass@2"] == pytest.approx(1 - 1 / 6)


def test_samples_without_their_problems_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        score_samples(tmp_path, "    return x\n", more=["--filename", "missing.jsonl"])
    assert exit_.value.code == 2 and "cannot read missing.jsonl" in capsys.readouterr().err


def draw_samples(tmp_path, model, *more):
    words = ["--model_dir", str(model), "--filename", problems(tmp_path), "--max_tokens", "12", "--device", "cpu", *more]
    acc.main([*words, "--output_file_name", str(tmp_path / "answers.jsonl")], task="code_search_net")
    return json.loads((tmp_path / "answers.accuracy.json").read_text())


def test_several_samples_are_drawn(tmp_path, tiny_model_dir, capsys):
    draw = ["--temperature", "1.0", "--num_samples"]
    report = draw_samples(tmp_path, tiny_model_dir, *draw, "3")
    assert "3 answers (3 samples of each question)" in capsys.readouterr().out
    rows = answers(tmp_path)
    assert [row["id"] for row in rows] == ["Mine/0", "Mine/0#2", "Mine/0#3"]
    assert len({row["reply"] for row in rows}) == 3
    assert set(report["review"]["Mine (1 problems, 3 samples)"]) == {"pass@1", "pass@3"}
    draw_samples(tmp_path, tiny_model_dir, *draw, "4")
    assert answers(tmp_path)[:3] == rows and len(answers(tmp_path)) == 4  # more can be drawn later
    scored = draw_samples(tmp_path, tiny_model_dir, "--eval_only", "--num_samples", "4")
    assert scored["summary"]["answers"] == 4


def test_several_greedy_samples_are_refused(tmp_path, tiny_model_dir, capsys):
    with pytest.raises(SystemExit) as exit_:
        draw_samples(tmp_path, tiny_model_dir, "--num_samples", "5")
    assert exit_.value.code == 2 and "num_samples must be 1 at temperature 0, got 5" in capsys.readouterr().err
