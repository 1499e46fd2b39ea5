"""Prompts from anywhere: mixed, each once, and split the same way every time."""

from pathlib import Path

import pytest
from commands import question_rows, write_rows

from cllm.errors import UsageError
from cllm.making.sources import HELD_OUT_MOST, Source, gather, split_off


def asked(gathered) -> list[str]:
    return [example.messages[-1]["content"] for example in gathered.examples.values()]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    own = write_rows(tmp_path / "own.jsonl", [{"prompt": f"Why {n}?"} for n in range(30)] + [{"prompt": "Why 3?"}, "torn"])
    task = write_rows(tmp_path / "task.jsonl", question_rows(20))
    return [str(own), f"gsm8k:{task}"]


def test_files_mix_in_an_order_of_no_meaning(files: list[str]) -> None:
    found, turned = (gather([Source.parse(text) for text in texts], "train") for texts in (files, files[::-1]))
    assert asked(found) == asked(turned) and len(asked(found)) == 50
    assert found.skipped == {"asked more than once": 1, "not valid JSON": 1}
    kinds = [text.startswith("Why") for text in asked(found)]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_the_split_depends_on_the_prompts_alone(files: list[str]) -> None:
    first, again = (gather([Source.parse(text) for text in files], "train") for _ in range(2))
    held_out = split_off(first)
    assert len(held_out) == 10 and not held_out.keys() & first.examples.keys() and held_out == split_off(again)


@pytest.mark.parametrize(("count", "held_out"), [(3, 1), (20, 4), (1000, HELD_OUT_MOST)])
def test_how_many_are_held_out(tmp_path: Path, count: int, held_out: int) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"question {n}" for n in range(count)))
    assert len(split_off(gather([Source.parse(path)], "train"))) == held_out


def test_what_is_left_out_is_counted(files: list[str]) -> None:
    found = gather([Source.parse(files[0])], "train")
    names = list(found.examples)
    found.leave_out([*names[:3], "unknown"], "held out as well")
    assert len(found.examples) == 27 and found.skipped["held out as well"] == 3
    found.leave_out(names[:3], "held out as well")
    assert found.skipped["held out as well"] == 3


def test_names_and_stamps(files: list[str], tmp_path: Path) -> None:
    own, task = map(Source.parse, files)
    assert (own.label, task.label, task.task.name) == ("own.jsonl", "task.jsonl", "gsm8k")
    assert (Source.parse("gsm8k").file, Source.parse("gsm8k").label) == (None, "gsm8k")
    before = own.stamp()
    assert Source.parse(files[0]).stamp() == before
    write_rows(Path(files[0]), [{"prompt": "other"}])
    assert own.stamp() != before
    folder = tmp_path / "folder"
    folder.mkdir()
    of_folder = Source.parse(folder).stamp()
    (folder / "x").write_text("x")
    assert Source.parse(folder).stamp() != of_folder


@pytest.mark.parametrize("text", ["nowhere.jsonl", "chess:rows.jsonl", ""])
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(UsageError, match="no such file"):
        Source.parse(text)


def test_a_task_without_its_file() -> None:
    with pytest.raises(UsageError, match="no such file: nowhere.jsonl"):
        Source.parse("gsm8k:nowhere.jsonl")
