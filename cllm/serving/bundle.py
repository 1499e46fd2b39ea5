"""Bundling: a function of this package and all its dependencies in one file that imports nothing from the package.

The source is copied unchanged, statement by statement: definitions that nothing needs are dropped, imports within the package
are removed, and all other imports move to the top.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "cllm"
HEAD = "# Made by `cllm export` from the source of the CLLM toolkit (Apache-2.0); change it there, not here."


class BundleError(Exception):
    """Source that cannot be bundled unchanged: a bug in the package, never an error of its user."""


@dataclass(frozen=True)
class Import:
    """What an imported name refers to: ``name`` of ``module``, or the module itself if ``name`` is None."""

    module: str
    name: str | None

    @property
    def inner(self) -> bool:
        """Whether it comes from this package."""
        return self.module.split(".")[0] == PACKAGE

    def renamed(self, bound: str) -> str:
        """The item of an import statement that binds it to the name ``bound``."""
        name = self.name or self.module
        return name if bound in (name, name.split(".")[0]) else f"{name} as {bound}"


class Module:
    """The top level of a module: its statements, the names they define, and the names they import."""

    def __init__(self, name: str) -> None:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise BundleError(f"no source of {name}")
        source = Path(spec.origin).read_text(encoding="utf-8")
        self.name, self.lines, self.tree = name, source.splitlines(), ast.parse(source)
        self.defined: dict[str, ast.stmt] = {}
        self.imported: dict[str, Import] = {}
        for statement in self.tree.body:
            for name in _defines(statement):
                self.defined[name] = statement
            for node in [statement] if isinstance(statement, (ast.Import, ast.ImportFrom)) else _inner_imports(statement):
                self.imported.update(_bindings(node))

    def needs(self, statement: ast.stmt) -> dict[str, Import | None]:
        """The module's names that a statement uses, and where they are imported from; None if defined in the module."""
        used = dict.fromkeys(node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
        return {name: self.imported.get(name) for name in used if name in self.defined or name in self.imported}

    def text(self, statement: ast.stmt) -> str:
        """The source of a statement, with its decorators and the comments above it, without imports from the package."""
        decorators = getattr(statement, "decorator_list", [])
        first = min(node.lineno for node in [statement, *decorators])
        while first > 1 and self.lines[first - 2].startswith("#"):
            first -= 1
        dropped = {line for node in _inner_imports(statement) for line in range(node.lineno, _end(node) + 1)}
        return "\n".join(self.lines[line - 1] for line in range(first, _end(statement) + 1) if line not in dropped)


def bundle(module: str, name: str) -> str:
    """The source of one module that defines ``name`` of ``module`` and its dependencies, direct and indirect.

    The same source always gives the same text. Raises BundleError if two modules use one name for different things, or rename
    what they import from each other.
    """
    modules: dict[str, Module] = {}
    wanted: dict[str, set[str]] = {}  # module -> names
    outside: dict[str, Import] = {}

    def add(module: str, name: str) -> None:
        if module not in modules:
            modules[module], wanted[module] = Module(module), set()
        if name in wanted[module]:
            return
        if name not in modules[module].defined:
            raise BundleError(f"{module} does not define {name} itself")
        wanted[module].add(name)
        for used, source in modules[module].needs(modules[module].defined[name]).items():
            if source is None:
                add(module, used)
            elif source.inner and source.name != used:
                raise BundleError(f"{module} imports {source.module} as a whole, or renames what it takes from it: {used}")
            elif source.inner:
                add(source.module, used)
            elif outside.setdefault(used, source) != source:
                raise BundleError(f"{used} is both {outside[used]} and {source}")

    add(module, name)
    _check_names(wanted, outside)
    sections = [_section(modules[each], wanted[each]) for each in _topological(modules, module)]
    return "\n".join([HEAD, "", "from __future__ import annotations", "", *_import_lines(outside), *sections]) + "\n"


def _import_lines(outside: dict[str, Import]) -> list[str]:
    """``import x`` first, then one ``from x import ...`` for each module."""
    parts: dict[str | None, list[str]] = {}
    for bound, source in sorted(outside.items()):
        parts.setdefault(source.module if source.name else None, []).append(source.renamed(bound))
    whole = [f"import {name}" for name in parts.pop(None, [])]
    return whole + [f"from {module} import ({', '.join(parts[module])})" for module in sorted(filter(None, parts))]


def _topological(modules: dict[str, Module], last: str) -> list[str]:
    """The names of the modules, each after those that it imports from."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        for source in modules[name].imported.values():
            if source.module in modules and source.module not in done and source.module != name:
                visit(source.module)
        done[name] = None

    visit(last)
    return list(done)


def _section(module: Module, names: set[str]) -> str:
    """The definitions of ``names`` in a module, under the module's docstring."""
    head = [f"# {'-' * 20} {module.name}", *(ast.get_docstring(module.tree) or "").splitlines()]
    text = "\n".join([head[0], *(f"# {line}".rstrip() for line in head[1:])])
    before = None
    for statement in module.tree.body:
        if names & set(_defines(statement)):
            constants = isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(before, (ast.Assign, ast.AnnAssign))
            text += ("\n" if constants else "\n\n" if before is None else "\n\n\n") + module.text(statement)
            before = statement
    return "\n\n" + text


def _check_names(wanted: dict[str, set[str]], outside: dict[str, Import]) -> None:
    """Raise BundleError if a name would refer to two things."""
    owners: dict[str, str] = {}
    for module, names in wanted.items():
        for name in sorted(names):
            if name in outside or hasattr(builtins, name):
                raise BundleError(f"{module} defines {name}, which elsewhere is {outside.get(name, 'built in')}")
            if owners.setdefault(name, module) != module:
                raise BundleError(f"{owners[name]} and {module} both define {name}; in one file they need two names")


def _defines(statement: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement defines, other than by importing."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign() | ast.AnnAssign():
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case _:
            raise BundleError(f"line {statement.lineno}: {ast.unparse(statement)[:60]!r} defines no name")


def _inner_imports(statement: ast.stmt) -> list[ast.stmt]:
    """Imports from the package anywhere inside a definition."""
    if isinstance(statement, ast.If):  # if TYPE_CHECKING
        return []
    nodes = [node for node in ast.walk(statement) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [node for node in nodes if any(source.inner for source in _bindings(node).values())]


def _bindings(node: ast.stmt) -> dict[str, Import]:
    """The names that an import binds."""
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name: Import(node.module or "", alias.name) for alias in node.names}
    assert isinstance(node, ast.Import)
    return {alias.asname or alias.name.split(".")[0]: Import(alias.name, None) for alias in node.names}


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno
