"""Bundling: what the bundle imports, that no definition is lost or repeated, and what cannot be bundled."""

import ast
import sys
from pathlib import Path

import pytest

from cllm.serving.bundle import BundleError, bundle
from cllm.serving.export import code

OF_TRANSFORMERS = {"numpy", "safetensors", "torch", "transformers"}
OPTIONAL = {"xxhash"}  # see cllm.decoding.linear


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes the modules of a package, which replaces ours, and bundles ``main.run``."""

    def make(**sources: str) -> str:
        name = f"made_{tmp_path.name}".replace("-", "_")
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        for module, source in sources.items():
            (tmp_path / name / f"{module}.py").write_text(source.replace("HERE", name))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("cllm.serving.bundle.PACKAGE", name)
        return bundle(f"{name}.main", "run")

    return make


def run(source: str) -> object:
    names: dict = {"__name__": "bundled"}
    exec(compile(source, "bundled", "exec"), names)
    return names["run"]()


def test_bundle_imports_only_dependencies_of_transformers() -> None:
    nodes = [node for node in ast.walk(ast.parse(code())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom))
    named = [[a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or ""] for n in nodes]
    assert {name.split(".")[0] for names in named for name in names} <= {*sys.stdlib_module_names, *OF_TRANSFORMERS, *OPTIONAL}
    assert {"torch", "transformers"} <= {name.split(".")[0] for names in named for name in names}


def test_bundle_is_the_source_verbatim() -> None:
    """The engine's own lines, deterministic, and without anything for training or text."""
    text = code()
    assert text == code()
    assert all(f"# {'-' * 20} cllm.{part}\n" in text for part in ("decoding.engine", "decoding.cache", "attention"))
    engine = (Path(__file__).parents[2] / "cllm" / "decoding" / "engine.py").read_text()
    assert engine[engine.index("class JacobiDecoder") :].rstrip() in text
    assert "def load_model" not in text and "class Queue" not in text
    assert "def attach_exported" in text and "def _merged" not in text


def test_modules_follow_their_imports(package) -> None:
    text = package(
        main="from HERE.low import LIMIT\nfrom HERE.middle import Middle\n\ndef run():\n    return Middle.value + LIMIT",
        middle="from HERE.low import Base\n\nclass Middle(Base):\n    pass",
        low='"""Low."""\nimport math\n\n# kept\nLIMIT = 1\nUNUSED = 2\n\nclass Base:\n    value = math.floor(2.5)',
    )
    assert run(text) == 3
    assert "# Low." in text and "# kept\nLIMIT = 1" in text and "UNUSED" not in text and "HERE" not in text


def test_imports_inside_functions(package) -> None:
    text = package(
        main="def run():\n    from HERE.low import answer\n    import math\n\n    return answer() + math.floor(0.5)",
        low="from dataclasses import field as f\n\ndef answer():\n    return 42 if f else 0",
    )
    assert run(text) == 42 and "from dataclasses import (field as f)" in text


@pytest.mark.parametrize(
    ("main", "low", "message"),
    [
        ("from HERE.low import one\ntwo = 1\n\ndef run():\n    return one, two", "two = 2\none = two", "both define two"),
        ("from HERE.low import one as two\n\ndef run():\n    return two", "one = 1", "renames what it takes"),
        ("import HERE.low as low\n\ndef run():\n    return low", "", "as a whole"),
        ("from HERE.low import one\n\ndef run():\n    return one", "from math import pi as one", "does not define one"),
        ("from HERE.low import sum\n\ndef run():\n    return sum", "def sum():\n    pass", "defines sum"),
        (
            "from HERE.low import f\nfrom math import pi\n\ndef run():\n    return f, pi",
            "from cmath import tau as pi\nf = pi",
            "both",
        ),
        ("run = 1\nfor x in []:\n    pass", "", "defines no name"),
    ],
)
def test_source_that_cannot_be_bundled(package, main: str, low: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        package(main=main, low=low)
