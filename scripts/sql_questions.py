"""Write a Spider folder of generated questions about small databases:  python sql_questions.py FOLDER TRAIN TEST [--seed N]

FOLDER gets train_spider.json (TRAIN rows), dev.json (TEST rows) and database/ID/ID.sqlite. The same arguments give the same
files. No query comes up twice, in one file or across both; each finds something, and all kinds are asked equally often.
Training rows depend on TRAIN and the seed alone, and the held-out rows of a smaller TEST are the start of a larger one's.
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
    options.add_argument("train", metavar="TRAIN", type=positive, help="number of questions to learn from")
    options.add_argument("test", metavar="TEST", type=positive, help="number of held-out questions")
    options.add_argument("--seed", type=int, default=0, help="of the choice of questions; the databases are always the same")
    args = options.parse_args(argv)
    rows = questions(args.train + args.test, args.seed)
    write_json(args.folder / FILES["train"], rows[: args.train])
    write_json(args.folder / FILES["test"], rows[args.train :])
    for database in ALL:
        _write_database(database, args.folder / DATABASES / database.name / f"{database.name}.sqlite")
    print(f"{args.folder}: {args.train} questions to learn from and {args.test} held out, about {len(ALL)} databases")


def questions(count: int, seed: int = 0) -> list[Row]:
    """Different questions with their queries, kind by kind in turn; fewer are the start of more.

    Raises UsageError when there are not so many that all kinds can be asked equally often.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    with ExitStack() as stack:
        kinds = []
        for database in ALL:
            connection = stack.enter_context(closing(filled(database)))
            kinds += [_rows(database, connection, sql, rng) for sql in database.kinds]
        rng.shuffle(kinds)
        for rows_of_turn in zip(*kinds):
            rows += rows_of_turn
            if len(rows) >= count:
                return rows[:count]
    raise UsageError(f"TRAIN + TEST must be <= {len(rows)}, the number of different questions, got {count}")


def _rows(database: Database, connection: sqlite3.Connection, sql: str, rng: random.Random) -> Iterator[Row]:
    """All questions of one kind whose queries find something, in random order and wording."""
    values = SHARED | database.values
    names = sorted(places(sql) - database.joins.keys())
    choices = [choice for choice in product(*(values[name.rstrip("2")] for name in names)) if _apart(names, choice)]
    rng.shuffle(choices)
    for choice in choices:
        said, meant = ({name: _side(value, side) for name, value in zip(names, choice)} for side in (0, 1))
        query = sql.format(**meant, **database.joins)
        wording = rng.choice(database.kinds[sql])
        if any(any(row) for row in connection.execute(query)):
            yield {"db_id": database.name, "question": wording.format(**said), "query": query}


def places(template: str) -> set[str]:
    """The names in braces."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def _apart(names: Sequence[str], choice: Sequence[Value]) -> bool:
    """Whether a value and the second of its name differ, and numbers rise."""
    by_name = dict(zip(names, choice))
    pairs = [(by_name[name.removesuffix("2")], value) for name, value in by_name.items() if name.endswith("2")]
    return all(one < two if isinstance(one, int) else one != two for one, two in pairs)  # type: ignore[operator]


def _side(value: Value, side: int) -> int | str:
    return value[side] if isinstance(value, tuple) else value


def filled(database: Database) -> sqlite3.Connection:
    """The database in memory, always with the same rows."""
    rng = random.Random(database.name)
    connection = sqlite3.connect(":memory:")
    for table, (count, columns) in database.tables.items():
        connection.execute(f"CREATE TABLE {table} ({', '.join(_declared(name, of) for name, of in columns.items())})")
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
    """One value per row: as they are where there are as many, different ones where there are more, else drawn."""
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
