"""Spider's exact set match (Yu et al. 2018): queries as comparable clauses, parsed by sqlglot.

As in the official evaluator, values, DISTINCT and the order of columns, tables and conditions do not count; columns tied by a
foreign key are the same; of LIMIT only its presence counts, and of the directions of ORDER BY only the last explicit one.
Unlike it, nested queries are compared by the same rules instead of literally, and outer joins, which it cannot parse, must
be equal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from types import ModuleType
from typing import Any

from cllm.errors import UsageError
from cllm.scoring.sql_query import LONGEST_QUERY
from cllm.scoring.sql_schema import Schema

Node = Any  # sqlglot's Expression; the package is optional and imported on first use
VALUE = "value"
_WORDS = {"like": "like", "glob": "like", "in": "in"}  # conditions that count among Spider's key words


class ParseFailure(ValueError):
    """SQL that sqlglot cannot parse, or that is not a query."""


def sqlglot() -> ModuleType:
    """The sqlglot package. Raises UsageError if it is not installed."""
    try:
        import sqlglot as package
        import sqlglot.errors
    except ImportError as error:
        raise UsageError("comparing SQL needs the package sqlglot: pip install sqlglot") from error
    logging.getLogger("sqlglot").setLevel(logging.ERROR)  # it warns about every reply that is not SQL
    return package


@lru_cache(maxsize=4096)
def parse(query: str) -> Node:
    """The syntax tree of one query, cached: do not modify it. Raises ParseFailure."""
    package = sqlglot()
    if len(query) > LONGEST_QUERY:
        raise ParseFailure("too long")
    try:
        tree = package.parse_one(query, dialect="sqlite")
    except (package.errors.SqlglotError, RecursionError, ValueError) as error:
        raise ParseFailure(str(error)) from error
    if not isinstance(tree, package.exp.Query):
        raise ParseFailure("not a query")
    return tree


def same_clauses(gold: str, other: str, schema: Schema) -> bool:
    """Whether two queries on one database have the same clauses. False if either cannot be parsed."""
    try:
        return clauses(parse(gold), schema) == clauses(parse(other), schema)
    except (ParseFailure, RecursionError):
        return False


@dataclass(frozen=True)
class Condition:
    """One condition of WHERE, HAVING or ON: its syntax tree without NOT, and whether it is negated."""

    tree: Node
    negated: bool

    @property
    def operands(self) -> Iterator[Node]:
        """The operands after the first."""
        return (node for node in self.tree.iter_expressions() if node is not self.tree.args.get("this"))

    @property
    def nested(self) -> list[Node]:
        """The nested queries among the operands."""
        exp = sqlglot().exp
        found = (self.tree.this if isinstance(self.tree, exp.Exists) else None, *self.operands)
        return [bare(node) for node in found if isinstance(bare(node), exp.Query)]


@dataclass(frozen=True)
class Select:
    """The clauses of one SELECT as syntax trees; a compound query's ``order`` and ``limit`` belong to its last SELECT."""

    tree: Node
    order: Node | None
    limit: bool

    @property
    def columns(self) -> list[Node]:
        return [node.unalias() for node in self.tree.expressions]

    @property
    def joins(self) -> list[Node]:
        return part(self.tree, "joins") or []

    @property
    def tables(self) -> list[Node]:
        start = part(self.tree, "from")
        return ([start.this] if start else []) + [join.this for join in self.joins]

    @property
    def on(self) -> tuple[list[Condition], list[str]]:
        return conditions(*(join.args["on"] for join in self.joins if join.args.get("on")))

    @property
    def where(self) -> tuple[list[Condition], list[str]]:
        return conditions(*([clause.this] if (clause := part(self.tree, "where")) else []))

    @property
    def having(self) -> tuple[list[Condition], list[str]]:
        return conditions(*([clause.this] if (clause := part(self.tree, "having")) else []))

    @property
    def group(self) -> list[Node]:
        return list(clause.expressions) if (clause := part(self.tree, "group")) else []


def part(tree: Node, name: str) -> Any:
    """A clause of a tree; sqlglot has renamed ``from`` and ``with`` to ``from_`` and ``with_``."""
    return tree.args.get(name) or tree.args.get(f"{name}_")


def bare(node: Node) -> Node:
    """A node without the parentheses around it."""
    exp = sqlglot().exp
    while isinstance(node, exp.Paren | exp.Subquery):
        node = node.this
    return node


def selects(tree: Node) -> list[tuple[str, Select]]:
    """The SELECTs of a query, each with the set operator before it ("" for the first)."""
    exp = sqlglot().exp
    tree = bare(tree)
    order, limit = part(tree, "order"), bool(part(tree, "limit"))
    if not isinstance(tree, exp.SetOperation):
        return [("", Select(tree, order, limit))]
    before, after = selects(tree.this), selects(tree.expression)
    operator = tree.key + ("" if tree.args.get("distinct", True) else " all")
    after = [(name or operator, select) for name, select in after]
    name, last = after[-1]
    return [*before, *after[:-1], (name, Select(last.tree, last.order or order, last.limit or limit))]


