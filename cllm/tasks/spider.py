"""Spider: questions about a database, answered with SQL (Yu et al. 2018).

The data is a Spider folder as distributed (``train_spider.json``, ``dev.json``, ``tables.json``, ``database/ID/ID.sqlite``; JSON
may be ``.gz``), one of its JSON files, or the hub dataset with ``--databases``.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

from cllm.errors import UsageError
from cllm.files import read_rows
from cllm.scoring.sql import SqlJudge
from cllm.scoring.sql_clauses import ParseFailure, same_clauses, sqlglot
from cllm.scoring.sql_hardness import hardness
from cllm.scoring.sql_query import Limits
from cllm.scoring.sql_schema import Schema, schema_of_file, schemas_of_json
from cllm.scoring.sql_text import extract_sql
from cllm.tasks.base import BadField, Example, HubDataset, NumberedRow, Task, text_field, user_turn

INSTRUCTION = "Could you translate the following question into SQL. Please only generate SQL, don't include explanation in the answer."
FILES = {"train": "train_spider.json", "test": "dev.json"}
TABLES = "tables.json"
DATABASES = "database"
LAYOUT = "train_spider.json, dev.json, tables.json (each plain or .gz) and database/ID/ID.sqlite"
LONGEST_NAME = 100  # bytes of a database's id
SCORING = ("speedup", "acc")  # the commands that score replies


@dataclass(frozen=True)
class Schemas:
    """The schemas of databases: from the SQLite file, or else from ``tables.json``."""

    databases: Path | None
    tables: Path | None

    def get(self, database: str) -> Schema | None:
        file = self.databases / database / f"{database}.sqlite" if self.databases else None
        if file and file.is_file():
            return _schema_of_file(file)
        return self._listed.get(database)

    @cached_property
    def _listed(self) -> dict[str, Schema]:
        return schemas_of_json(self.tables) if self.tables else {}


_schema_of_file = lru_cache(maxsize=1024)(schema_of_file)


class Spider(Task):
    """Text to SQL. A reply is right if its query gives the same result as the gold query."""

    name = "spider"
    description = "Spider: questions about a database, answered with SQL"
    fields = "db_id, question and query, in a Spider folder or beside its tables.json or database/"
    metric = "execution_accuracy"
    hub: ClassVar[HubDataset | None] = HubDataset("xlangai/spider", None, {"train": "train", "test": "validation"})
    plain_template = "### Instruction:\n{question}\n### Response:\n"
    default_question = (
        f"{INSTRUCTION} The SQL database has table named singer with columns "
        "['Singer_ID', 'Name', 'Country', 'Age'], Question: How many singers are from France?"
    )

    def __init__(self, databases: Path | None = None, judge: SqlJudge | None = None, *, keep_empty: bool = False) -> None:
        tables = None if databases is None else _tables(databases) or _tables(databases.parent)
        self._schemas = Schemas(databases, tables)
        self._judge = judge  # set where replies are scored; rows that cannot be scored are then skipped
        self._keep_empty = keep_empty
        self._scores: dict[tuple[str, str, str], dict[str, bool | float]] = {}

    def open(self, path: Path, split: str) -> Iterator[NumberedRow]:
        """The rows of a Spider folder or file, each with the schema of its database as ``schema_text``."""
        file = _rows_file(path, split)
        schemas = self._schemas_beside(file.parent)
        for number, row in read_rows(file):
            if isinstance(row, dict):
                row.pop("schema_text", None)
                database = row.get("db_id")
                if isinstance(database, str) and _is_name(database) and (schema := schemas.get(database)):
                    row["schema_text"] = schema_text(schema)
            yield number, row

    def example(self, row: Mapping[str, Any]) -> Example:
        database, question, query = (text_field(row, name).strip() for name in ("db_id", "question", "query"))
        if not _is_name(database):
            raise BadField("db_id is not a plain name")
        schema = row.get("schema_text") or self._schema_text(database)
        if schema is None:
            raise BadField("no schema of the database", database)
        if self._judge and (unfit := self._judge.gold_problem(database, query, keep_empty=self._keep_empty)):
            raise BadField(*unfit)
        prompt = f"{INSTRUCTION} {schema}Question: {question}"
        return Example(user_turn(prompt), query, {"db_id": database, "query": query})

    def examples(self, row: Mapping[str, Any], split: str) -> list[Example]:
        """In the test split, tagged with Spider's hardness of the gold query."""
        example = self.example(row)
        return [replace(example, tags=_tags(row["query"])) if split == "test" else example]

    def _schema_text(self, database: str) -> str | None:
        schema = self._schemas.get(database)
        return None if schema is None else schema_text(schema)

    def judgeable(self, example: Example) -> bool:
        return isinstance(example.target, dict) and {"db_id", "query"} <= example.target.keys()

    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """``execution_accuracy``: the query gives the gold query's result on every variant of the database.
        ``exact_set_match``: it has the same clauses, regardless of values.

        A query is run once per question. Raises UsageError if the task was configured without databases.
        """
        if self._judge is None:
            raise UsageError("Spider is scored by running queries: it needs the databases")
        database, gold, query = example.target["db_id"], example.target["query"], extract_sql(reply)
        key = database, gold, query
        if key not in self._scores:
            schema = _schema_of_file(self._judge.variants(database)[0])
            self._scores[key] = {
                "execution_accuracy": self._judge.is_correct(database, gold, query),
                "exact_set_match": same_clauses(gold, query, schema),
            }
        return dict(self._scores[key])

    def add_options(self, options: ArgumentParser, command: str) -> None:
        group = options.add_argument_group("Spider")
        group.add_argument(
            "--databases",
            metavar="DIR",
            help="databases DIR/ID/ID.sqlite; all *.sqlite of DIR/ID are variants that must agree (test suite); "
            "default: database/ of --filename",
        )
        options.set_defaults(judges_replies=command in SCORING)
        if command not in SCORING:
            return
        group.add_argument("--keep_distinct", action="store_true", help="compare DISTINCT too; the official evaluator removes it")
        group.add_argument("--sql_seconds", type=float, default=Limits.seconds, help="time limit of a query")
        group.add_argument("--keep_empty", action="store_true", help="keep rows whose gold query reads an empty table")

    def configure(self, args: Namespace) -> Self:
        databases = _databases(args)
        if not args.judges_replies:
            if databases is None and not args.filename:
                raise UsageError(
                    f"Spider's rows on the hub have no schemas: pass --filename with a Spider folder ({LAYOUT}), "
                    "or --databases DIR (with DIR/ID/ID.sqlite)"
                )
            return type(self)(databases)
        if databases is None:
            raise UsageError(
                "Spider is scored by running queries: pass --databases DIR (with DIR/ID/ID.sqlite), "
                "or as --filename a Spider folder that has database/"
            )
        if not 0 < args.sql_seconds < float("inf"):
            raise UsageError(f"--sql_seconds must be a number of seconds above 0, got {args.sql_seconds}")
        sqlglot()  # raises where it is missing
        judge = SqlJudge(databases, args.keep_distinct, Limits(args.sql_seconds))
        return type(self)(databases, judge, keep_empty=args.keep_empty)

    def scoring_settings(self) -> dict[str, Any]:
        """The options, and the number of database files, which tells a test suite from single databases."""
        if self._judge is None:
            return {}
        return {
            "keep_distinct": self._judge.keep_distinct,
            "keep_empty": self._keep_empty,
            "sql_seconds": self._judge.limits.seconds,
            "database_files": sum(1 for _ in self._judge.folder.glob("*/*.sqlite")),
        }

    def _schemas_beside(self, folder: Path) -> Schemas:
        databases = self._schemas.databases or _folder(folder / DATABASES)
        tables = _tables(folder) or self._schemas.tables
        if databases is None and tables is None:
            raise UsageError(f"no schemas in {folder}: expected database/ or tables.json; a Spider folder has {LAYOUT}")
        return Schemas(databases, tables)


