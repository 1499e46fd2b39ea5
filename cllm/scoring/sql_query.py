"""Running one untrusted query on an SQLite file, which it can read and nothing else.

The file is opened read-only and immutable. An authorizer allows a statement only to select, read and call functions. Time,
rows, text and memory are limited, and no temporary files are written.
"""

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.errors import UsageError

Row = tuple[Any, ...]

LONGEST_QUERY = 20_000  # characters
MEMORY = 512 << 20  # bytes of SQLite's heap in the whole process; a query that needs more fails
LONGEST_VALUE = 100_000  # bytes of one value or row; instr() on more could run for minutes and cannot be interrupted
_STEPS = 1000  # virtual machine instructions between two checks of the clock
_ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
_HARMFUL = ("load_extension", "fts3_tokenizer", "readfile", "writefile", "edit")
_ENDLESS = ("randomblob", "zeroblob", "printf", "format")  # one call can run for minutes and cannot be interrupted
_MALFORMED = re.compile("syntax error|incomplete input|unrecognized token|one statement|null character")
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: LONGEST_VALUE,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4 * LONGEST_QUERY,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}


class QueryError(ValueError):
    """A query that failed or was stopped; the message says why."""


@dataclass(frozen=True)
class Limits:
    """The resources that one query may use."""

    seconds: float = 10.0
    rows: int = 100_000
    size: int = 50_000_000  # characters of text plus bytes of blobs in the result


def is_query(text: str) -> bool:
    """Whether SQLite can parse a text as one statement. The names in it need not exist, and nothing is run."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.set_authorizer(_authorize)
        try:
            with _query_errors():
                connection.execute(f"EXPLAIN {text}")
        except QueryError as error:
            return not _MALFORMED.search(str(error))
    return True


def run_query(file: Path, query: str, limits: Limits = Limits()) -> list[Row]:
    """The rows of one query on one SQLite file.

    Raises:
        QueryError: the text is not a single statement that gives rows, or it fails, tries more than reading, or exceeds a
            limit.
        UsageError: the file is missing or not an SQLite database.
    """
    if len(query) > LONGEST_QUERY:
        raise QueryError(f"longer than {LONGEST_QUERY} characters")
    with connect(file) as connection:
        connection.set_authorizer(_authorize)
        deadline = time.monotonic() + limits.seconds
        connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
        with _query_errors():
            return _fetch(connection.execute(query), limits)


def tables_read(file: Path, query: str) -> set[str]:
    """The tables that a query reads, as the database spells them. Raises as :func:`run_query` does."""
    names: set[str] = set()

    def note(action: int, first: str | None, *rest: str | None) -> int:
        if action == sqlite3.SQLITE_READ and first:
            names.add(first.lower())
        return _authorize(action, first, *rest)

    with connect(file) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        connection.set_authorizer(note)
        with _query_errors():
            connection.execute(f"EXPLAIN {query}")
    return {table for table in tables if table.lower() in names}


def is_empty(file: Path, table: str) -> bool:
    """Whether a table of the database has no rows."""
    return not run_query(file, f"SELECT 1 FROM {quoted(table)} LIMIT 1")


def quoted(name: str) -> str:
    """A name as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def connect(file: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection. For untrusted queries use :func:`run_query`, which restricts it further.

    Raises UsageError if the file is not an SQLite database.
    """
    if not file.is_file():
        raise UsageError(f"no such database file: {file}")
    try:
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise UsageError(f"cannot open the database {file}: {error}") from error
    with closing(connection):
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute(f"PRAGMA hard_heap_limit = {MEMORY}")
        except sqlite3.Error as error:
            raise UsageError(f"not an SQLite database: {file} ({error})") from error
        connection.text_factory = _text
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)
        yield connection


@contextmanager
def _query_errors() -> Iterator[None]:
    """Turn every error that a query can cause into QueryError."""
    try:
        yield
    except MemoryError as error:
        raise QueryError("needs too much memory") from error
    except (sqlite3.Error, sqlite3.Warning, OverflowError) as error:
        raise QueryError(str(error)) from error
    except ValueError as error:
        raise error if isinstance(error, QueryError) else QueryError(str(error)) from error


def _fetch(cursor: sqlite3.Cursor, limits: Limits) -> list[Row]:
    if cursor.description is None:
        raise QueryError("not a query")
    rows: list[Row] = []
    size = 0
    for row in cursor:
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        rows.append(row)
        if len(rows) > limits.rows or size > limits.size:
            raise QueryError(f"gives more than {limits.rows} rows or {limits.size} bytes of text")
    return rows


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    forbidden = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in (*_HARMFUL, *_ENDLESS)
    return sqlite3.SQLITE_DENY if forbidden or action not in _ALLOWED else sqlite3.SQLITE_OK


def _text(value: bytes) -> str:
    return value.decode("utf-8", "ignore")
