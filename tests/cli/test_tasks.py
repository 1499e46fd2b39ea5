"""`cllm tasks`, and chat's way through the commands."""

import json

import pytest
from tiny import tiny_tokenizer

from cllm.checkpoints import PUBLISHED
from cllm.cli import acc, collect, speedup
from cllm.cli import main as dispatch
from cllm.decoding import JacobiDecoder
from cllm.prompts import DIALOGUES
from cllm.tasks import get_task, task_names

TALKS = [
    {"conversations": [{"from": s, "value": v} for s, v in zip(("human", "gpt") * 2, turns, strict=True)]}
    for turns in (("Hi", "Hello", "And?", "Yes"), ("Who?", "Me", "Why?", "So"), ("One", "Two", "Three", "Four"))
]
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line", "Now another"]},
    {"question_id": 111, "category": "math", "turns": ["What is 1+1?", "And 2+2?"], "reference": ["2", "4"]},
]


pytestmark = pytest.mark.usefixtures("one_thread")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_all_tasks_are_listed(capsys):
    dispatch.main(["tasks"])
    text = capsys.readouterr().out
    for name in task_names():
        task = get_task(name)
        assert f"{name}: " in text and task.metric in text
        assert task.hub is None or task.hub.path in text
    assert all(checkpoint.name in text for checkpoint in PUBLISHED if checkpoint.task in task_names())
    assert all(name in text for name in DIALOGUES)


def test_an_unknown_task(capsys):
    with pytest.raises(SystemExit) as exit_:
        dispatch.main(["tasks", "chess"])
    assert exit_.value.code == 2 and "unknown task 'chess'" in capsys.readouterr().err


def test_collecting_first_turns_or_all(tmp_path, tiny_model_dir, capsys):
    data = tmp_path / "talks.json"
    data.write_text(json.dumps(TALKS))
    stored = {}
    for name, options in {"first": [], "all": ["--multi_turn"]}.items():
        words = ["--model", str(tiny_model_dir), "--filename", str(data), "--max_new_tokens", "4"]
        words += ["--max_new_seq_len", "16", "--device", "cpu", "--output", str(tmp_path / name), *options]
        collect.main(words, task="sharegpt")
        out = capsys.readouterr().out
        stored[name] = int(out.split()[0]) + sum(int(line.split()[0]) for line in out.splitlines()[1:])
    assert stored == {"first": 3, "all": 6}
    assert "task_options" not in json.loads((tmp_path / "first" / "settings.json").read_text())
    assert json.loads((tmp_path / "all" / "settings.json").read_text())["task_options"] == {"multi_turn": True}


def test_a_named_template_goes_through_speedup(tmp_path, tiny_model_dir, capsys):
    data, output = jsonl(tmp_path / "talks.jsonl", TALKS), tmp_path / "speedup.json"
    words = [
        "--test_model",
        str(tiny_model_dir),
        "--filename",
        str(data),
        "--max_new_seq_len",
        "8",
        "--max_new_tokens",
        "4",
    ]
    words += ["--device", "cpu", "--output", str(output), "--prompt_template", "deepseek-instruct"]
    speedup.main(words, task="sharegpt")
    assert json.loads(output.read_text())["settings"]["prompt_template"] == "deepseek-instruct"
    assert "deepseek-instruct template" in capsys.readouterr().out


def answer(tmp_path, model, *more, questions=QUESTIONS):
    data = jsonl(tmp_path / "question.jsonl", questions)
    words = ["--model_dir", str(model), "--filename", str(data), "--max_tokens", "12", "--dtype", "float32"]
    words += ["--device", "cpu", "--use_consistency_decoding", "--max_new_tokens_for_consistency", "5"]
    acc.main([*words, "--output_file_name", str(tmp_path / "mt.jsonl"), *more], task="sharegpt")
    return json.loads((tmp_path / "mt.accuracy.json").read_text())


