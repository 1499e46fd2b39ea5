"""Execution accuracy of SQL as Spider's official test-suite evaluator judges it (Zhong et al. 2020)."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cllm.errors import UsageError
from cllm.scoring.sql_query import Limits, QueryError, Row, is_empty, run_query, tables_read
from cllm.scoring.sql_result import same_result
from cllm.scoring.sql_text import without_distinct

logger = logging.getLogger(__name__)

_SPLIT_OPERATORS = {"> =": ">=", "< =": "<=", "! =": "!="}
_THIS_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Judge:
    """Compares results of queries on the databases of a folder: ``ID/ID.sqlite`` and its variants, ``ID/*.sqlite``."""

    folder: Path
    keep_distinct: bool = False  # without it, as the official evaluator, DISTINCT is taken out of both queries
    limits: Limits = field(default_factory=Limits)

    def file(self, database: str) -> Path:
        """Where a database lies, or should."""
        return self.folder / database / f"{database}.sqlite"

    def variants(self, database: str) -> list[Path]:
        """The files of a database, itself first. Raises UsageError when there is none."""
        own = self.file(database)
        files = sorted(own.parent.glob("*.sqlite"), key=lambda path: (path != own, path.name))
        if not files:
            raise UsageError(f"no database of {database!r}: expected {own}")
        return files

    def right(self, database: str, gold: str, query: str) -> bool:
        """Whether a query has the gold query's result on every variant of the database.

        A query that is empty, fails, or is not allowed to run is wrong, even where the gold query gives no rows.
        A gold query that fails is logged, and nothing equals it.
        """
        ordered = "order by" in gold.lower()  # anywhere, as in the official evaluator
        gold, query = self._prepared(gold), self._prepared(query)
        return all(self._right_on(file, gold, query, ordered) for file in self.variants(database))

    def unfit(self, database: str, gold: str, *, keep_empty: bool = False) -> tuple[str, str] | None:
        """Why no reply can be judged by this gold query, as a reason and a detail; None where it can be.

        A gold query that reads a table without rows, in every variant, hardly tells right from wrong, and an incomplete
        database looks like that. ``keep_empty`` lets it pass.
        """
        if not self.file(database).is_file():
            return "no database file", str(self.file(database))
        files, gold = self.variants(database), self._prepared(gold)
        try:
            for file in files:
                run_query(file, gold, self.limits)
            if keep_empty:
                return None
            empty = [table for table in sorted(tables_read(files[0], gold)) if all(is_empty(f, table) for f in files)]
        except QueryError as error:
            return "gold query fails", str(error)
        return ("gold query reads an empty table", f"{database}.{empty[0]}") if empty else None

    def _right_on(self, file: Path, gold: str, query: str, ordered: bool) -> bool:
        try:
            expected = _gold_rows(file, gold, self.limits)
        except QueryError as error:
            logger.warning("gold query fails on %s: %s (%s)", file, gold, error)
            return False
        room = Limits(self.limits.seconds, len(expected), self.limits.size)
        try:
            return same_result(expected, run_query(file, query, room), ordered)
        except QueryError:
            return False

    def _prepared(self, query: str) -> str:
        for split, whole in _SPLIT_OPERATORS.items():
            query = query.replace(split, whole)
        query = _THIS_YEAR.sub("2020", query)
        return query if self.keep_distinct else without_distinct(query)


@lru_cache(maxsize=256)
def _gold_rows(file: Path, query: str, limits: Limits) -> Sequence[Row]:
    return run_query(file, query, limits)
