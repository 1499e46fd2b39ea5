"""The picture of the packed layout's mask, drawn from the function that collection and training use.

python scripts/mask_picture.py docs/images/mask.svg
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from cllm.packing import CLEAN, Block, Layout, PackedRow, pack, visibility

PROMPT, RESPONSE, SIZE = 3, 6, 3  # tokens of the prompt, of the response and of a block
CELL, LEFT, TOP, RIGHT = 26, 106, 66, 8  # pixels
COLOURS = {"clean": "#2a9d8f", "prefix": "#8ecae6", "block": "#f4a261", "hidden": "#eceff1"}
LEGEND = {
    "clean": "clean text sees clean text up to itself",
    "prefix": "a block sees the clean text before it",
    "block": "a block sees itself, up to each token",
}
STYLE = """
  text { font: 12px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #1b1f24 }
  .page { fill: #ffffff }
  @media (prefers-color-scheme: dark) { text { fill: #e8eaed } .page { fill: #0d1117 } .hidden { fill: #263238 } }
"""


def main(path: Path) -> None:
    path.write_text(picture(), encoding="utf-8")


def picture() -> str:
    """An SVG of the mask for one prompt, its response and the response's blocks."""
    starts = range(PROMPT, PROMPT + RESPONSE, SIZE)
    row = PackedRow([0] * (PROMPT + RESPONSE), [Block(start, [0] * SIZE) for start in starts])
    _, layout = pack([row], pad_token_id=0)
    names = [f"x{n}" for n in range(1, PROMPT + 1)] + [f"y{n}" for n in range(1, RESPONSE + 1)]
    names += [f"g{start - PROMPT + n}" for start in starts for n in range(1, SIZE + 1)]
    groups = [("prompt", PROMPT), ("response", RESPONSE), *((f"block {n}", SIZE) for n, _ in enumerate(starts))]
    width, height = LEFT + len(names) * CELL + RIGHT, TOP + len(names) * CELL + 26 * len(LEGEND) + 10
    body = [f'<rect class="page" width="{width}" height="{height}"/>', *_cells(layout), *_names(names), *_groups(groups)]
    for line, (kind, text) in enumerate(LEGEND.items()):
        y = TOP + len(names) * CELL + 26 * line + 12
        body.append(f'<rect x="{LEFT}" y="{y}" width="16" height="16" fill="{COLOURS[kind]}"/>')
        body.append(f'<text x="{LEFT + 24}" y="{y + 13}">{text}</text>')
    label = "Which tokens of a packed row see which others"
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}"><style>{STYLE}</style>'
    return "\n".join([head, *body, "</svg>\n"])


def _cells(layout: Layout) -> Iterator[str]:
    """A square for each query (row) and key (column)."""
    blocks, seen = layout.block_BT[0], visibility(layout, layout)[0]
    for query, key in torch.cartesian_prod(*(torch.arange(len(blocks)),) * 2).tolist():
        kind = "hidden"
        if seen[query, key]:
            kind = "clean" if blocks[query] == CLEAN else "prefix" if blocks[key] == CLEAN else "block"
        box = f'x="{LEFT + key * CELL}" y="{TOP + query * CELL}" width="{CELL - 2}" height="{CELL - 2}"'
        yield f'<rect class="{kind}" {box} rx="3" fill="{COLOURS[kind]}"/>'


def _names(names: list[str]) -> Iterator[str]:
    """The name of each token beside its row and above its column."""
    for at, name in enumerate(names):
        yield f'<text x="{LEFT + at * CELL + 12}" y="{TOP - 8}" text-anchor="middle">{name}</text>'
        yield f'<text x="{LEFT - 8}" y="{TOP + at * CELL + 17}" text-anchor="end">{name}</text>'


def _groups(groups: list[tuple[str, int]]) -> Iterator[str]:
    """The name of each part of the packed row above its columns and beside its rows."""
    at = 0
    for name, count in groups:
        middle = (at + count / 2) * CELL
        yield f'<text x="{LEFT + middle:.0f}" y="{TOP - 34}" text-anchor="middle">{name}</text>'
        yield f'<text x="4" y="{TOP + middle + 4:.0f}">{name}</text>'
        at += count


if __name__ == "__main__":
    main(Path(sys.argv[1]))
