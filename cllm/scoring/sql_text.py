"""SQL as text: its pieces, and the query that a chatty reply holds."""

import re
from collections.abc import Iterator

from cllm.scoring.sql_query import LONGEST_QUERY

_PIECE = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | --[^\n]* | /\*.*?(?:\*/|\Z) | \w+ | \s+ | .""",
    re.DOTALL | re.VERBOSE,
)
_STATEMENT = r"""(?:
    SELECT\b | WITH\s+(?:RECURSIVE\s+)?["`\w]+\s*(?:\([^()]*\)\s*)?AS\s*(?:NOT\s+)?(?:MATERIALIZED\s*)?\(
  | VALUES\s*\( | EXPLAIN\s+(?:QUERY|SELECT)\b | PRAGMA\s+\w+ | VACUUM\b
  | INSERT\s+(?:OR\s+\w+\s+)?INTO\b | REPLACE\s+INTO\b | UPDATE\s+\S+\s+SET\b | DELETE\s+FROM\b
  | (?:CREATE|DROP|ALTER)\s+(?:TEMP\w*\s+|UNIQUE\s+|VIRTUAL\s+)*(?:TABLE|INDEX|VIEW|TRIGGER|DATABASE)\b
  | ATTACH\s+(?:DATABASE\b|['"]) | DETACH\s+\w+ | BEGIN\s*; | (?:COMMIT|ROLLBACK)\b
)"""
_FLAGS = re.IGNORECASE | re.VERBOSE
_OPENING = re.compile(rf"""(?:^|[:`>*"'])[ \t]*\(*(?P<sql>{_STATEMENT})""", _FLAGS | re.MULTILINE)
_INTRODUCTION = re.compile(r"SELECT\s+the\b|[^\n]*:[ \t]*$", re.IGNORECASE | re.MULTILINE)  # "Select names from it:"
_QUOTED = "(?:[^{0}]*{0}[^{0}]*{0})*?[^{0}]*(?={0}[.,;:!?)*]*(?:\\s|\\Z))"  # up to a closing quote; inner ones are pairs
_INSIDE = {  # by what stands before a statement, what reaches up to its counterpart
    "`": re.compile("[^`]*"),
    ">": re.compile(".*?(?=</)", re.DOTALL),
    "*": re.compile(r".*?(?=\*\*|\*\.?\s*\Z)", re.DOTALL),
    '"': re.compile(_QUOTED.format('"')),
    "'": re.compile(_QUOTED.format("'")),
}
_INLINE = re.compile(r"\bSELECT\b")  # capitals only: "to select ... from" is prose
_NEXT_STATEMENT = re.compile(rf"(?:\s+|--[^\n]*|/\*(?>.*?\*/))*+(?:{_STATEMENT})", _FLAGS | re.DOTALL)
_FENCE = re.compile(r"`{3,}|~{3,}")
_LANGUAGE = re.compile(r"[ \t]*(?!SELECT\b|WITH\b)(?:\w+[ \t]*(?=\n)|sql\w*[ \t]+)", re.IGNORECASE)
_LONGEST_REPLY = 2 * LONGEST_QUERY
_BREAK = re.compile(r"\n[ \t\r]*\n\s*")
_CONTINUED = re.compile(
    r"""(?:SELECT|WITH|FROM|JOIN|INNER|LEFT|RIGHT|FULL|CROSS|NATURAL|ON|USING|WHERE|AND|OR|GROUP|HAVING|ORDER|LIMIT
    |OFFSET|UNION|INTERSECT|EXCEPT|WINDOW|AS)\b | [,()] | --""",
    _FLAGS,
)
_SENTENCE = r"(?:This|The|Here|In\ this|It|I|You|We|Please|Note\ that|Explanation)\s+\w"
_PROSE = re.compile(
    rf"""\n[ \t]*(?:\# | \*\*\w | <[|/\w]
    | (?:Question|Explanation|Answer|Output|Result|Note|Schema|SQL)\b\s*:
    | {_SENTENCE} )""",
    re.VERBOSE,
)
_FULL_STOP = re.compile(rf"\.(?:[ \t]*(?:\n|\Z)|\s+{_SENTENCE})")


def pieces(sql: str) -> Iterator[str]:
    """Cut SQL into words, white space, single characters, and quoted texts and comments as one piece each."""
    return (match[0] for match in _PIECE.finditer(sql))


def without_distinct(sql: str) -> str:
    """SQL without the word DISTINCT, wherever it stands outside of quotes."""
    return "".join(piece for piece in pieces(sql) if piece.lower() != "distinct")


def find_sql(reply: str) -> str:
    """The SQL in a reply, or "" where there is none.

    It is in the first fenced block that has a statement, or else before the first fence. It starts at the first
    statement that begins a line or follows a colon, quotes or a tag, and ends with these, at ``;``, at a full stop, at
    a blank line or at a line of prose. Where another statement follows ``;`` it is kept: several statements are no
    answer, and choosing one would hide that.
    """
    before, *fenced = _FENCE.split(reply[:_LONGEST_REPLY])
    blocks = [_without_language(block) for block in fenced[::2]]
    return next(filter(None, map(_statement, [*blocks, before])), "")


def _without_language(block: str) -> str:
    match = _LANGUAGE.match(block)
    return block[match.end() :] if match else block


def _statement(text: str) -> str:
    starts = [opening.start("sql") for opening in _OPENING.finditer(text)]
    likely = (start for start in starts if not _INTRODUCTION.match(text, start))
    start = next(likely, starts[0] if starts else _inline(text))
    if start is None:
        return ""
    sql = text[start:]
    inside = _INSIDE.get(text[:start].rstrip(" \t")[-1:])
    if inside and (match := inside.match(sql)):
        sql = match[0]
    return sql[: _end(sql)].strip()


def _inline(text: str) -> int | None:
    """Where a SELECT starts in the middle of a line."""
    found = _INLINE.search(text)
    return found.start() if found and re.search(r"\bFROM\b", text[found.end() :]) else None


def _end(sql: str) -> int:
    """Where the statement that a text starts with ends; the end of the text if another statement follows."""
    at = depth = 0
    for piece in pieces(sql):
        if piece == ";":
            return len(sql) if _NEXT_STATEMENT.match(sql, at + 1) else at
        if piece == "." and _FULL_STOP.match(sql, at):
            return at
        depth += {"(": 1, ")": -1}.get(piece, 0)
        if "\n" in piece and piece.isspace():
            gap = _BREAK.search(piece)
            if gap and depth <= 0 and not _CONTINUED.match(sql, at + len(piece)):
                return at
            if _PROSE.match(sql, at + piece.rindex("\n")):
                return at
        at += len(piece)
    return at
