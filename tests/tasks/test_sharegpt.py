"""Chat rows: which turns are asked, what is skipped, and how answers are handed to FastChat."""

import gzip
import json
from argparse import ArgumentParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.errors import UsageError
from cllm.prompts import DIALOGUES
from cllm.tasks import get_task
from cllm.tasks.base import BadRow, Example, user_turn
from cllm.tasks.source import load_examples

TASK = get_task("sharegpt")


def configured(*words, command="collect"):
    options = ArgumentParser()
    TASK.add_options(options, command)
    return TASK.configure(options.parse_args(words))


def talk(*turns, system=None):
    speakers = ["human", "gpt"]
    head = [{"from": "system", "value": system}] if system is not None else []
    return {"conversations": head + [{"from": speakers[n % 2], "value": t} for n, t in enumerate(turns)]}


def read(row, *words, number=7):
    return list(configured(*words).read([(number, row)], "train"))


def contents(example):
    return [m["content"] for m in example.messages]


def test_first_turns_by_default():
    (example,) = read(talk("q1", "a1", "q2", "a2"))
    assert example.messages == ({"role": "user", "content": "q1"},)
    assert (example.id, example.reference, example.tags) == ("sharegpt-train-7", "a1", {})


def test_multi_turn_gives_every_answered_turn_with_what_came_before():
    first, second = read(talk("q1", "a1", "q2", "a2", "q3"), "--multi_turn")
    assert contents(first) == ["q1"] and contents(second) == ["q1", "a1", "q2"]
    assert (second.id, second.reference, second.tags) == ("sharegpt-train-7-2", "a2", {"turn": "2"})
    assert configured("--multi_turn").settings() == {"multi_turn": True} and configured().settings() == {}


def test_a_first_turn_needs_no_reply():
    (example,) = read(talk("q1"))
    assert example.reference is None


def test_the_messages_form_and_a_system_message():
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": " q "},
            {"role": "assistant", "content": "a"},
        ]
    }
    (example,) = read(row)
    assert [m["role"] for m in example.messages] == ["system", "user"] and contents(example) == ["Be brief.", "q"]
    assert example.reference == "a"
    assert contents(read(talk("q", "a", system=""))[0]) == ["q"]


@pytest.mark.parametrize(
    ("beside", "turns", "expected"),
    [
        ({"system": "Answer in verse."}, [], ["Answer in verse.", "q"]),
        ({"system_prompt": " Answer in verse.\n"}, [], ["Answer in verse.", "q"]),
        ({"system": "Answer in verse."}, [("system", "No rhymes.")], ["Answer in verse.\n\nNo rhymes.", "q"]),
        ({"system": "Answer in verse."}, [("system", "Answer in verse.")], ["Answer in verse.", "q"]),
        ({"system": "Answer in verse."}, [("gpt", "... and so on")], ["Answer in verse.", "q"]),
        ({}, [("system", "Answer in verse."), ("system", "No rhymes.")], ["Answer in verse.\n\nNo rhymes.", "q"]),
        ({}, [("developer", "Answer in verse.")], ["Answer in verse.", "q"]),
        ({"system": " ", "system_prompt": None}, [], ["q"]),
    ],
)
@pytest.mark.parametrize(("turns_in", "speaker", "text"), [("conversations", "from", "value"), ("messages", "role", "content")])
def test_all_that_the_system_says_is_in_the_prompt(beside, turns, expected, turns_in, speaker, text):
    said = [*turns, ("human", "q"), ("gpt", "a")]
    (example,) = read(beside | {turns_in: [{speaker: who, text: what} for who, what in said]})
    assert (contents(example), example.reference) == (expected, "a")
    assert [m["role"] for m in example.messages] == ["system", "user"][-len(expected) :]


def test_a_shared_row_with_a_system_field(shared_cases):
    row = json.loads((shared_cases / "sharegpt_system_field.jsonl").read_text())
    (example,) = read(row)
    assert contents(example) == [row["system"], row["conversations"][0]["value"]]


def test_pieces_that_start_with_the_assistant():
    row = {"conversations": [{"from": "gpt", "value": "... and so on"}, *talk("q", "a")["conversations"]]}
    assert contents(read(row)[0]) == ["q"]


@pytest.mark.parametrize(
    "bad",
    [
        {"from": "human", "value": "again"},  # the same speaker twice
        {"from": "tool", "value": "x"},
        {"from": "gpt", "value": " "},
        {"from": "gpt", "value": 3},
        {"from": "gpt"},
        {"from": None, "value": "x"},
        {"from": "system", "value": "late"},
        {"from": "gpt", "value": "\ud800"},
        "text",
    ],
)
def test_a_conversation_is_cut_where_it_breaks(bad):
    row = talk("q1", "a1", "q2")
    row["conversations"] += [bad, {"from": "gpt", "value": "a"}, {"from": "human", "value": "q3"}]
    (example,) = read(row, "--multi_turn")
    assert (contents(example), example.reference) == (["q1"], "a1")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": "#### 1"}, "no field 'conversations', 'messages' or 'turns'"),
        ({"conversations": "q"}, "field 'conversations' is not a list"),
        ({"conversations": []}, "no user turn"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "no user turn"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "unknown speaker"),
        ({"conversations": [{"from": "human", "value": ""}]}, "a turn without text"),
        ({"conversations": ["q"]}, "unknown speaker"),
        ({"turns": ["q"]}, "no field 'question_id'"),
        ({"question_id": 1, "turns": []}, "field 'turns' is not a list of texts"),
        ({"question_id": 1, "turns": "q"}, "field 'turns' is not a list of texts"),
        ({"question_id": 1, "turns": ["q", ""]}, "empty turns"),
        ({"system": ["S."]} | talk("q"), "field 'system' is not text"),
    ],
)
def test_bad_rows_have_a_reason(row, reason):
    assert read(row) == [BadRow(7, reason)]


