"""Tables and numbers for people."""

from __future__ import annotations

from collections.abc import Sequence

from cllm.evaluation.interval import Interval

MISSING = "-"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns with two spaces between them; the first is set left, the others right. A header may have several lines.

    Raises ValueError for a row that is not as long as the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header {len(header)}")
    heads = [title.split("\n") for title in header]
    height = max(map(len, heads))
    lines = [[""] * (height - len(head)) + head for head in heads]
    head_rows = [[column[level] for column in lines] for level in range(height)]
    widths = [max(map(len, column)) for column in zip(*head_rows, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join([first, *others]).rstrip()

    return "\n".join([*map(line, head_rows), "  ".join("-" * width for width in widths), *map(line, rows)])


def number(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{100 * value:.{digits}f}%"


def with_interval(value: float | None, interval: Interval | None, digits: int = 2) -> str:
    """``1.39 [1.31, 1.47]``"""
    if interval is None:
        return number(value, digits)
    return f"{number(value, digits)} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def percent_with_interval(value: float | None, interval: Interval | None, digits: int = 1) -> str:
    """``25.0% [7.1, 59.1]``"""
    if interval is None:
        return percent(value, digits)
    return f"{percent(value, digits)} [{100 * interval[0]:.{digits}f}, {100 * interval[1]:.{digits}f}]"
