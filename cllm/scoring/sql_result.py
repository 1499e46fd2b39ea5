"""Equality of query results by the rules of the official test-suite evaluator (Zhong et al. 2020).

Rows are compared as a multiset, or as a list where order matters, under any permutation of the columns. Values compare as in
Python: 1 equals 1.0 but not '1'; NULL equals NULL.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

from cllm.scoring.sql_query import Row

_TRIES = 100_000  # column orders tried; only an attack needs more


def same_result(gold: Sequence[Row], other: Sequence[Row], ordered: bool) -> bool:
    """Whether two results are equal under some permutation of the columns. Two empty results are equal."""
    if len(gold) != len(other):
        return False
    if not gold:
        return True
    if len(gold[0]) != len(other[0]) or not _same_bags(gold, other, ordered):
        return False
    if ordered:  # columns can be compared independently, without a search
        return Counter(zip(*gold)) == Counter(zip(*other))
    return _Columns(gold, other).match()


def _same_bags(gold: Sequence[Row], other: Sequence[Row], ordered: bool) -> bool:
    """Whether the rows, each taken as a multiset of values, are the same.

    As in the official evaluator, a multiset is sorted by text and type. This separates rows such as (1, 10) and (1.0, 10),
    which are equal as numbers; it is kept for comparability of figures.
    """
    bags, others = [_bag(row) for row in gold], [_bag(row) for row in other]
    return bags == others if ordered else set(bags) == set(others)


def _bag(row: Row) -> Row:
    return tuple(sorted(row, key=lambda value: f"{value}{type(value)}"))


class _Columns:
    """Searches for a permutation of the columns under which two results are equal as multisets of rows.

    It matches columns one by one. The values of a row in the columns matched so far are encoded as one number, with the same
    encoding in both results.
    """

    def __init__(self, gold: Sequence[Row], other: Sequence[Row]) -> None:
        self._gold, self._other = list(zip(*gold)), list(zip(*other))
        expected = [dict(Counter(column)) for column in self._gold]
        counts = [dict(Counter(column)) for column in self._other]
        self._fitting = [[at for at, count in enumerate(counts) if count == wanted] for wanted in expected]
        self._tries = _TRIES

    def match(self) -> bool:
        """Whether there is such a permutation."""
        rows = [0] * len(self._gold[0])
        return self._extend(0, frozenset(), rows, rows)

    def _extend(self, at: int, used: frozenset[int], gold: list[int], other: list[int]) -> bool:
        """Whether a match of the first ``at`` columns, encoded as a number per row, can be completed."""
        if at == len(self._gold):
            return True
        numbers: dict[Hashable, int] = {}
        gold = [numbers.setdefault(row, len(numbers)) for row in zip(gold, self._gold[at])]
        expected = sorted(gold)
        seen = set()
        for candidate in self._fitting[at]:
            column = self._other[candidate]
            if candidate in used or column in seen or self._tries == 0:
                continue
            seen.add(column)
            self._tries -= 1
            rows = [numbers.get(row, -1) for row in zip(other, column)]
            if sorted(rows) == expected and self._extend(at + 1, used | {candidate}, gold, rows):
                return True
        return False
