"""SQL as text: lexemes, and extracting the query from a chatty reply."""

import json
import re
from collections.abc import Iterator
from typing import Any

from cllm.scoring.reply import answer_candidates
from cllm.scoring.sql_query import LONGEST_QUERY, is_query

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
_OPENING = re.compile(rf"""(?:^|[:`*"']|<\w[^<>\n]*>)[ \t]*\(*(?P<sql>{_STATEMENT})""", _FLAGS | re.MULTILINE)
_INTRODUCTION = re.compile(r"SELECT\s+the\b|[^\n]*:[ \t]*$", re.IGNORECASE | re.MULTILINE)  # "Select names from it:"
_QUOTED = "(?:[^{0}]*{0}[^{0}]*{0})*?[^{0}]*(?={0}[.,;:!?)}}\\]*]*(?:\\s|\\Z))"  # up to a closing quote; inner ones are pairs
_INSIDE = {  # opening character before a statement -> what extends up to its counterpart
    "`": re.compile("[^`]*"),
    ">": re.compile(".*?(?=</)", re.DOTALL),
    "*": re.compile(r".*?(?=\*\*|\*\.?\s*\Z)", re.DOTALL),
    '"': re.compile(_QUOTED.format('"')),
    "'": re.compile(_QUOTED.format("'")),
}
_INLINE = re.compile(  # lower case only where it cannot be prose such as "to select one from the list"
    r"""\b(?:SELECT\b | select\s+(?:distinct\b | \* | \w+\s*\( | [\w.]+\s*,
      | (?!(?:all|any|data|everything|it|one|rows|some|them)\b)[\w.]+\s+from\s+(?!(?:a|each|the|this|these|your)\b)))""",
    re.VERBOSE,
)
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
    rf"""\n[ \t]*(?:\# | \*\*\w | <[/\w]
    | (?:Explanation|Answer|Output|Result|Note|Schema|SQL)\b\s*:
    | {_SENTENCE} )""",
    re.VERBOSE,
)
_SENTENCE_GOES_ON = re.compile(
    r"""[ \t]*[,(–—-]?[ \t\n]+\(?(?:to|which|that|so|because|since|will|would|should|can|gives?|returns?|counts?
    |works?|does|finds?|shows?|lists?|it|this|we|you|if[ ]you|when[ ]you|in[ ]order[ ]to|where[ ](?:the|we|you)
    |and[ ](?:it|that|the|then|this|we|you|run|get|see|execute)|as[ ](?:a|an|it|the|this|you|your)
    |for[ ](?:all|each|example|it|that|the|this|your)|is[ ](?:a|all|an|correct|enough|how|right|the|what|your))\b
    (?![^\n]*(?:[=<>]|\b(?:SELECT|FROM|WHERE|GROUP|HAVING|ORDER|LIMIT|UNION|EXCEPT|INTERSECT|JOIN|ON|AND|OR)\b))""",
    re.VERBOSE,
)
_JSON = re.compile(r"""[\[{]\s*["\[{]""")
_TRIES = 8  # attempts at parsing JSON, and at finding the end of a query inside a sentence
_FULL_STOP = re.compile(rf"\.(?:[ \t]*(?:\n|\Z)|\s+{_SENTENCE})")


def lexemes(sql: str) -> Iterator[str]:
    """Split SQL into words, white space, single characters, quoted texts and comments."""
    return (match[0] for match in _PIECE.finditer(sql))


def without_distinct(sql: str) -> str:
    """SQL without the word DISTINCT outside of quotes and comments."""
    return "".join(lexeme for lexeme in lexemes(sql) if lexeme.lower() != "distinct")


def extract_sql(reply: str) -> str:
    """The SQL in a reply, or "" if there is none.

    It is searched for in the texts of a JSON answer, in the first fenced block with a statement, then before the first fence.
    It starts at the first statement that begins a line or follows a colon, quote or tag. It ends at the closing counterpart,
    ``;``, a full stop, a blank line, a line of prose, or where a sentence resumes. A further statement after ``;`` is kept:
    several statements are not an answer, and picking one would hide that.
    """
    return next(filter(None, (_find(part[:_LONGEST_REPLY]) for part in answer_candidates(reply))), "")


def _find(text: str) -> str:
    before, *fenced = _FENCE.split(text)
    blocks = [*map(_without_language, fenced[::2]), before]
    return _in_json(text) or next(filter(None, map(_statement, blocks)), "")


def _in_json(text: str) -> str:
    """The SQL in the first JSON value of a text that has any, preferably under a name such as "sql" or "query"."""
    for opening in [*_JSON.finditer(text)][:_TRIES]:
        try:
            value, _ = json.JSONDecoder(strict=False).raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            continue
        texts = sorted(_texts(value), key=lambda named: not re.search("sql|query", named[0], re.IGNORECASE))
        if found := next(filter(None, (_find(text) for _, text in texts)), ""):
            return found
    return ""


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) for each text in a JSON value."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, key)


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
    opened = text[:start].rstrip(" \t")[-1:]
    if opened in _INSIDE and (match := _INSIDE[opened].match(sql)):
        sql = match[0]
    sql = sql[: _end(sql, opened == "(")].strip()
    return sql if is_query(sql) else _without_sentence(sql)


def _without_sentence(sql: str) -> str:
    """The query without the rest of the sentence it stands in; unchanged if that does not give a query."""
    places = [match.start() for match in _SENTENCE_GOES_ON.finditer(sql)][:_TRIES]
    return next((sql[:place] for place in places if is_query(sql[:place])), sql)


def _inline(text: str) -> int | None:
    """Where a SELECT starts in the middle of a line, or None."""
    found = _INLINE.search(text)
    return found.start() if found and re.search(r"\bFROM\b", text[found.start() :], re.IGNORECASE) else None


def _end(sql: str, enclosed: bool) -> int:
    """Where the statement at the start of ``sql`` ends; the end of the text if another statement follows.

    ``enclosed``: a parenthesis was opened before the statement.
    """
    at = depth = 0
    for lexeme in lexemes(sql):
        if lexeme == ";":
            return len(sql) if _NEXT_STATEMENT.match(sql, at + 1) else at
        if lexeme == "." and _FULL_STOP.match(sql, at):
            return at
        depth += {"(": 1, ")": -1}.get(lexeme, 0)
        if enclosed and depth < 0 and not _CONTINUED.match(sql[at + 1 :].lstrip()):
            return at
        if "\n" in lexeme and lexeme.isspace():
            gap = _BREAK.search(lexeme)
            if gap and depth <= 0 and not _CONTINUED.match(sql, at + len(lexeme)):
                return at
            if _PROSE.match(sql, at + lexeme.rindex("\n")):
                return at
        at += len(lexeme)
    return at
