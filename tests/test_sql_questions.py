"""scripts/sql_questions.py: questions are distinct, deterministic, balanced over kinds, and correct."""

import json
from argparse import ArgumentParser
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from commands import refused
from sql_databases import ALL, SHARED, Database
from sql_questions import main, placeholders, questions

from cllm.tasks import get_task
from cllm.tasks.base import Task
from cllm.tasks.source import load_examples

EVERY = questions(2560)
KINDS = [(database, sql) for database in ALL for sql in database.kinds]


def written(folder: Path, *words: object) -> dict[str, Any]:
    """The rows that the script writes by split, and the folder's files by name."""
    main([str(folder), *map(str, words)])
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return files | {"train": json.loads(files["train_spider.json"]), "test": json.loads(files["dev.json"])}


def kind(row: dict[str, str]) -> tuple[str, str]:
    """The query without its variable parts: quoted texts, numbers, and operators and functions that vary."""
    words = row["query"].replace("(", " ( ").replace(")", " ) ").split()
    choices = {"avg", "max", "min", ">", "<", "DESC", "ASC"}
    return row["db_id"], " ".join("?" if "'" in word or word.isdigit() or word in choices else word for word in words)


def test_there_are_many_kinds() -> None:
    assert len(ALL) >= 2 and len(KINDS) >= 30
    assert all(2 <= len(set(database.kinds[sql])) <= 4 for database, sql in KINDS)
    queries = " ".join(row["query"] for row in EVERY[: len(KINDS)])
    for wanted in "JOIN/GROUP BY/HAVING/ORDER BY/LIMIT/DISTINCT/LIKE/BETWEEN/NOT IN (SELECT/sum(/count(".split("/"):
        assert wanted in queries


@pytest.mark.parametrize(("database", "sql"), KINDS, ids=str)
def test_a_question_mentions_every_value_of_its_query(database: Database, sql: str) -> None:
    needed = placeholders(sql) - database.joins.keys()
    assert {name.removesuffix("2") for name in needed} <= SHARED.keys() | database.values.keys()
    assert all(placeholders(wording) == needed for wording in database.kinds[sql])


def test_questions_and_queries_are_distinct() -> None:
    assert len({row["question"] for row in EVERY}) == len({(row["db_id"], row["query"]) for row in EVERY}) == len(EVERY)
    assert not any("{" in text or "  " in text for row in EVERY for text in row.values())


def test_all_kinds_are_equally_frequent() -> None:
    for start, count in ((0, 256), (256, 60), (0, len(EVERY))):
        asked = Counter(map(kind, EVERY[start : start + count]))
        assert len(asked) == len(KINDS) and max(asked.values()) - min(asked.values()) <= 1


def test_the_same_arguments_give_the_same_files(tmp_path: Path) -> None:
    first, again, other = (written(tmp_path / name, 50, 20, "--seed", seed) for name, seed in zip("abc", (1, 1, 2)))
    assert first == again
    assert first["train"] != other["train"] and first["database/shop/shop.sqlite"] == other["database/shop/shop.sqlite"]


def test_held_out_questions_stay_held_out(tmp_path: Path) -> None:
    few, many = written(tmp_path / "few", 256, 60), written(tmp_path / "many", 256, 200)
    assert few["train"] == many["train"] and few["test"] == many["test"][:60]
    assert [len(many[split]) for split in ("train", "test")] == [256, 200]
    assert many["train"] + many["test"] == EVERY[:456]


@pytest.fixture(scope="module")
def task_and_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    """The task as `cllm acc` configures it."""
    pytest.importorskip("sqlglot")
    folder = tmp_path_factory.mktemp("sql")
    main([str(folder), "160", "80"])
    options = ArgumentParser()
    options.add_argument("--filename")
    task = get_task("spider")
    task.add_options(options, "acc")
    return task.configure(options.parse_args(["--filename", str(folder)])), folder


def test_every_gold_query_is_correct_and_finds_something(task_and_folder: tuple[Task, Path]) -> None:
    task, folder = task_and_folder
    streams = [load_examples(task, str(folder), split) for split in ("train", "test")]
    examples = list(chain(*streams))
    assert len(examples) == 240 and not any(stream.bad for stream in streams)
    for example in examples:
        assert example.reference and task.score(example.reference, example)["execution_accuracy"], example.reference
        assert not task.score("SELECT NULL", example)["execution_accuracy"]
        assert len(example.messages[0]["content"]) < 500  # a long prompt costs time


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, most = tmp_path / "file", len(EVERY)
    file.write_text("")
    assert "TRAIN: must be an integer >= 1, got '0'" in refused(capsys, main, tmp_path, 0, 1)
    assert "TEST: must be an integer >= 1, got 'x'" in refused(capsys, main, tmp_path, 1, "x")
    message = f"TRAIN + TEST must be <= {most}, the number of different questions, got {most + 1}"
    assert message in refused(capsys, main, tmp_path, most, 1)
    assert f"cannot write {file / 'train_spider.json'}" in refused(capsys, main, file, 1, 1)
    (tmp_path / "database").write_text("")
    assert f"cannot write {tmp_path / 'database'}" in refused(capsys, main, tmp_path, 1, 1)