def conditions(*trees: Node) -> tuple[list[Condition], list[str]]:
    """The conditions that AND and OR connect, and these connectives. The trees themselves are connected by AND."""
    exp = sqlglot().exp
    found: list[Condition] = []
    words: list[str] = []
    stack = list(reversed(trees))
    while stack:
        node = stack.pop()
        inner = bare(node)
        if isinstance(inner, exp.And | exp.Or):
            words.append(inner.key)
            stack += [inner.expression, inner.this]
            continue
        negated = isinstance(inner, exp.Not)
        inner = bare(inner.this) if negated else inner
        found.append(Condition(inner, negated ^ bool(inner.args.get("negate"))))
    return found, words + ["and"] * max(len(trees) - 1, 0)


@dataclass(frozen=True)
class Scope:
    """How names resolve inside one SELECT: aliases to tables, then the enclosing scope."""

    schema: Schema
    tables: dict[str, str | None]  # alias -> table, in the order of FROM; None for a nested query
    outer: Scope | None = None
    nested: dict[str, str] = field(default_factory=dict)

    def column(self, name: str, alias: str, quoted: bool) -> str:
        """The full name of a column. Columns tied by foreign keys share one name; an unknown name in double quotes is a value."""
        name, alias = name.lower(), alias.lower()
        scope: Scope | None = self
        while scope:
            for key, table in scope.tables.items():
                columns = scope.schema.columns(table) if table else None
                if key == alias or (not alias and columns and name in columns):
                    return ".".join(self.schema.same.get((table or key, name), (table or key, name)))
            scope = scope.outer
        return VALUE if quoted and not alias else f"{alias}.{name}"


Clauses = tuple[Any, ...]


def clauses(tree: Node, schema: Schema, outer: Scope | None = None) -> Clauses:
    """The clauses of a query as comparable tuples of texts."""
    nested = sorted(f"{cte.alias.lower()} {_digest(cte.this, schema)}" for cte in bare(tree).ctes)
    return (*nested, *((operator, *_select_clauses(select, schema, outer)) for operator, select in selects(tree)))


def _digest(tree: Node, schema: Schema, outer: Scope | None = None) -> str:
    """A digest of a nested query's clauses."""
    return sha256(repr(clauses(tree, schema, outer)).encode("utf-8", "backslashreplace")).hexdigest()


def _select_clauses(select: Select, schema: Schema, outer: Scope | None) -> Clauses:
    scope = Scope(schema, dict(_names(table) for table in select.tables), outer)
    where, between = select.where
    having, having_words = select.having
    on, on_words = select.on
    order = select.order.expressions if select.order else ()
    directions = [item.args["desc"] for item in order if item.args.get("desc") is not None]  # explicit ones
    return (
        sorted(_text(column, scope) for column in select.columns),
        sorted(_table(table, scope) for table in select.tables),
        sorted(f"{join.side} {_table(join.this, scope)}" for join in select.joins if join.side),
        sorted(_condition(condition, scope) for condition in where),
        sorted(set(between)),
        [_text(column, scope) for column in select.group],
        [_condition(condition, scope) for condition in having],
        having_words,
        [_text(item.this, scope) for item in order],
        bool(directions and directions[-1]),
        select.limit,
        _key_words([*on, *where, *having], [*on_words, *between, *having_words]),
    )


def _names(table: Node) -> tuple[str, str | None]:
    alias = table.alias_or_name.lower()
    return alias, table.name.lower() if isinstance(table, sqlglot().exp.Table) else None


def _table(table: Node, scope: Scope) -> str:
    exp = sqlglot().exp
    inner = bare(table)
    return _digest(inner, scope.schema, scope.outer) if isinstance(inner, exp.Query) else table.name.lower()


def _condition(condition: Condition, scope: Scope) -> str:
    """A condition as text: its operator, its first operand, and the nested queries among the others."""
    tree = condition.tree
    nested = [_digest(query, scope.schema, scope) for query in condition.nested]
    first = "" if isinstance(tree, sqlglot().exp.Exists) else _text(tree.args.get("this"), scope)
    return f"{'not ' * condition.negated}{tree.key}({first}; {'; '.join(nested)})"


def _key_words(found: list[Condition], words: list[str]) -> list[str]:
    keys = {_WORDS.get(condition.tree.key, "") for condition in found}
    return sorted({*keys, *(word for word in words if word == "or"), *("not" for condition in found if condition.negated)})


def _text(node: Any, scope: Scope) -> str:
    """An expression as text with full column names, without aliases, parentheses, DISTINCT and values."""
    exp = sqlglot().exp
    if not isinstance(node, exp.Expression):
        return str(node).lower()
    node = bare(node)
    if isinstance(node, exp.Query):
        return _digest(node, scope.schema, scope)
    if isinstance(node, exp.Column):
        if isinstance(node.this, exp.Star):
            return scope.column("*", node.table, False)
        return scope.column(node.name, node.table, bool(node.this.args.get("quoted")))
    if isinstance(node, exp.Literal | exp.Null | exp.Boolean):
        return VALUE
    if isinstance(node, exp.Alias | exp.Distinct):
        inner = [node.this] if node.this else node.expressions
        return ", ".join(_text(item, scope) for item in inner)
    return f"{node.key}({', '.join(_arguments(node, scope))})"


def _arguments(node: Node, scope: Scope) -> Iterator[str]:
    for value in node.args.values():
        for item in value if isinstance(value, list) else [value]:
            if item is not None and not isinstance(item, bool):
                yield _text(item, scope)
