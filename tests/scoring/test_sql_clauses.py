"""cllm.scoring.sql_clauses and sql_hardness: exact set match and hardness levels by Spider's rules."""

import builtins
import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import UsageError
from cllm.scoring.sql_clauses import ParseFailure, parse, same_clauses, sqlglot
from cllm.scoring.sql_hardness import hardness
from cllm.scoring.sql_schema import Schema

pytest.importorskip("sqlglot")

SCHEMA = Schema(
    {"Singer": ("Id", "Name", "Age"), "Concert": ("Id", "Singer_Id", "Year"), "Song": ("Title", "Singer_Id")},
    ((("concert", "singer_id"), ("singer", "id")), (("song", "singer_id"), ("singer", "id"))),
)
JOIN = "FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.singer_id"


@pytest.mark.parametrize(
    ("why", "gold", "query", "same"),
    [
        ("letter case, spaces, semicolon", "SELECT name FROM singer;", "select  NAME from SINGER", True),
        ("order of columns", "SELECT name, age FROM singer", "SELECT age, name FROM singer", True),
        ("a column more", "SELECT name FROM singer", "SELECT name, age FROM singer", False),
        ("a column twice", "SELECT name, name, age FROM singer", "SELECT name, age, age FROM singer", False),
        ("aggregate", "SELECT max(age) FROM singer", "SELECT min(age) FROM singer", False),
        ("names of columns", "SELECT count(*) FROM singer", "SELECT count(*) AS n FROM singer", True),
        ("DISTINCT", "SELECT DISTINCT name FROM singer", "SELECT name FROM singer", True),
        ("DISTINCT inside", "SELECT count(DISTINCT name) FROM singer", "SELECT count(name) FROM singer", True),
        ("aliases", f"SELECT T1.name {JOIN}", "SELECT a.name FROM singer a JOIN concert b ON a.id = b.singer_id", True),
        ("no alias", f"SELECT T1.name {JOIN}", f"SELECT name {JOIN}", True),
        ("order of tables", f"SELECT name {JOIN}", "SELECT name FROM concert JOIN singer ON id = singer_id", True),
        ("foreign key", f"SELECT T1.id {JOIN}", f"SELECT T2.singer_id {JOIN}", True),
        ("no foreign key", f"SELECT T1.id {JOIN}", f"SELECT T2.id {JOIN}", False),
        ("another table", "SELECT id FROM singer", "SELECT id FROM concert", False),
        ("values", "SELECT name FROM singer WHERE age > 20", "SELECT name FROM singer WHERE age > 30", True),
        ("quotes", "SELECT age FROM singer WHERE name = 'Joe'", 'SELECT age FROM singer WHERE name = "Joe"', True),
        ("operator", "SELECT name FROM singer WHERE age > 20", "SELECT name FROM singer WHERE age >= 20", False),
        ("order of conditions", "SELECT id FROM singer WHERE age = 1 AND name = 'a'",
         "SELECT id FROM singer WHERE name = 'a' AND age = 1", True),
        ("AND or OR", "SELECT id FROM singer WHERE age = 1 AND name = 'a'",
         "SELECT id FROM singer WHERE age = 1 OR name = 'a'", False),
        ("NOT", "SELECT id FROM singer WHERE name LIKE 'a'", "SELECT id FROM singer WHERE name NOT LIKE 'a'", False),
        ("forms of NOT", "SELECT id FROM singer WHERE NOT name LIKE 'a'", "SELECT id FROM singer WHERE name NOT LIKE 'a'",
         True),
        ("group", "SELECT age FROM singer GROUP BY age", "SELECT age FROM singer GROUP BY name", False),
        ("having", "SELECT age FROM singer GROUP BY age HAVING count(*) > 1",
         "SELECT age FROM singer GROUP BY age HAVING count(*) < 1", False),
        ("order", "SELECT age FROM singer ORDER BY age", "SELECT age FROM singer ORDER BY age ASC", True),
        ("direction", "SELECT age FROM singer ORDER BY age", "SELECT age FROM singer ORDER BY age DESC", False),
        ("a direction holds on", "SELECT age FROM singer ORDER BY age DESC, name",
         "SELECT age FROM singer ORDER BY age DESC, name DESC", True),
        ("the last direction", "SELECT age FROM singer ORDER BY age DESC, name",
         "SELECT age FROM singer ORDER BY age DESC, name ASC", False),
        ("outer join", f"SELECT name {JOIN}", f"SELECT name {JOIN.replace('JOIN', 'LEFT JOIN')}", False),
        ("side of a join", "SELECT name FROM singer LEFT JOIN concert ON id = singer_id",
         "SELECT name FROM concert LEFT JOIN singer ON id = singer_id", False),
        ("words of a join", f"SELECT name {JOIN.replace('JOIN', 'LEFT JOIN')}",
         f"SELECT name {JOIN.replace('JOIN', 'LEFT OUTER JOIN')}", True),
        ("inner join", f"SELECT name {JOIN}", f"SELECT name {JOIN.replace('JOIN', 'INNER JOIN')}", True),
        ("no order", "SELECT age FROM singer ORDER BY age", "SELECT age FROM singer", False),
        ("limit", "SELECT age FROM singer ORDER BY age LIMIT 1", "SELECT age FROM singer ORDER BY age LIMIT 3", True),
        ("no limit", "SELECT age FROM singer ORDER BY age LIMIT 1", "SELECT age FROM singer ORDER BY age", False),
        ("nested", "SELECT id FROM singer WHERE id IN (SELECT singer_id FROM concert WHERE year = 1)",
         "SELECT id FROM singer WHERE id IN (SELECT singer_id FROM concert WHERE year = 2)", True),
        ("nested, other", "SELECT id FROM singer WHERE id IN (SELECT singer_id FROM concert WHERE year = 1)",
         "SELECT id FROM singer WHERE id IN (SELECT singer_id FROM song)", False),
        ("nested or not", "SELECT id FROM singer WHERE id IN (SELECT 1)", "SELECT id FROM singer WHERE id IN (1)", False),
        ("in FROM", "SELECT count(*) FROM (SELECT id FROM singer)", "SELECT count(*) FROM (SELECT name FROM singer)", False),
        ("set operator", "SELECT id FROM singer UNION SELECT id FROM concert",
         "SELECT id FROM singer EXCEPT SELECT id FROM concert", False),
        ("sides", "SELECT id FROM singer EXCEPT SELECT id FROM concert",
         "SELECT id FROM concert EXCEPT SELECT id FROM singer", False),
        ("UNION ALL", "SELECT id FROM singer UNION SELECT id FROM concert",
         "SELECT id FROM singer UNION ALL SELECT id FROM concert", False),
        ("WITH", "SELECT id FROM singer", "WITH x AS (SELECT 1) SELECT id FROM singer", False),
        ("no SQL", "SELECT id FROM singer", "I do not know", False),
        ("nothing", "SELECT id FROM singer", "", False),
        ("a write", "SELECT id FROM singer", "DELETE FROM singer", False),
        ("several", "SELECT id FROM singer", "SELECT id FROM singer; SELECT 1", False),
    ],
)  # fmt: skip
def test_set_match(why: str, gold: str, query: str, same: bool) -> None:
    assert same_clauses(gold, query, SCHEMA) is same, why
    assert same_clauses(gold, gold, SCHEMA)
    assert same_clauses(query, gold, SCHEMA) is same, why


