"""Tables and columns of a database, from its SQLite file or Spider's ``tables.json``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.errors import UsageError
from cllm.files import open_text
from cllm.scoring.sql_query import connect

Column = tuple[str, str]  # table and column, in lower case
_INTERNAL = "sqlite_"  # prefix of SQLite's internal tables, such as sqlite_sequence; not every copy of a database has them


@dataclass(frozen=True)
class Schema:
    """Tables and their columns in the database's order and spelling, without SQLite's internal tables."""

    tables: Mapping[str, tuple[str, ...]]
    foreign_keys: tuple[tuple[Column, Column], ...] = ()
    same: Mapping[Column, Column] = field(init=False, compare=False)  # a column to the representative of those tied to it by foreign keys

    def __post_init__(self) -> None:
        object.__setattr__(self, "same", _tied(self.foreign_keys))

    def columns(self, table: str) -> tuple[str, ...] | None:
        """The columns of a table in lower case; None if there is no such table."""
        for name, columns in self.tables.items():
            if name.lower() == table.lower():
                return tuple(column.lower() for column in columns)
        return None


def schema_of_file(file: Path) -> Schema:
    """The schema of an SQLite file. Raises UsageError if it is not an SQLite database."""
    with connect(file) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        names = [name for (name,) in rows if not name.startswith(_INTERNAL)]
        facts = {name: connection.execute("SELECT name, pk FROM pragma_table_info(?)", (name,)).fetchall() for name in names}
        keys = {
            name: connection.execute('SELECT "from", "table", "to", seq FROM pragma_foreign_key_list(?)', (name,)).fetchall()
            for name in names
        }
    primary = {name.lower(): {pk: column for column, pk in columns if pk} for name, columns in facts.items()}
    foreign = [
        (
            (name.lower(), column.lower()),
            (table.lower(), (to or primary.get(table.lower(), {}).get(seq + 1, "")).lower()),
        )
        for name, found in keys.items()
        for column, table, to, seq in found
    ]
    return Schema({name: tuple(column for column, _ in columns) for name, columns in facts.items()}, tuple(foreign))


def schemas_of_json(path: Path) -> dict[str, Schema]:
    """The schemas in a ``tables.json``, plain or ``.gz``, by database id. Raises UsageError if it is malformed."""
    with open_text(path) as file:
        try:
            return {entry["db_id"]: _entry(entry) for entry in json.load(file)}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise UsageError(f"not a Spider tables.json: {path} ({type(error).__name__}: {error})") from error


def _entry(entry: Mapping[str, Any]) -> Schema:
    names, columns = entry["table_names_original"], entry["column_names_original"]
    tables = {
        name: tuple(column for owner, column in columns if owner == at) for at, name in enumerate(names) if not name.startswith(_INTERNAL)
    }
    full = [(names[owner].lower(), column.lower()) for owner, column in columns]
    return Schema(tables, tuple((full[one], full[other]) for one, other in entry.get("foreign_keys", ())))


def _tied(foreign_keys: tuple[tuple[Column, Column], ...]) -> dict[Column, Column]:
    """Each column of a foreign key, mapped to the representative of all columns tied to it."""
    groups: list[set[Column]] = []
    for pair in foreign_keys:
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if not group & set(pair)] + [set(pair).union(*touched)]
    return {column: min(group) for group in groups for column in group}
