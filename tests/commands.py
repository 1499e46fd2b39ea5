"""Commands run inside the test process, and questions to run them on.

from commands import failed, question_rows, refused, succeeds, write_rows
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest


def question_rows(count: int) -> list[dict[str, str]]:
    """Short distinct questions in GSM8K's format."""
    return [{"question": f"{n} + {n * n}?", "answer": f"Add.\n#### {n + n * n}"} for n in range(1, count + 1)]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write one line per row: JSON, or texts unchanged."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def succeeds(call: Callable[[], Any]) -> None:
    """Call a command or script, which may exit, but only with status 0."""
    try:
        call()
    except SystemExit as end:
        assert not end.code, end.code


def refused(capsys: pytest.CaptureFixture[str], main: Callable[..., None], *words: Any) -> str:
    """The error of a command that must fail with exit status 2 and one line that starts with ``error: ``."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith(("WARNING", "INFO"))]
    errors = [line for line in lines if line and "examples/s]" not in line]  # a progress bar of `datasets`, hidden in a real process
    assert exit_.value.code == 2, captured.err
    assert len(errors) == 1 and errors[0].startswith("error: "), captured.err
    return errors[0].removeprefix("error: ")


def failed(capsys: pytest.CaptureFixture[str], main: Callable[..., None], *words: Any) -> str:
    """The last line of a command that a fault ends with exit status 2 after it has begun."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and "Traceback" not in error, error
    return error.splitlines()[-1]
