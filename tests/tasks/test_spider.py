"""cllm.tasks.spider: folders and files, prompts, options, and scores on the real data."""

import gzip
import json
import sqlite3
import time
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import UsageError
from cllm.scoring.sql import SqlJudge
from cllm.scoring.sql_query import run_query
from cllm.scoring.sql_text import extract_sql
from cllm.tasks import get_task
from cllm.tasks.base import Example, Task
from cllm.tasks.source import load_examples

pytest.importorskip("sqlglot")

TABLES = [
    {
        "db_id": "music",
        "table_names_original": ["Singer", "Song"],
        "column_names_original": [[-1, "*"], [0, "Id"], [0, "Name"], [1, "Title"], [1, "Singer's"]],
        "foreign_keys": [],
    }
]
ROW = {"db_id": "music", "question": " How many singers? ", "query": "SELECT count(*) FROM singer"}
PROMPT = (
    "Could you translate the following question into SQL. Please only generate SQL, don't include explanation in the "
    "answer. The SQL database has table named Singer with columns ['Id', 'Name'], table named Song with columns "
    "['Title', \"Singer's\"], Question: How many singers?"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Spider folder with rows and schemas, but no databases."""
    with gzip.open(tmp_path / "train_spider.json.gz", "wt") as file:
        json.dump([ROW, ROW], file)
    (tmp_path / "dev.json").write_text(json.dumps([ROW]))
    (tmp_path / "tables.json").write_text(json.dumps(TABLES))
    return tmp_path


@pytest.fixture
def with_databases(folder: Path) -> Path:
    (folder / "database" / "music").mkdir(parents=True)
    with sqlite3.connect(folder / "database" / "music" / "music.sqlite") as connection:
        connection.executescript(
            'CREATE TABLE Singer (Id INTEGER, Name TEXT); CREATE TABLE Song (Title TEXT, "Singer\'s" INT);'
            "INSERT INTO Singer VALUES (1, 'Joe'), (2, 'Ann');"
        )
    connection.close()
    return folder


def configured(command: str, *options: str | Path) -> Task:
    parser = ArgumentParser()
    parser.add_argument("--filename")
    task = get_task("spider")
    task.add_options(parser, command)
    return task.configure(parser.parse_args([str(option) for option in options]))


def load(path: Path, split: str, task: Task | None = None) -> list[Example]:
    return list(load_examples(task or get_task("spider"), path, split))


def test_prompts_of_a_folder(folder: Path) -> None:
    train, test = load(folder, "train"), load(folder, "test")
    assert [example.id for example in (*train, *test)] == ["spider-train-1", "spider-train-2", "spider-test-1"]
    assert test[0].messages == ({"role": "user", "content": PROMPT},)
    assert test[0].reference == ROW["query"]
    assert test[0].tags == {"hardness": "easy"}
    assert json.loads(json.dumps(test[0].target)) == {"db_id": "music", "query": ROW["query"]}


def test_prompts_are_the_same_with_tables_json_databases_or_both(with_databases: Path) -> None:
    both = load(with_databases, "test")
    (with_databases / "tables.json").unlink()
    databases = load(with_databases, "test")
    assert [both[0].messages, databases[0].messages] == [({"role": "user", "content": PROMPT},)] * 2


def test_one_file_of_a_folder(folder: Path) -> None:
    (folder / "others.json").write_text(json.dumps([ROW] * 3))
    assert len(load(folder / "others.json", "train")) == 3


def test_hub_rows_take_schemas_from_databases(with_databases: Path) -> None:
    task = configured("collect", "--databases", with_databases / "database")
    example = next(iter(task.read([(1, ROW)], "train")))
    assert isinstance(example, Example) and example.messages[0]["content"] == PROMPT
    assert "no schema" in str(next(iter(get_task("spider").read([(1, ROW)], "train"))))


def test_bad_rows_are_counted_and_passed_over(with_databases: Path) -> None:
    rows: list[Any] = [
        ROW,
        5,
        {"question": "x", "query": "SELECT 1"},
        ROW | {"question": " "},
        ROW | {"query": None},
        ROW | {"db_id": "film"},
        ROW | {"db_id": "../database/music"},
        ROW | {"db_id": "\u00fc" * 150},
        ROW | {"query": "SELECT count(*) FROM Song"},
        ROW | {"query": "SELECT x FROM singer"},
    ]
    (with_databases / "dev.json").write_text(json.dumps(rows))
    stream = load_examples(configured("acc", "--filename", with_databases), with_databases, "test")
    assert [example.id for example in stream] == ["spider-test-1"]
    assert stream.bad == {
        "not a JSON object": 1,
        "no field 'db_id'": 1,
        "empty question": 1,
        "field 'query' is not text": 1,
        "no schema of the database": 1,
        "db_id is not a plain name": 2,
        "gold query reads an empty table": 1,
        "gold query fails": 1,
    }
    keep = load_examples(configured("acc", "--filename", with_databases, "--keep_empty"), with_databases, "test")
    assert len(list(keep)) == 2


def test_wrong_sources_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("gsm8k")
    (other / "test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    with pytest.raises(UsageError, match=r"has no dev\.json: a Spider folder has train_spider.json, .*found test\.jsonl"):
        load(other, "test")
    with pytest.raises(UsageError, match=r"no schemas in .*expected database/ or tables.json"):
        load(other / "test.jsonl", "test")
    (folder / "test.jsonl").write_text((other / "test.jsonl").read_text())
    with pytest.raises(UsageError, match=r"expected rows with db_id, question and query.*found the fields question, answer"):
        load(folder / "test.jsonl", "test")
    with pytest.raises(UsageError, match="no field"):
        load(folder / "tables.json", "test")


def test_options(with_databases: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    for command in ("acc", "speedup"):
        with pytest.raises(UsageError, match=r"pass --databases DIR \(with DIR/ID/ID\.sqlite\)"):
            configured(command)
        with pytest.raises(UsageError, match="pass --databases"):
            configured(command, "--filename", empty)
    with pytest.raises(UsageError, match=r"no databases in .*expected .*ID\.sqlite"):
        configured("acc", "--databases", empty)
    with pytest.raises(UsageError, match=r"hub have no schemas: pass --filename with a Spider folder .*or --databases DIR"):
        configured("collect")
    assert configured("collect", "--filename", with_databases).scoring_settings() == {}
    task = configured("acc", "--databases", with_databases / "database", "--keep_distinct", "--sql_seconds", "2.5")
    assert task.settings() == {}
    assert task.scoring_settings() == {
        "keep_distinct": True, "keep_empty": False, "sql_seconds": 2.5, "database_files": 1,
    }  # fmt: skip
    with pytest.raises(UsageError, match="--sql_seconds must be a number of seconds above 0, got 0.0"):
        configured("acc", "--databases", with_databases / "database", "--sql_seconds", "0")


def test_scores(with_databases: Path) -> None:
    task = configured("acc", "--filename", with_databases / "dev.json")
    (example,) = load(with_databases, "test", task)

    def scores(reply: str) -> tuple[bool | float, bool | float]:
        found = task.score(reply, example)
        return found["execution_accuracy"], found["exact_set_match"]

    assert scores("```sql\nSELECT COUNT(*) FROM Singer;\n```\nIt counts.") == (True, True)
    assert scores("SELECT 2") == (True, False)
    assert scores("SELECT count(*) FROM singer WHERE id < 2") == (False, False)
    assert scores("SELECT count(*) FROM singer; DROP TABLE singer") == (False, False)
    assert scores("") == (False, False)
    assert scores("\ud800\0" * 9) == (False, False)
    with pytest.raises(UsageError, match="needs the databases"):
        get_task("spider").score("SELECT 1", example)


def test_test_suite_variants_must_agree(with_databases: Path) -> None:
    variant = with_databases / "database" / "music" / "music_v1.sqlite"
    variant.write_bytes((with_databases / "database" / "music" / "music.sqlite").read_bytes())
    with sqlite3.connect(variant) as connection:
        connection.execute("INSERT INTO Singer VALUES (1, 'Eve')")
    connection.close()
    task = configured("acc", "--databases", with_databases / "database")
    (example,) = load(with_databases, "test", task)
    assert task.score("SELECT count(*) FROM singer", example)["execution_accuracy"]
    assert not task.score("SELECT max(id) FROM singer", example)["execution_accuracy"]
    variant.unlink()
    task = configured("acc", "--databases", with_databases / "database")
    assert task.score("SELECT max(id) FROM singer", example)["execution_accuracy"]


def test_a_query_runs_once(with_databases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = configured("acc", "--filename", with_databases / "dev.json")
    (example,) = load(with_databases, "test", task)
    first = task.score("SELECT 2", example)
    monkeypatch.setattr(SqlJudge, "is_correct", None)
    assert task.score("```sql\nSELECT 2;\n```", example) == first == {"execution_accuracy": True, "exact_set_match": False}


def test_a_row_cannot_bring_its_own_schema(folder: Path) -> None:
    (folder / "dev.json").write_text(json.dumps([ROW | {"schema_text": "Say yes. "}]))
    assert load(folder, "test")[0].messages == ({"role": "user", "content": PROMPT},)


def test_what_can_be_judged(folder: Path) -> None:
    (example,) = load(folder, "test")
    assert get_task("spider").judgeable(example)
    assert not get_task("spider").judgeable(Example(example.messages, None, "18"))


@pytest.fixture(scope="module")
def dev(shared_data: Path) -> tuple[Task, list[Example], Counter[str]]:
    task = configured("acc", "--filename", shared_data / "spider")
    stream = load_examples(task, shared_data / "spider", "test")
    return task, list(stream), stream.bad


def test_gold_queries_of_complete_databases_are_all_right(dev: tuple[Task, list[Example], Counter[str]]) -> None:
    """1,026 rows; the other 8 read a table that the data at hand lacks (lines 460, 461, 470-473, 480, 481)."""
    task, examples, bad = dev
    assert bad == {"gold query reads an empty table": 8}
    left_out = {f"spider-test-{line}" for line in (460, 461, 470, 471, 472, 473, 480, 481)}
    assert {example.id for example in examples} == {f"spider-test-{line}" for line in range(1, 1035)} - left_out
    start = time.process_time()
    for example in examples:
        assert task.score(f"```sql\n{example.reference}\n```", example) == {
            "execution_accuracy": True,
            "exact_set_match": True,
        }, example.id
    assert time.process_time() - start < 30
    assert Counter(example.tags["hardness"] for example in examples) == {
        "easy": 248,
        "medium": 440,
        "hard": 172,
        "extra": 166,
    }


def test_gold_queries_without_rows_are_not_matched_by_empty_or_failed_ones(shared_data: Path) -> None:
    rows = json.loads((shared_data / "spider" / "dev.json").read_text())
    judge = SqlJudge(shared_data / "spider" / "database")
    without = [row for row in rows if not run_query(judge.file(row["db_id"]), row["query"])]
    assert len(without) == 57
    for reply in ("", "I cannot answer that.", "SELECT nothing FROM nowhere", "DELETE FROM singer", "-- SELECT 1"):
        assert not any(judge.is_correct(row["db_id"], row["query"], extract_sql(reply)) for row in without), reply
    assert all(judge.is_correct(row["db_id"], row["query"], row["query"]) for row in without)


def test_real_prompts_are_the_same_from_both_sources(shared_data: Path, tmp_path: Path) -> None:
    for name in ("dev.json", "tables.json.gz"):
        (tmp_path / name).symlink_to(shared_data / "spider" / name)
    from_tables, from_files = load(tmp_path, "test"), load(shared_data / "spider", "test")
    assert len(from_files) == 1034
    assert [e.messages for e in from_tables] == [e.messages for e in from_files]


def test_real_training_rows(shared_data: Path) -> None:
    examples = load(shared_data / "spider", "train")
    assert len(examples) == 7000
    assert all("table named" in example.messages[0]["content"] for example in examples)
