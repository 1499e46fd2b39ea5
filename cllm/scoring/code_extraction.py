"""Finding the program in a reply: in fences, among prose, or as just the rest of a function.

:func:`extract_program` gives the lines of a reply that define a function. :func:`completion` gives the text to append to a
prompt such as HumanEval's (imports, signature, docstring) to get the program.
"""

import ast
import builtins
import re
import symtable
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cllm.scoring.reply import answer_candidates

__all__ = ["completion", "extract_program"]

_LANGUAGE = r"[ \t]*(?:(?:python[23]?|py3?)[ \t]+)?"
_CODE_AHEAD = rf"{_LANGUAGE}(?:(?:async|class|def|from|import|return)\s|@\w)"
_FENCE = re.compile(
    rf"""(?P<opens>
        ^[ \t]*(?:`{{3,}}|~{{3,}})
      | (?<!["'`\\\w(])`{{3,}}(?=(?:python[23]?|py3?)\b|{_CODE_AHEAD}) )     # after prose on the same line
    | (?<!`)`{{3,}}(?=\s|\Z|[.,;:)])                                         # after code on the same line""",
    re.MULTILINE | re.VERBOSE,
)
_NO_CODE = re.compile(r"[ \t]*(?:[A-Z(.,;:)]|$)", re.MULTILINE)
_INFO = re.compile(rf"(?!{_CODE_AHEAD})[ \t]*([\w+#.-]*)[^`\n]*(?:\n|\Z)|{_LANGUAGE}")  # the info string of a fence; code may follow
_LONG_TEXTS = [  # triple-quoted texts, across fences or within one block: a truncated docstring must not end in a later block
    re.compile(rf"(\"{{3}}|'{{3}})(?:{inside}.)*?\1", re.DOTALL | re.MULTILINE) for inside in ("", r"(?!^(?:`{3}|~{3}))")
]
_PYTHON = ("", "python", "python3", "py", "py3", "python2")
_CODE_LINE = re.compile(r"(?:import|from|def|class|async def)\s|@\w|[A-Za-z_]\w*\s*(?::[^=]+)?=")
_MOST_LINES = 600  # lines of a reply to look at; no genuine answer needs more
_TRIES = 400  # attempts at parsing
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
T = TypeVar("T")


@dataclass(frozen=True)
class Segment:
    """Lines between two fences, before the first, or after the last."""

    lines: list[str]
    python: bool  # not marked as another language


def extract_program(reply: str, entry_point: str) -> str | None:
    """The first program in the reply that defines the function ``entry_point`` with a body, or None.

    It includes imports, definitions and constants of earlier code blocks, and those of later blocks that it needs, but no
    calls, prints or assertions after the definition.
    """
    return _first_program(_readings(reply), entry_point)


def completion(reply: str, prompt: str, entry_point: str) -> str:
    """The text to append to ``prompt`` to get the reply's program; the reply itself if it has none.

    A reply that defines the whole function is appended as a new definition, which overrides the prompt's.
    """
    readings = _readings(reply)
    program = _first_program(readings, entry_point, prompt)
    if program is not None:
        return _stub_body(prompt) + _without_future(program) + "\n"
    bodies = (_body(found, prompt, entry_point) for found in readings)
    return next((body for body in bodies if body is not None), reply)


def _readings(reply: str) -> list[list[Segment]]:
    """Ways to split each candidate text of the reply into segments: first ignoring fences inside docstrings, then with them."""
    found = []
    for candidate in answer_candidates(reply):
        lines = candidate.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:_MOST_LINES]
        text = "\n".join(lines)
        fences = _fences(text)
        choices = [*(_outside(fences, long_text.finditer(text)) for long_text in _LONG_TEXTS), fences]
        found += [_segments(text, chosen) for number, chosen in enumerate(choices) if chosen not in choices[:number]]
    return found


def _outside(fences: list[re.Match[str]], long_texts: Iterator[re.Match[str]]) -> list[re.Match[str]]:
    hidden = {at for match in long_texts for at in range(*match.span())}
    return [fence for fence in fences if fence.end() - 1 not in hidden]


def _fences(text: str) -> list[re.Match[str]]:
    """The fences of a text. One after code on its line must end the line, close a fence of that line, or precede prose."""
    found: list[re.Match[str]] = []
    for fence in _FENCE.finditer(text):
        opened = bool(found) and "\n" not in text[found[-1].end() : fence.start()]
        if fence["opens"] or opened or _NO_CODE.match(text, fence.end()):
            found.append(fence)
    return found