def schema_text(schema: Schema) -> str:
    """The schema as in the paper's prompt, with a trailing space."""
    tables = "".join(f"table named {name} with columns {list(columns)}, " for name, columns in schema.tables.items())
    return f"The SQL database has {tables}"


def _tags(query: str) -> dict[str, str]:
    """Spider's hardness of a gold query; nothing if it cannot be parsed."""
    try:
        return {"hardness": hardness(query)}
    except (UsageError, ParseFailure):
        return {}


def _is_name(database: str) -> bool:
    """Whether a database's id is a plain folder name, not a path."""
    if len(database.encode("utf-8", "replace")) > LONGEST_NAME:
        return False
    return bool(database.strip(". ")) and not set(database) & set("/\\\0:")


def _rows_file(path: Path, split: str) -> Path:
    """The file with the rows of a split: the path itself, or a file of the folder. Raises UsageError if there is none."""
    if not path.is_dir():
        return path
    if split not in FILES:
        raise UsageError(f"unknown split {split!r} of a Spider folder; choose from {', '.join(FILES)}")
    if file := _plain_or_gz(path / FILES[split]):
        return file
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    raise UsageError(f"{path} has no {FILES[split]}: a Spider folder has {LAYOUT}; found {found}")


def _plain_or_gz(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


def _tables(folder: Path) -> Path | None:
    return _plain_or_gz(folder / TABLES)


def _folder(path: Path) -> Path | None:
    return path if path.is_dir() else None


def _databases(args: Namespace) -> Path | None:
    """``--databases``, or else ``database/`` of ``--filename``. Raises UsageError for a folder without databases."""
    if args.databases is None:
        start = Path(args.filename) if args.filename else None
        return start and _folder((start if start.is_dir() else start.parent) / DATABASES)
    folder = Path(args.databases)
    if not any(folder.glob("*/*.sqlite")):
        raise UsageError(f"no databases in {folder}: expected {folder / 'ID' / 'ID.sqlite'}")
    return folder


TASK = Spider()
