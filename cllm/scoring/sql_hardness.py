"""Spider's hardness levels (Yu et al. 2018), counted as in the official evaluator."""

from cllm.scoring.sql_clauses import Condition, Select, bare, parse, selects, sqlglot


def hardness(query: str) -> str:
    """The hardness level of a gold query: easy, medium, hard or extra. Raises ParseFailure if it cannot be parsed.

    Only the outermost query counts; of a compound query, only the first SELECT.
    """
    parts = selects(parse(query))
    first = parts[0][1]
    clauses, others = _clauses(first), _others(first)
    nested = sum(len(condition.nested) for condition in _all_conditions(first)) + (len(parts) > 1)
    if nested == 0 and clauses <= 1 and others == 0:
        return "easy"
    if nested == 0 and ((others <= 2 and clauses <= 1) or (clauses <= 2 and others < 2)):
        return "medium"
    if nested == 0 and ((others > 2 and clauses <= 2) or (2 < clauses <= 3 and others <= 2)):
        return "hard"
    return "hard" if clauses <= 1 and others == 0 and nested <= 1 else "extra"


def _all_conditions(select: Select) -> list[Condition]:
    return [*select.on[0], *select.where[0], *select.having[0]]


def _clauses(select: Select) -> int:
    """The number of clauses: WHERE, GROUP BY, ORDER BY, LIMIT, and every JOIN, OR and LIKE."""
    words = [*select.on[1], *select.where[1], *select.having[1]]
    likes = sum(condition.tree.key == "like" for condition in _all_conditions(select))
    present = [bool(select.where[0]), bool(select.group), bool(select.order), select.limit]
    return sum(present) + max(len(select.tables) - 1, 0) + words.count("or") + likes


def _others(select: Select) -> int:
    """How many of these occur more than once: aggregates, columns, conditions of WHERE, columns of GROUP BY.

    As in the official evaluator, negated conditions and connectives in HAVING count as aggregates.
    """
    ordered = select.order.expressions if select.order else []
    aggregates = sum(map(_is_aggregate, select.columns)) + sum(_aggregates(item.this) for item in ordered)
    aggregates += sum(condition.negated for condition in (*select.where[0], *select.having[0]))
    aggregates += len(select.having[1])
    counts = (aggregates, len(select.columns), len(select.where[0]), len(select.group))
    return sum(count > 1 for count in counts)


def _is_aggregate(node: object) -> bool:
    exp = sqlglot().exp
    return isinstance(bare(node), exp.Max | exp.Min | exp.Count | exp.Sum | exp.Avg)


def _aggregates(node: object) -> int:
    """The number of aggregates in an item of ORDER BY: the item itself, or both sides of an operator."""
    exp = sqlglot().exp
    inner = bare(node)
    sides = [inner.this, inner.expression] if isinstance(inner, exp.Binary) else [inner]
    return sum(map(_is_aggregate, sides))
