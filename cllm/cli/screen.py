"""Shows an answer while it is being written: as plain text, or as Markdown on a terminal that can render it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from cllm.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FENCES = ("```", "~~~")


class Screen(AbstractContextManager, Protocol):
    """A context manager for one answer, which stays visible however the ``with`` statement ends."""

    def show(self, piece: str) -> None: ...


def make_screen() -> Screen:
    """Markdown where ``rich`` is installed and the output is a terminal that is not dumb; else plain text."""
    try:
        from rich.console import Console
    except ImportError:
        return PlainScreen()
    console = Console()
    return MarkdownScreen(console) if sys.stdout.isatty() and not console.is_dumb_terminal else PlainScreen()


class PlainScreen(Screen):
    """The text as it comes; an answer that could not start leaves no empty line."""

    def show(self, piece: str) -> None:
        print(piece, end="", flush=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not UsageError:
            print()


class MarkdownScreen(Screen):
    """Prints finished blocks once; redraws the last lines of the unfinished one as it grows."""

    def __init__(self, console: Console) -> None:
        self.console, self.rest = console, ""

    def __enter__(self) -> MarkdownScreen:
        from rich.live import Live

        self.rest = ""
        self.live = Live(get_renderable=self._tail, console=self.console, refresh_per_second=8, transient=True)
        self.live.start()
        return self

    def show(self, piece: str) -> None:
        done, self.rest = split_blocks(self.rest + piece)
        if done:
            self._print(done)
            self.console.print()

    def __exit__(self, *error: object) -> None:
        last, self.rest = self.rest, ""
        self.live.stop()
        self._print(last)

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        self.console.print(Markdown(text))

    def _tail(self) -> Any:
        return _Tail(self.rest)


class _Tail:
    """The last lines of a Markdown text, as many as fit on the screen."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markdown import Markdown
        from rich.segment import Segment

        lines = console.render_lines(Markdown(self.text), options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def split_blocks(text: str) -> tuple[str, str]:
    """Cut Markdown after its last blank line outside fenced code: what is finished, and what may still grow."""
    fence, at, cut = "", 0, 0
    for line in text.splitlines(keepends=True):
        at += len(line)
        mark = line.strip()[:3]
        if mark in FENCES and fence in ("", mark):
            fence = "" if fence else mark
        if not line.strip() and line.endswith("\n") and not fence:
            cut = at
    return text[:cut], text[cut:]
