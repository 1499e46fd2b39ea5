"""cllm.scoring.sql_query: what untrusted queries can and cannot do."""

import hashlib
import os
import sqlite3
import time
from pathlib import Path

import pytest

from cllm.errors import UsageError
from cllm.scoring.sql_query import Limits, QueryError, is_empty, run_query, tables_read

COUNT_UP = "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t)"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data base?#1.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 'x'), (2, NULL), (3, CAST(x'ff41' AS TEXT));"
            'CREATE TABLE "odd ""name" (c); CREATE VIEW v AS SELECT a FROM t;'
        )
    connection.close()
    path.chmod(0o444)
    return path


def test_rows(file: Path) -> None:
    assert run_query(file, "SELECT a, b FROM t ORDER BY a;") == [(1, "x"), (2, None), (3, "A")]
    assert run_query(file, "SELECT * FROM t WHERE 0") == []
    assert run_query(file, "WITH u AS (SELECT a FROM t) SELECT sum(a) FROM u -- end") == [(6,)]
    assert run_query(file, "SELECT strftime('%Y', '2014-05-01'), upper('a'), date('2014-01-31', '+1 day')") == [("2014", "A", "2014-02-01")]


@pytest.mark.parametrize(
    "query",
    [
        "",
        " ; ",
        "-- nothing",
        "How many singers do we have?",
        "SELECT a FROM t; SELECT b FROM t",
        "SELECT a FROM t; DROP TABLE t",
        "INSERT INTO t VALUES (9, 9)",
        "INSERT INTO t VALUES (9, 9) RETURNING a",
        "UPDATE t SET a = 0",
        "DELETE FROM t",
        "WITH u AS (SELECT 1) DELETE FROM t",
        "REPLACE INTO t VALUES (1, 1)",
        "DROP TABLE t",
        "CREATE TABLE z (a)",
        "CREATE TEMP TABLE z (a)",
        "ALTER TABLE t RENAME TO z",
        "ATTACH 'evil.db' AS evil",
        "ATTACH ':memory:' AS evil",
        "VACUUM",
        "VACUUM INTO 'evil.db'",
        "PRAGMA writable_schema = 1",
        "PRAGMA journal_mode = DELETE",
        "SELECT * FROM pragma_database_list",
        "BEGIN",
        "SELECT load_extension('evil')",
        "SELECT fts3_tokenizer('simple')",
        "SELECT zeroblob(1000000000)",
        "SELECT printf('%.1000000000c', 'a')",
        "SELECT abs(-9223372036854775808)",
        "SELECT 1\0",
        "SELECT '\ud800'",
        "SELECT " + "(" * 9000 + "1" + ")" * 9000,
        "SELECT 1" + " + 1" * 20_000,
        f"{COUNT_UP} SELECT count(*) FROM t",
        f"{COUNT_UP} SELECT * FROM t",
        "WITH RECURSIVE t(x) AS (SELECT 1 UNION SELECT x + 1 FROM t) SELECT max(x) FROM t",
        "WITH RECURSIVE t(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM t) SELECT x FROM t",
        f"{COUNT_UP} SELECT hex(x) || substr(group_concat(x), 1, 1) FROM t",
        f"{COUNT_UP} SELECT x FROM t ORDER BY -x",
    ],
)
def test_hostile_queries_are_refused_and_harmless(file: Path, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    start = time.process_time()
    with pytest.raises(QueryError):
        run_query(file, query, Limits(seconds=0.2, rows=1000))
    assert time.process_time() - start < 10
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert os.listdir(tmp_path) == [file.name]


def test_one_slow_call_hardly_exceeds_the_time_limit(file: Path) -> None:
    x = f"(SELECT group_concat(x, '') FROM ({COUNT_UP} SELECT 'aaaaaaaaaa' AS x FROM t LIMIT 9000))"
    start = time.process_time()
    assert run_query(file, f"SELECT instr({x}, {x} || 'b')") == [(0,)]
    with pytest.raises(QueryError, match="too big"):
        run_query(file, f"SELECT {x} || {x}")
    assert time.process_time() - start < 20


def test_limits(file: Path) -> None:
    assert len(run_query(file, "SELECT a FROM t", Limits(rows=3))) == 3
    with pytest.raises(QueryError, match="more than 2 rows"):
        run_query(file, "SELECT a FROM t", Limits(rows=2))
    with pytest.raises(QueryError, match="5 bytes"):
        run_query(file, "SELECT 'abc' FROM t", Limits(size=5))


def test_tables_read(file: Path) -> None:
    assert tables_read(file, "SELECT count(*) FROM T") == {"t"}
    assert tables_read(file, "SELECT a FROM v WHERE a IN (SELECT c FROM 'odd \"name')") == {"t", 'odd "name'}
    assert tables_read(file, "WITH x AS (SELECT 1) SELECT * FROM x") == set()
    assert is_empty(file, 'odd "name') and not is_empty(file, "t")
    with pytest.raises(QueryError):
        tables_read(file, "DELETE FROM t")


def test_files_that_are_not_databases(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such database file: .*none\.sqlite"):
        run_query(tmp_path / "none.sqlite", "SELECT 1")
    (tmp_path / "text.sqlite").write_text("this is a text and no database at all" * 100)
    with pytest.raises(UsageError, match=r"not an SQLite database: .*text\.sqlite"):
        run_query(tmp_path / "text.sqlite", "SELECT 1")
