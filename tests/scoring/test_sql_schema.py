"""cllm.scoring.sql_schema: SQLite files and tables.json give the same schema."""

import json
import sqlite3
from pathlib import Path

import pytest

from cllm.errors import UsageError
from cllm.scoring.sql_schema import schema_of_file, schemas_of_json

ENTRY = {
    "db_id": "music",
    "table_names_original": ["Song", "sqlite_sequence", "Singer"],
    "column_names_original": [
        [-1, "*"],
        [0, "Title"],
        [0, "Singer Id"],
        [1, "name"],
        [1, "seq"],
        [2, "Id"],
        [2, "It's"],
    ],
    "foreign_keys": [[2, 5]],
}


def test_both_sources_agree(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "music.sqlite") as connection:
        connection.executescript(
            'CREATE TABLE Song (Title TEXT, "Singer Id" INT REFERENCES singer);'
            'CREATE TABLE Singer (Id INTEGER PRIMARY KEY AUTOINCREMENT, "It\'s" TEXT);'
        )
    connection.close()
    (tmp_path / "tables.json").write_text(json.dumps([ENTRY]))
    schema = schema_of_file(tmp_path / "music.sqlite")
    assert schema == schemas_of_json(tmp_path / "tables.json")["music"]
    assert dict(schema.tables) == {"Song": ("Title", "Singer Id"), "Singer": ("Id", "It's")}
    assert schema.same[("song", "singer id")] == schema.same[("singer", "id")]
    assert schema.columns("SINGER") == ("id", "it's") and schema.columns("nobody") is None


@pytest.mark.parametrize("content", ["{", '[{"db_id": "a"}]', '{"a": 1}', "[1]", '["a"]'])
def test_malformed_tables_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "tables.json").write_text(content)
    with pytest.raises(UsageError, match=r"not a Spider tables\.json: "):
        schemas_of_json(tmp_path / "tables.json")


def test_real_databases_equal_tables_json(shared_data: Path) -> None:
    """Names, their case and order, and foreign keys are the same in all 20 databases."""
    listed = schemas_of_json(shared_data / "spider" / "tables.json.gz")
    files = sorted((shared_data / "spider" / "database").glob("*/*.sqlite"))
    assert len(files) == 20
    for file in files:
        schema = schema_of_file(file)
        assert list(schema.tables.items()) == list(listed[file.stem].tables.items()), file.stem
        assert schema.same == listed[file.stem].same, file.stem
