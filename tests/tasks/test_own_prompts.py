"""Prompts of one's own: the forms that are read, and what is skipped."""

import gzip
import json
from pathlib import Path

import pytest
from commands import write_rows

from cllm.files import BadRow
from cllm.tasks import OWN_PROMPTS, get_task
from cllm.tasks.base import Example
from cllm.tasks.source import load_examples

TASK = get_task(OWN_PROMPTS)
ASKED = {"role": "user", "content": "Why?"}


def read(*rows) -> list[Example | BadRow]:
    return list(TASK.read(enumerate(rows, 1), "train"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " Why?\n"},
        {"messages": [ASKED]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]},
        {"model": "m", "messages": [ASKED], "temperature": 0.7, "stream": True},
        {"time": 12.5, "request": {"model": "m", "messages": [ASKED]}, "response": {"choices": []}},
        {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [ASKED]}},
        {"request": {"body": {"prompt": "Why?"}}},
    ],
)
def test_every_form_asks_the_same(row: dict) -> None:
    (example,) = read(row)
    assert example.messages == (ASKED,) and example.reference is None and not TASK.judgeable(example)


def test_a_list_of_prompts_is_several_examples() -> None:
    found = read({"prompt": ["a", "b"]})
    assert [e.messages[0]["content"] for e in found] == ["a", "b"] and len({e.id for e in found}) == 2


def test_a_conversation_ends_where_its_last_reply_begins() -> None:
    turns = [{"role": "developer", "content": "Be short."}, ASKED, {"role": "assistant", "content": "So."}, ASKED]
    (open_, ended) = read({"messages": turns}, {"messages": [*turns, {"role": "assistant", "content": "Because."}]})
    assert open_.messages == ended.messages and [m["role"] for m in open_.messages] == ["system", "user", "assistant", "user"]
    assert ended.reference == "Because." and TASK.score(" Because.\n", ended) == {"same_reply": True}
    assert TASK.score("So", ended) == {"same_reply": False}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "Why?"}, "no field 'prompt'"),
        ({"prompt": "  "}, "empty prompt"),
        ({"prompt": [1, 2]}, "field 'prompt' is not text"),
        ({"messages": "Why?"}, "not a list"),
        ({"messages": []}, "does not end in a user turn"),
        ({"messages": [{"role": "system", "content": "x"}]}, "does not end in a user turn"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a role other than"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "more than text"),
        ({"messages": [{"role": "user", "content": None}]}, "not text"),
        ({"request": "GET /"}, "no field 'prompt'"),
    ],
)
def test_what_is_passed_over(row: dict, reason: str) -> None:
    (bad,) = read(row)
    assert isinstance(bad, BadRow) and reason in bad.reason and bad.line == 1


def test_files(tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("Why?\n\n  How?\n")
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": "Why?"}, "no JSON", {"prompt": "How?"}])
    packed = tmp_path / "p.txt.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    for path in (lines, rows, packed):
        examples = list(load_examples(TASK, path, "train"))
        assert [e.messages[0]["content"] for e in examples] == ["Why?", "How?"]
        assert [e.id.rpartition("-")[2] for e in examples] == ["1", "3"]


def test_a_log_of_requests_in_the_shared_cases(request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue("shared_data").parent / "cases" / "requests.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = [read(json.loads(line))[0] for line in path.read_text().splitlines()]
    assert [isinstance(item, Example) for item in found] == [True, True, False]
