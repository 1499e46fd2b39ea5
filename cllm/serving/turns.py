"""Typed input, split into turns of one line or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator

FIRST, MORE = "> ", ". "  # the prompts for a turn's first line and for further lines
QUOTES = '"""'
MULTILINE_HELP = f"End a line with \\ to continue it on the next; {QUOTES} begins and ends a text of several lines."


def turns(read: Callable[[str], str]) -> Iterator[str]:
    """The turns of a conversation, until ``read(prompt)``, which returns a line without its newline, raises EOFError.

    The end of the input also ends an unfinished turn.
    """
    while True:
        try:
            line = read(FIRST)
        except EOFError:
            return
        yield _quoted(line.lstrip(), read) if line.lstrip().startswith(QUOTES) else _continued(line, read)


def _continued(text: str, read: Callable[[str], str]) -> str:
    while text.endswith("\\"):
        text = text[:-1]
        try:
            text += "\n" + read(MORE)
        except EOFError:
            break
    return text


def _quoted(text: str, read: Callable[[str], str]) -> str:
    text = text.removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        try:
            text += "\n" + read(MORE)
        except EOFError:
            break
    return text.rstrip().removesuffix(QUOTES).strip("\n")