@pytest.mark.parametrize(
    ("level", "query"),
    [
        ("easy", "SELECT count(*) FROM singer"),
        ("easy", "SELECT name FROM singer WHERE age > 20"),
        ("medium", "SELECT name, age FROM singer WHERE age > 20"),
        ("medium", "SELECT name, count(*) FROM singer GROUP BY name"),
        ("medium", f"SELECT T1.name {JOIN} WHERE T2.year = 2014"),
        ("hard", f"SELECT T1.name {JOIN} WHERE T2.year = 2014 ORDER BY T1.age"),
        ("hard", "SELECT name FROM singer WHERE age > (SELECT avg(age) FROM singer)"),
        ("hard", "SELECT id FROM singer EXCEPT SELECT singer_id FROM concert"),
        ("extra", f"SELECT T1.name, count(*) {JOIN} GROUP BY T1.id ORDER BY count(*) DESC LIMIT 1"),
        ("extra", "SELECT id, name FROM singer WHERE age > (SELECT avg(age) FROM singer)"),
    ],
)
def test_hardness(level: str, query: str) -> None:
    assert hardness(query) == level


def test_levels_of_the_real_data(shared_data: Path) -> None:
    """The counts on the dev set equal those that the official evaluator prints."""
    rows = json.loads((shared_data / "spider" / "dev.json").read_text())
    assert Counter(hardness(row["query"]) for row in rows) == {"easy": 248, "medium": 446, "hard": 174, "extra": 166}
    with gzip.open(shared_data / "spider" / "train_spider.json.gz") as file:
        for row in json.load(file):
            assert parse(row["query"])


def test_deep_and_long_queries_are_fast() -> None:
    nested = "SELECT * FROM " + "(SELECT * FROM " * 30 + "singer" + ")" * 30
    start = time.process_time()
    assert same_clauses(nested, nested, SCHEMA)
    for query in (
        "SELECT " + "(" * 5000,
        "SELECT " + "f(" * 3000,
        "SELECT id FROM singer WHERE " + "NOT " * 4000 + "1",
    ):
        assert not same_clauses("SELECT id FROM singer", query, SCHEMA)
    assert time.process_time() - start < 20


def test_texts_that_are_not_queries() -> None:
    for text in ("", "DROP TABLE singer", "SELECT 1 FROM", "SELECT 1; SELECT 2", "SELECT " + "1, " * 9000 + "1"):
        with pytest.raises(ParseFailure):
            parse(text)


def test_sqlglot_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("sqlglot"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="pip install sqlglot"):
        sqlglot()
