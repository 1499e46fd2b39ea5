"""Write a Spider folder of generated questions about small databases:  python sql_questions.py FOLDER TRAIN TEST [--seed N]

FOLDER gets train_spider.json (TRAIN rows), dev.json (TEST rows) and database/ID/ID.sqlite. The same arguments give the same
files. Queries are distinct within and across the files, each finds something, and all kinds are equally frequent. Training rows
depend only on TRAIN and the seed, and the held-out rows of a smaller TEST are a prefix of a larger one's.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import product
from pathlib import Path
from string import Formatter

from sql_databases import ALL, SHARED, Database, Value

from cllm.cli.command import command, parser, positive
from cllm.errors import UsageError
from cllm.files import write_json
from cllm.tasks.spider import DATABASES, FILES

Row = dict[str, str]


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser("Write a Spider folder of generated questions about small databases.", "sql_questions.py")
    options.add_argument("folder", metavar="FOLDER", type=Path)
    options.add_argument("train", metavar="TRAIN", type=positive, help="number of training questions")
    options.add_argument("test", metavar="TEST", type=positive, help="number of held-out questions")
    options.add_argument("--seed", type=int, default=0, help="seed of the choice of questions; the databases are always the same")
    args = options.parse_args(argv)
    rows = questions(args.train + args.test, args.seed)
    write_json(args.folder / FILES["train"], rows[: args.train])
    write_json(args.folder / FILES["test"], rows[args.train :])
    for database in ALL:
        _write_database(database, args.folder / DATABASES / database.name / f"{database.name}.sqlite")
    print(f"{args.folder}: {args.train} training and {args.test} held-out questions about {len(ALL)} databases")


def questions(count: int, seed: int = 0) -> list[Row]:
    """``count`` distinct questions with their queries, cycling through all kinds; a smaller count gives a prefix.

    Raises UsageError if there are too few questions for all kinds to be equally frequent.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    with ExitStack() as stack:
        kinds = []
        for database in ALL:
            connection = stack.enter_context(closing(filled(database)))
            kinds += [_rows(database, connection, sql, rng) for sql in database.kinds]
        rng.shuffle(kinds)
        for one_of_each_kind in zip(*kinds):
            rows += one_of_each_kind
            if len(rows) >= count:
                return rows[:count]
    raise UsageError(f"TRAIN + TEST must be <= {len(rows)}, the number of different questions, got {count}")


def _rows(database: Database, connection: sqlite3.Connection, sql: str, rng: random.Random) -> Iterator[Row]:
    """All questions of one kind whose queries find something, in random order and wording."""
    values = SHARED | database.values
    names = sorted(placeholders(sql) - database.joins.keys())
    choices = [choice for choice in product(*(values[name.rstrip("2")] for name in names)) if _apart(names, choice)]
    rng.shuffle(choices)
    for choice in choices:
        in_question, in_sql = ({name: _form(value, form) for name, value in zip(names, choice)} for form in (0, 1))
        query = sql.format(**in_sql, **database.joins)
        wording = rng.choice(database.kinds[sql])
        if any(any(row) for row in connection.execute(query)):
            yield {"db_id": database.name, "question": wording.format(**in_question), "query": query}


def placeholders(template: str) -> set[str]:
    """The names in braces."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def _apart(names: Sequence[str], choice: Sequence[Value]) -> bool:
    """Whether two values of one name differ, and are in ascending order if they are numbers."""
    by_name = dict(zip(names, choice))
    pairs = [(by_name[name.removesuffix("2")], value) for name, value in by_name.items() if name.endswith("2")]
    return all(one < two if isinstance(one, int) else one != two for one, two in pairs)  # type: ignore[operator]


def _form(value: Value, form: int) -> int | str:
    return value[form] if isinstance(value, tuple) else value


def filled(database: Database) -> sqlite3.Connection:
    """An in-memory copy of the database, always with the same rows."""
    rng = random.Random(database.name)
    connection = sqlite3.connect(":memory:")
    for table, (count, columns) in database.tables.items():
        connection.execute(f"CREATE TABLE {table} ({', '.join(_declared(name, values) for name, values in columns.items())})")
        rows = zip(*(_column(values, count, rng) for values in columns.values()))
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", rows)
    connection.commit()
    return connection


def _declared(name: str, values: Sequence[int | str]) -> str:
    kind = "integer" if isinstance(values[0], int) else "text"
    if name == "id":
        return f"{name} {kind} PRIMARY KEY"
    owner = name.removesuffix("_id")
    return f"{name} {kind}" + (f" REFERENCES {owner}s(id)" if owner != name else "")


def _column(values: Sequence[int | str], count: int, rng: random.Random) -> Sequence[int | str]:
    """One value per row: in order if there is one per row, a sample without repetition if there are more, else random draws."""
    if len(values) == count:
        return values
    return rng.sample(values, count) if len(values) > count else rng.choices(values, k=count)


def _write_database(database: Database, path: Path) -> None:
    with closing(filled(database)) as connection:
        content = connection.serialize()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    main()
