"""MkDocs hooks of the documentation site: output of commands, equations, docstrings without roles.

In a page, ``<!-- output: cllm tasks gsm8k -->`` is replaced by that command's output, and ``<!-- commands -->`` by the help
texts of all commands. Blocks fenced as ``math`` become MathML, which browsers render without scripts.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

from griffe import Extension, Object

from cllm.cli.main import COMMANDS, main

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")
WIDTH = "88"  # characters of a help text


def on_config(config: Any) -> Any:
    """Called by MkDocs: register fenced ``math`` blocks."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _equation})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page: insert the output of commands."""
    markdown = re.sub(r"<!-- output: cllm (.+?) -->", lambda match: _block(match[1].split()), markdown)
    return markdown.replace("<!-- commands -->", "".join(map(_section, COMMANDS)))


class PlainRoles(Extension):
    """Called by mkdocstrings: turns roles such as ``:func:`name``` in docstrings into plain code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value).replace("``", "`")


def _equation(source: str, *_: Any, **__: Any) -> str:
    from latex2mathml.converter import convert

    return f'<div class="math" style="overflow-x: auto">{convert(source, display="block")}</div>'


def _section(name: str) -> str:
    return f"\n## cllm {name}\n\n{_block([name, '--help'])}\n"


def _block(words: list[str]) -> str:
    """A command's output as a fenced block of text."""
    output = io.StringIO()
    with patch.dict(os.environ, COLUMNS=WIDTH), redirect_stdout(output):
        try:
            main(words)
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"cllm {' '.join(words)} ended with exit status {end.code}") from end
    return f"```text\n{output.getvalue().rstrip()}\n```"
