"""Execution accuracy of SQL as in Spider's official test-suite evaluator (Zhong et al. 2020)."""

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
class SqlJudge:
    """Compares the results of queries on the databases in a folder: ``ID/ID.sqlite`` and its variants, ``ID/*.sqlite``."""

    folder: Path
    keep_distinct: bool = False  # False removes DISTINCT from both queries, as the official evaluator does
    limits: Limits = field(default_factory=Limits)

    def file(self, database: str) -> Path:
        """The expected path of a database."""
        return self.folder / database / f"{database}.sqlite"

    def variants(self, database: str) -> list[Path]:
        """All files of a database, the database itself first. Raises UsageError if there is none."""
        own = self.file(database)
        files = sorted(own.parent.glob("*.sqlite"), key=lambda path: (path != own, path.name))
        if not files:
            raise UsageError(f"no database of {database!r}: expected {own}")
        return files

    def is_correct(self, database: str, gold: str, query: str) -> bool:
        """Whether a query gives the gold query's result on every variant of the database.

        A query that is empty, fails or is forbidden is wrong, even if the gold query gives no rows. A gold query that fails is
        logged, and no query matches it.
        """
        ordered = "order by" in gold.lower()  # anywhere, as in the official evaluator
        gold, query = self._prepared(gold), self._prepared(query)
        return all(self._is_correct_on(file, gold, query, ordered) for file in self.variants(database))

    def gold_problem(self, database: str, gold: str, *, keep_empty: bool = False) -> tuple[str, str] | None:
        """Why this gold query cannot judge replies, as (reason, detail); None if it can.

        A gold query that reads a table that is empty in every variant hardly tells right from wrong, and hints at an
        incomplete database. ``keep_empty`` accepts it.
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

    def _is_correct_on(self, file: Path, gold: str, query: str, ordered: bool) -> bool:
        try:
            expected = _gold_rows(file, gold, self.limits)
        except QueryError as error:
            logger.warning("gold query fails on %s: %s (%s)", file, gold, error)
            return False
        limits = Limits(self.limits.seconds, len(expected), self.limits.size)
        try:
            return same_result(expected, run_query(file, query, limits), ordered)
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