def _segments(text: str, fences: list[re.Match[str]]) -> list[Segment]:
    """The text split at the fences, without them.

    Text outside of fences counts as well, since models sometimes forget one.
    """
    found, start, python, inside = [], 0, True, False
    for fence in fences:
        found.append(Segment(text[start : fence.start()].split("\n"), python))
        info = _INFO.match(text, fence.end()) if fence["opens"] else None
        language = (info[1] or "") if info else ""
        start = info.end() if info else fence.end()
        inside = not inside or bool(language)
        python = not inside or language.lower() in _PYTHON
    found.append(Segment(text[start:].split("\n"), python))
    return [segment for segment in found if any(line.strip() for line in segment.lines)]


def _first_program(readings: list[list[Segment]], name: str, prompt: str = "") -> str | None:
    return next(filter(None, (_program(found, name, prompt) for found in readings)), None)


def _program(found: list[Segment], name: str, prompt: str) -> str | None:
    before: list[str] = []
    for at, segment in enumerate(found):
        if not segment.python:
            continue
        program = _defining(segment.lines, name)
        if program is not None:
            program = "\n".join([*before, program])
            later = _needed(prompt + _stub_body(prompt) + _without_future(program), found[at + 1 :], name)
            return "\n\n".join([*later, _without_future(program)]) if later else program
        before.extend(_definitions(segment.lines, name))
    return None


def _needed(program: str, later: list[Segment], name: str) -> list[str]:
    """The definitions in later blocks that the program needs, dependencies first."""
    available = [source for segment in later if segment.python for source in _definitions(segment.lines, name)]
    needed: list[str] = []
    while source := next((one for one in available if _bound(one) & _missing("\n".join([*needed, program]))), None):
        available.remove(source)
        needed.insert(0, source)
    return needed


def _missing(program: str) -> set[str]:
    """The global names that a program uses without binding them."""
    top = _quietly(_symbols, program)
    tables, used = [top] if top else [], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        symbols = table.get_symbols()
        used |= {symbol.get_name() for symbol in symbols if symbol.is_referenced() and (table is top or symbol.is_global())}
    return used - _bound(program) - set(dir(builtins))


def _bound(source: str) -> set[str]:
    """The names bound at the top level."""
    top = _quietly(_symbols, source)
    return {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()} if top else set()


def _symbols(source: str) -> symtable.SymbolTable:
    return symtable.symtable(source, "program", "exec")


def _defining(lines: list[str], name: str) -> str | None:
    """The largest run of the lines that is valid Python and defines ``name`` with a body."""
    lines = _dedented(lines)
    heads = [number for number, line in enumerate(lines) if re.match(rf"(?:async\s+)?def\s+{re.escape(name)}\b", line)]
    heads = heads or [number for number, line in enumerate(lines) if re.match(rf"{re.escape(name)}\s*[:=]", line)]
    tries = 0
    for head in heads:
        starts = [number for number in range(head + 1) if _CODE_LINE.match(lines[number])] or [head]
        for start in starts:
            for end in _ends(lines, head):
                tries += 1
                tree = _parse("\n".join(lines[start:end]))
                if tree is not None and _has_body(tree, name):
                    return _tidy(lines[start:end], tree, name)
                if tries > _TRIES:
                    return None
    return None


def _ends(lines: list[str], head: int) -> Iterator[int]:
    """Line numbers where a program might end, the longest first: before an unindented line, else (truncated replies) anywhere."""
    starts = [number for number in range(head + 1, len(lines)) if lines[number].strip() and lines[number][0] not in " \t)]}"]
    yield len(lines)
    yield from reversed(starts)
    block_end = starts[0] if starts else len(lines)
    yield from range(block_end - 1, head + 1, -1)


def _definitions(lines: list[str], name: str) -> list[str]:
    """The imports, functions, classes and constants of a block, other than ``name``."""
    tree = _parse("\n".join(_dedented(lines)))
    if tree is None:
        return []
    kept = [node for node in tree.body if not _runs(node, name, _assigned(tree, name))]
    return [_source(_dedented(lines), node) for node in kept if getattr(node, "name", None) != name]


def _tidy(lines: list[str], tree: ast.Module, name: str) -> str:
    """The program without statements that run it: calls, assertions and loops after the definition of ``name``."""
    last = max(node.lineno for node in tree.body if _defines(node, name))
    kept: list[str] = []
    end = 0
    for node in tree.body:
        if node.lineno <= last or not _runs(node, name, _assigned(tree, name)):
            gap = lines[end : _first_line(node) - 1]  # comments and blank lines
            kept += [*gap, *lines[_first_line(node) - 1 : node.end_lineno]]
        end = node.end_lineno or end
    return "\n".join(kept).strip("\n")


