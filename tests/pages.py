"""The documentation pages, README included, and their fenced blocks.

    from pages import PAGES, blocks, runs

A ``bash`` block that begins with ``# not run by the tests: `` and a reason is not run. A block with a title quotes the file
of that name.
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "# not run by the tests: "


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    fences = re.findall(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*parts) for parts in fences]


def runs(block: Block) -> bool:
    return block.language in ("bash", "python") and not block.text.startswith(NOT_RUN) and not is_quote(block)


def is_quote(block: Block) -> bool:
    return bool(block.title)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
