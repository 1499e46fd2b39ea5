"""cllm.scoring.sql: execution accuracy by the rules of the official test-suite evaluator."""

import sqlite3
from pathlib import Path

import pytest

from cllm.errors import UsageError
from cllm.scoring.sql import SqlJudge
from cllm.scoring.sql_query import Limits

SCRIPT = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INT);
INSERT INTO singer VALUES (1, 'Joe', 'France', 52), (2, 'Ann', 'France', 30), (3, 'Bob', 'Peru', 30), (4, 'Zoe', NULL, 41);
CREATE TABLE empty (id INTEGER);
"""


def add(folder: Path, variant: str, script: str) -> None:
    file = folder / "music" / f"{variant}.sqlite"
    file.parent.mkdir(exist_ok=True)
    with sqlite3.connect(file) as connection:
        connection.executescript(script)
    connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add(tmp_path, "music", SCRIPT)
    return tmp_path


NAMES_BY_AGE = "SELECT name FROM singer ORDER BY age DESC, id"


@pytest.mark.parametrize(
    ("why", "gold", "query", "right"),
    [
        ("same", "SELECT name FROM singer", "select NAME from SINGER", True),
        ("wrong column", "SELECT name FROM singer", "SELECT country FROM singer", False),
        ("a column more", "SELECT name FROM singer", "SELECT name, age FROM singer", False),
        ("a row more", "SELECT name FROM singer WHERE age > 30", "SELECT name FROM singer WHERE age >= 30", False),
        ("swapped columns", "SELECT name, age FROM singer", "SELECT age, name FROM singer", True),
        ("columns swapped in some rows", "SELECT 1, 2 UNION ALL SELECT 3, 4", "SELECT 1, 2 UNION ALL SELECT 4, 3", False),
        ("other row order", "SELECT name FROM singer", "SELECT name FROM singer ORDER BY name DESC", True),
        ("wrong order", NAMES_BY_AGE, "SELECT name FROM singer ORDER BY age, id", False),
        ("no order", NAMES_BY_AGE, "SELECT name FROM singer ORDER BY name DESC", False),
        ("same order by other means", NAMES_BY_AGE, "SELECT name FROM singer ORDER BY -age, id", True),
        ("missing DISTINCT", "SELECT DISTINCT country FROM singer", "SELECT country FROM singer", True),
        ("DISTINCT too many", "SELECT age FROM singer", "SELECT DISTINCT age FROM singer", True),
        ("duplicates", "SELECT age FROM singer", "SELECT age FROM singer UNION SELECT age FROM singer", False),
        ("duplicates of another row", "SELECT 1 UNION ALL SELECT 1 UNION ALL SELECT 2", "VALUES (1), (2), (2)", False),
        ("NULL", "SELECT country FROM singer WHERE id = 4", "SELECT NULL", True),
        ("NULL is no text", "SELECT country FROM singer WHERE id = 4", "SELECT ''", False),
        ("NULL is no 0", "SELECT NULL", "SELECT 0", False),
        ("integer and real", "SELECT count(*) FROM singer", "SELECT 4.0", True),
        ("number and text", "SELECT count(*) FROM singer", "SELECT '4'", False),
        ("rounding", "SELECT avg(age) FROM singer", "SELECT round(avg(age)) FROM singer", False),
        ("letter case of values", "SELECT name FROM singer WHERE id = 1", "SELECT 'joe'", False),
        ("split operator", "SELECT name FROM singer WHERE age >= 41", "SELECT name FROM singer WHERE age > = 41", True),
        ("semicolon", "SELECT name FROM singer;", "SELECT name FROM singer ;", True),
        ("no such column", "SELECT name FROM singer", "SELECT nme FROM singer", False),
        ("no SQL", "SELECT name FROM singer", "I do not know", False),
        ("several statements", "SELECT name FROM singer", "SELECT name FROM singer; SELECT 1", False),
        ("both empty", "SELECT id FROM singer WHERE age > 99", "SELECT name FROM singer WHERE age > 98", True),
        ("empty gold, rows", "SELECT id FROM singer WHERE age > 99", "SELECT id FROM singer", False),
        ("empty gold, no query", "SELECT id FROM singer WHERE age > 99", "", False),
        ("empty gold, comment", "SELECT id FROM singer WHERE age > 99", "-- nothing", False),
        ("empty gold, failure", "SELECT id FROM singer WHERE age > 99", "SELECT id FROM nowhere", False),
        ("empty gold, write", "SELECT id FROM singer WHERE age > 99", "DELETE FROM singer WHERE age > 99", False),
        ("empty gold, too slow", "SELECT id FROM singer WHERE age > 99", "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL "
         "SELECT x + 1 FROM t) SELECT x FROM t WHERE x < 0", False),
    ],
)  # fmt: skip
def test_official_rules(folder: Path, why: str, gold: str, query: str, right: bool) -> None:
    assert SqlJudge(folder, limits=Limits(seconds=0.3)).is_correct("music", gold, query) is right, why


def test_keep_distinct(folder: Path) -> None:
    gold, query = "SELECT DISTINCT age FROM singer", "SELECT age FROM singer"
    assert SqlJudge(folder).is_correct("music", gold, query)
    assert not SqlJudge(folder, keep_distinct=True).is_correct("music", gold, query)
    assert not SqlJudge(folder, keep_distinct=True).is_correct("music", query, gold)


def test_all_variants_must_agree(folder: Path) -> None:
    gold, query = "SELECT name FROM singer WHERE age > 50", "SELECT name FROM singer WHERE age > 45"
    assert SqlJudge(folder).is_correct("music", gold, query)
    add(folder, "music_v1", SCRIPT)
    assert SqlJudge(folder).is_correct("music", gold, query)
    add(folder, "music_v2", SCRIPT.replace("41", "48"))
    assert not SqlJudge(folder).is_correct("music", gold, query)
    assert SqlJudge(folder).is_correct("music", gold, gold)
    assert [file.name for file in SqlJudge(folder).variants("music")] == [
        "music.sqlite",
        "music_v1.sqlite",
        "music_v2.sqlite",
    ]


def test_gold_queries_that_cannot_judge(folder: Path) -> None:
    judge = SqlJudge(folder)
    assert judge.gold_problem("music", "SELECT name FROM singer WHERE age > 99") is None
    assert judge.gold_problem("music", "SELECT count(*) FROM singer WHERE id NOT IN (SELECT id FROM Empty)") == (
        "gold query reads an empty table", "music.empty",
    )  # fmt: skip
    assert judge.gold_problem("music", "SELECT count(*) FROM empty", keep_empty=True) is None
    assert judge.gold_problem("music", "SELECT name FROM singer WHERE age > = 41") is None
    assert judge.gold_problem("music", "SELECT x FROM singer") == ("gold query fails", "no such column: x")
    reason, _ = judge.gold_problem("film", "SELECT 1") or ("", "")
    assert reason == "no database file"
    add(folder, "music_v1", SCRIPT + "INSERT INTO empty VALUES (1);")
    assert judge.gold_problem("music", "SELECT count(*) FROM empty") is None


def test_a_gold_query_that_fails_matches_nothing_and_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not SqlJudge(folder).is_correct("music", "SELECT x FROM singer", "SELECT x FROM singer")
    assert "gold query fails" in caplog.text


def test_missing_database(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no database of 'film': expected .*film\.sqlite"):
        SqlJudge(tmp_path).is_correct("film", "SELECT 1", "SELECT 1")