def test_the_second_turn_is_asked_with_the_models_own_first_answer(tmp_path, tiny_model_dir, monkeypatch, capsys):
    asked = []
    generate = JacobiDecoder.generate
    monkeypatch.setattr(JacobiDecoder, "generate", lambda self, prompts, **k: asked.append(prompts) or generate(self, prompts, **k))
    answer(tmp_path, tiny_model_dir)
    (_, second), tokenizer = asked, tiny_tokenizer()
    rows = {r["target"]["question_id"]: r for r in map(json.loads, (tmp_path / "mt.jsonl").read_text().splitlines())}
    expected = []
    for question in sorted(QUESTIONS, key=lambda q: len(q["turns"][0])):
        row = rows[question["question_id"]]
        assert row["follow_ups"] == question["turns"][1:] and row["reply"] == row["replies"][1]
        expected.append(f"[user]{question['turns'][0]}\n[assistant]{row['replies'][0].strip()}\n[user]{question['turns'][1]}\n")
    assert [tokenizer.decode(ids) for ids in second] == [text + "[assistant]" for text in expected]
    exported = [json.loads(line) for line in (tmp_path / "mt.export.jsonl").read_text().splitlines()]
    assert [e["choices"][0]["turns"] for e in exported] == [[r.strip() for r in rows[q]["replies"]] for q in (81, 111)]
    assert exported[0]["model_id"] == tiny_model_dir.name
    assert "category=math" in capsys.readouterr().out
    before = len(asked)
    answer(tmp_path, tiny_model_dir)
    assert len(asked) == before  # nothing is asked twice


def test_a_conversation_that_outgrows_the_context(tmp_path, tiny_model_dir, capsys):
    long = [{"question_id": 1, "turns": ["Hi", "x" * 300]}, {"question_id": 2, "turns": ["y" * 300, "Hi"]}]
    summary = answer(tmp_path, tiny_model_dir, questions=long)["summary"]
    assert sorted(summary["too_long"]) == ["mt-bench-1", "mt-bench-2"]
    rows = {r["target"]["question_id"]: r for r in map(json.loads, (tmp_path / "mt.jsonl").read_text().splitlines())}
    assert rows[1]["replies"][0] and rows[1]["replies"][1] == "" and rows[2]["replies"] == ["", ""]


def test_changed_follow_ups_are_another_question(tmp_path, tiny_model_dir, capsys):
    answer(tmp_path, tiny_model_dir)
    other = [QUESTIONS[0] | {"turns": ["Write a line", "Something else"]}, QUESTIONS[1]]
    with pytest.raises(SystemExit):
        answer(tmp_path, tiny_model_dir, questions=other)
    assert "another question as mt-bench-81" in capsys.readouterr().err


def test_judging_from_the_command_line(tmp_path, tiny_model_dir, monkeypatch, capsys):
    from cllm.scoring.endpoint import Endpoint

    monkeypatch.setattr(Endpoint, "complete", lambda self, messages: f"Rating: [[{len(messages) + 5}]]")
    judge = ["--judge_model", "m", "--judge_base_url", "http://localhost:9/v1"]
    report = answer(tmp_path, tiny_model_dir, *judge)
    assert report["review"]["judge: all"] == {"turn 1": 7, "turn 2": 7, "mean": 7, "judged": 4, "no score": 0}
    assert set(report["review"]) == {"judge: all", "writing", "math"}
    assert len((tmp_path / "mt.judgments.jsonl").read_text().splitlines()) == 4
    printed = capsys.readouterr().out
    assert "judge: all" in printed and "scored with judge_model=m, judge_prompts=own" in printed
    report = answer(tmp_path, "no-model", "--eval_only", *judge)
    assert report["settings"]["scoring_options"] == {"judge_model": "m", "judge_prompts": "own"}
    assert report["review"]["math"]["mean"] == 7


def test_scores_are_there_when_the_judge_fails(tmp_path, tiny_model_dir, monkeypatch, capsys):
    from cllm.errors import UsageError
    from cllm.scoring.endpoint import Endpoint

    def fail(self, messages):
        raise UsageError("no judge today")

    monkeypatch.setattr(Endpoint, "complete", fail)
    with pytest.raises(SystemExit) as exit_:
        answer(tmp_path, tiny_model_dir, "--judge_model", "m", "--judge_base_url", "http://localhost:9/v1")
    assert exit_.value.code == 2 and "no judge today" in capsys.readouterr().err
    assert json.loads((tmp_path / "mt.accuracy.json").read_text())["summary"]["answers"] == 2
    assert (tmp_path / "mt.export.jsonl").exists()


def test_export_where_there_is_no_format(tmp_path, tiny_model_dir, capsys):
    data = jsonl(tmp_path / "rows.jsonl", [{"question": "1+1?", "target": "2"}])
    with pytest.raises(SystemExit) as exit_:
        acc.main(["--model_dir", str(tiny_model_dir), "--filename", str(data), "--export", "x.jsonl"], task="gsm8k")
    assert exit_.value.code == 2 and "has no format of its own" in capsys.readouterr().err