def _runs(node: ast.stmt, name: str, assigned: set[str]) -> bool:
    """Whether a top-level statement runs the program instead of defining a part of it."""
    if isinstance(node, ast.Assert | ast.While | ast.With | ast.If | ast.Delete | ast.Raise):
        return True
    if isinstance(node, ast.Expr | ast.For):
        return _calls(node, name) or not _fills(node, assigned)
    return isinstance(node, ast.Assign | ast.AnnAssign) and _calls(node, name)


def _calls(node: ast.stmt, name: str) -> bool:
    called = {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return bool(called & {name, "input", "print"})


def _assigned(tree: ast.Module, name: str) -> set[str]:
    """The names assigned at the top level, other than to results of ``name``."""
    targets = [target for node in tree.body if not _calls(node, name) for target in _targets(node)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _fills(node: ast.stmt, assigned: set[str]) -> bool:
    """Whether a statement fills a container: ``T.append(x)``, ``T[i] = x``, or a loop of such statements."""
    if isinstance(node, ast.For):
        return all(_fills(inner, assigned) for inner in node.body)
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        target = node.value.func
    container = target.value if isinstance(target, ast.Subscript | ast.Attribute) else None
    return isinstance(container, ast.Name) and container.id in assigned


def _body(found: list[Segment], prompt: str, name: str) -> str | None:
    """The text that continues the prompt's last function, unchanged or with lost indentation restored."""
    for at, segment in enumerate(found):
        if not segment.python:
            continue
        lines = list(segment.lines)
        while lines and not lines[0].strip():
            lines.pop(0)
        indent = _indent(prompt)
        variants = (lines, [indent + lines[0].lstrip(), *lines[1:]], [indent + line for line in _dedented(lines)])
        for variant in variants:
            for end in [*_ends(variant, -1)][:_TRIES]:
                body = "\n".join(variant[:end])
                tree = _parse(prompt + body)
                if tree is not None and _returns(tree, name):
                    return "\n\n".join([body.rstrip(), *_needed(prompt + body, found[at + 1 :], name)]) + "\n"
    return None


def _indent(prompt: str) -> str:
    """The indentation of the prompt's last indented line."""
    found = re.findall(r"^([ \t]+)\S", prompt, re.MULTILINE)
    return found[-1] if found else "    "


def _stub_body(prompt: str) -> str:
    """The text between a prompt and a new definition: ``pass`` if the prompt's function has no body yet, not even a docstring."""
    start = "" if prompt.endswith("\n") else "\n"
    return start if _parse(prompt) is not None else f"{start}{_indent(prompt)}pass\n\n"


def _without_future(program: str) -> str:
    """The program without imports from ``__future__``, which are allowed only at the very top."""
    return re.sub(r"^from __future__ import .*\n?", "", program, flags=re.MULTILINE)


def _has_body(tree: ast.Module, name: str) -> bool:
    """Whether ``name`` is defined as anything but a stub."""
    definitions = [node for node in tree.body if _defines(node, name)]
    return any(not isinstance(node, _FUNCTION) or not all(map(_is_stub, node.body)) for node in definitions)


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, _FUNCTION | ast.ClassDef):
        return node.name == name
    return any(isinstance(target, ast.Name) and target.id == name for target in _targets(node))


def _targets(node: ast.stmt) -> list[ast.expr]:
    """The targets of an assignment."""
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


def _is_stub(node: ast.stmt) -> bool:
    """Whether a statement is ``pass``, a docstring, ``...``, or ``raise NotImplementedError``."""
    if isinstance(node, ast.Raise):
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(error, ast.Name) and error.id == "NotImplementedError"
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _returns(tree: ast.Module, name: str) -> bool:
    """Whether the function returns, yields or raises; a line of prose may be valid Python, but does none of these."""
    definitions = [node for node in tree.body if _defines(node, name)]
    results = ast.Return | ast.Yield | ast.YieldFrom | ast.Raise
    stack: list[ast.AST] = list(ast.iter_child_nodes(definitions[-1])) if definitions else []
    while stack:
        node = stack.pop()
        if isinstance(node, results):
            return True
        if not isinstance(node, _FUNCTION | ast.Lambda | ast.ClassDef):  # inner functions return for themselves
            stack.extend(ast.iter_child_nodes(node))
    return False


def _source(lines: list[str], node: ast.stmt) -> str:
    return "\n".join(lines[_first_line(node) - 1 : node.end_lineno])


def _first_line(node: ast.stmt) -> int:
    """The first line of a statement, decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _dedented(lines: list[str]) -> list[str]:
    first = next((line for line in lines if line.strip()), "")
    if not first[:1].isspace():
        return lines
    return textwrap.dedent("\n".join(lines)).split("\n")


def _parse(source: str) -> ast.Module | None:
    return _quietly(ast.parse, source)


def _quietly(read: Callable[[str], T], source: str) -> T | None:
    """``read(source)``, or None if the source is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences
            return read(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
