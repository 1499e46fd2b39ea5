"""Rules of the source: imports run one way, tasks know no tensors, only commands print."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cllm"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
LAYERS = (  # from the bottom; a module may import its own layer and those below
    {"errors"},
    {"files", "checkpoints", "modes", "processor"},
    {"result_file"},
    {"tasks", "scoring"},
    {"adapter"},
    {"attention", "chat_template", "prompts", "models"},
    {"packing", "decoding", "reference", "custom_generate", "options", "open_model"},
    {"trajectory", "training", "evaluation", "serving", "engines"},
    {"making"},
    {"cli"},
    {"inference", "__main__"},  # other ways to call cli
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "transformers", "accelerate", "safetensors"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports anywhere, except those imported only for type checking."""
    yield from _imports(tree(path), path)


def _imports(node: ast.AST, path: Path) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{path}: relative import"
            module = child.module or ""
            yield from (f"{module}.{alias.name}" if module == "cllm" else module for alias in child.names)
        else:
            yield from _imports(child, path)


def part(path: Path) -> str:
    """The package or module directly below ``cllm`` that a file belongs to; "" for ``cllm/__init__.py``."""
    return path.parts[0] if len(path.parts) > 1 else path.stem.removeprefix("__init__")


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("cllm.")}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path: Path) -> None:
    own = part(path)
    if not own:
        assert not parts_imported(path)
        return
    assert own in LEVEL, f"put {own} into a layer of this test"
    upwards = {name for name in parts_imported(path) if LEVEL[name] > LEVEL[own]}
    assert not upwards, f"{path} imports {upwards} from above it"


def test_imports_have_no_cycle() -> None:
    names = {".".join(("cllm", *path.with_suffix("").parts)).removesuffix(".__init__"): path for path in FILES}
    left = {name: set(imports(path)) & names.keys() - {name} for name, path in names.items()}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"these import each other: {sorted(left)}"


def test_tasks_and_scoring_know_no_tensors() -> None:
    files = [path for path in FILES if part(path) in ("tasks", "scoring")]
    assert len(files) > 5
    allowed = {"tasks", "scoring", "files", "errors", "checkpoints"}
    for path in files:
        assert not HEAVY & {name.split(".")[0] for name in imports(path)}, path
        assert parts_imported(path) <= allowed, path


def test_the_engine_knows_tokens_not_text() -> None:
    for path in FILES:
        if part(path) in ("decoding", "packing"):
            assert not parts_imported(path) & {"prompts", "tasks"}, path
            assert not any("Tokenizer" in node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)), path


def test_only_commands_print() -> None:
    for path in FILES:
        calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        printing = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert part(path) == "cli" or not printing, f"{path} prints in lines {printing}"


def test_the_checks_can_fail() -> None:
    source = "import torch\nif TYPE_CHECKING:\n    import transformers\ndef f():\n    from cllm import cli"
    assert set(_imports(ast.parse(source), Path("x.py"))) == {"torch", "cllm.cli"}