FIELDS = st.sampled_from(["conversations", "messages", "turns", "from", "role", "value", "content", "question_id"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["human", "gpt", "system"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(FIELDS, json_values, max_size=4))
def test_no_row_can_stop_the_reader(row):
    for item in read(row, "--multi_turn"):
        assert isinstance(item, BadRow) or (isinstance(item, Example) and item.messages[-1]["role"] == "user")


def test_files_of_every_form_and_bad_rows_counted(tmp_path):
    rows = [talk("q1", "a1"), {"x": 1}, talk("q2", "a2")]
    for path, text in {
        "a.json": json.dumps(rows),
        "b.jsonl": "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n",
    }.items():
        (tmp_path / path).write_text(text)
        (tmp_path / (path + ".gz")).write_bytes(gzip.compress(text.encode()))
        for name in (path, path + ".gz"):
            stream = load_examples(TASK, tmp_path / name, "train")
            assert [contents(e) for e in stream] == [["q1"], ["q2"]]
            assert stream.bad["no field 'conversations', 'messages' or 'turns'"] == 1


def test_a_file_of_another_task_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    with pytest.raises(UsageError, match="expected rows with conversations or messages.*found the fields question, answer"):
        list(load_examples(TASK, tmp_path / "x.jsonl", "train"))


def test_mt_bench_questions():
    rows = [
        (1, {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": ["r1", "r2"]}),
        (2, {"question_id": 82, "turns": ["one"]}),
        (3, {"question_id": 82, "turns": ["again"]}),
    ]
    first, second, third = TASK.read(rows, "test")
    assert contents(first) == ["one"] and first.follow_ups == ("two",) and first.tags == {"category": "writing"}
    assert first.id == "mt-bench-81" and first.target == {"question_id": 81, "reference": ["r1", "r2"]}
    assert second.follow_ups == () and third == BadRow(3, "id given twice", "mt-bench-82")


def answer(question_id, *replies, **more):
    row = {"id": f"q{question_id}", "question": "one", "target": {"question_id": question_id}, "reply": replies[-1]}
    if len(replies) > 1:
        row |= {"follow_ups": ["two"], "replies": list(replies)}
    return row | more


def test_export_is_fastchats_format(tmp_path):
    task = configured("--model_id", "mine", command="acc")
    path = tmp_path / "answers.jsonl"
    assert task.export([answer(82, "only"), answer(81, " a1 ", "a2")], path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 2
    assert [row["question_id"] for row in rows] == [81, 82] and rows[0]["model_id"] == "mine"
    assert rows[0]["choices"] == [{"index": 0, "turns": ["a1", "a2"]}]
    assert rows[1]["choices"] == [{"index": 0, "turns": ["only"]}]
    assert len({row["answer_id"] for row in rows}) == 2


def test_conversations_have_no_export(tmp_path):
    row = {"id": "a", "question": "q", "target": None, "reply": "r"}
    assert TASK.export([row], tmp_path / "x.jsonl") is False and not (tmp_path / "x.jsonl").exists()


def test_score_and_review_without_a_judge(tmp_path):
    example = Example(user_turn("q"))
    assert TASK.score("hello", example) == {"answered": True} and TASK.score(" \n", example) == {"answered": False}
    assert TASK.review([answer(81, "a")], tmp_path / "x.jsonl") == {}


def test_the_report_says_who_judges(tmp_path):
    address = ["--judge_model", "m", "--judge_base_url", "http://localhost:9/v1"]
    assert configured(*address, command="acc").scoring_settings() == {"judge_model": "m", "judge_prompts": "own"}
    task = configured(*address, command="acc")
    task.judge.prompts_from = "judge_prompts.jsonl"
    assert task.scoring_settings()["judge_prompts"] == "judge_prompts.jsonl"
    assert configured(command="acc").scoring_settings() == {}


def test_the_plain_prompt_is_vicunas():
    assert TASK.plain_template == DIALOGUES["vicuna"].text


@pytest.mark.parametrize("name", ["oasst_en_100_threads.json.gz", "dummy_conversation.json.gz"])
def test_real_conversations(shared_data, name):
    path = shared_data / "chat" / name
    first = list(load_examples(TASK, path, "train"))
    every = list(load_examples(configured("--multi_turn"), path, "train"))
    assert len(first) >= 500 and len(every) > len(first) and len({e.id for e in every}) == len(every)
    assert all(len(e.messages) == 1 and e.reference for e in first)
    assert {e.id for e in first} <= {e.id for e in every}
    assert max(len(e.messages) for e in every) >= 3


def test_real_mt_bench(shared_data):
    examples = list(load_examples(TASK, shared_data / "mt_bench" / "question.jsonl", "test"))
    assert len(examples) == 80 and all(len(e.follow_ups) == 1 for e in examples)
    assert {e.tags["category"] for e in examples} == set("writing roleplay reasoning math coding extraction stem humanities".split())
    assert sum("reference" in e.target for e in examples) == 39
