"""What a person types, cut into turns: a line each, or several lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

FIRST, MORE = "> ", ". "  # what asks for a turn's first line, and for its further ones
QUOTES = '"""'
HOW = f"A line that ends in \\ goes on in the next; {QUOTES} starts a text of several lines that ends with {QUOTES}."


def turns(read: Callable[[str], str]) -> Iterator[str]:
    """The turns of a conversation, until ``read(prompt)``, which gives a line without its end, raises EOFError.

    The end of the input also ends a turn of several lines that has not been closed.
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
