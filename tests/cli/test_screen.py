"""Streaming an answer onto the screen."""

import io

import pytest

from cllm.cli.screen import MarkdownScreen, PlainScreen, make_screen, split_blocks
from cllm.errors import UsageError

TEXT = "# Title\n\nSome *words* and more.\n\n```python\ndef f():\n\n    return 1\n```\n\n1. one\n2. two"


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("", ""),
        ("a\nb", ""),
        ("a\n\nb", "a\n\n"),
        ("a\n\nb\n\n", "a\n\nb\n\n"),
        ("a\n ", ""),  # the line may go on
        ("```\na\n\nb", ""),
        ("```\na\n\n```\n\nb", "```\na\n\n```\n\n"),
        ("~~~\n```\n\n", ""),  # a fence is closed by one of its own kind
    ],
    ids=repr,
)
def test_blocks_are_cut_at_blank_lines_outside_of_code(text: str, done: str) -> None:
    assert split_blocks(text) == (done, text[len(done) :])


def drawn(pieces: list[str], error: type[BaseException] | None = None) -> str:
    """What stands on a terminal at the end, styles left out."""
    console = pytest.importorskip("rich.console").Console(
        file=io.StringIO(), force_terminal=True, width=60, height=10, color_system=None, legacy_windows=False
    )
    try:
        with MarkdownScreen(console) as screen:
            for piece in pieces:
                screen.show(piece)
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    return console.file.getvalue()


def test_markdown_is_rendered() -> None:
    output = drawn([TEXT])
    assert "Title" in output and "# Title" not in output and "*words*" not in output and "return 1" in output


def test_a_stopped_answer_stays() -> None:
    assert "Some words and" in drawn(["Some *words* ", "and"], KeyboardInterrupt)


def test_a_second_answer_leaves_the_first_alone() -> None:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), force_terminal=True, width=60, height=10)
    screen = MarkdownScreen(console)
    with screen:
        screen.show("one  \ntwo  \nthree")
    first = console.file.getvalue()
    with screen:
        screen.show("four")
    assert "\x1b[1A" not in console.file.getvalue()[len(first) :].partition("four")[0]  # the cursor does not go up


def test_only_the_end_of_a_long_block_is_drawn_while_it_grows() -> None:
    output = drawn([f"line{n}  \n" for n in range(40)])
    assert all(f"line{n} " in output for n in range(40))


def test_plain_text(capsys) -> None:
    with PlainScreen() as screen:
        screen.show("a *b")
        screen.show("*")
    assert capsys.readouterr().out == "a *b*\n"
    with pytest.raises(UsageError), PlainScreen():
        raise UsageError("full")
    assert capsys.readouterr().out == ""


def test_a_pipe_gets_plain_text(monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_screen(), PlainScreen)
