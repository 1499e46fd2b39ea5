"""The summary of skipped tests at the end of a test run."""

from types import SimpleNamespace

from conftest import pytest_terminal_summary


def summary(*skipped: tuple[str, str]) -> list[str]:
    """The lines written for skipped tests, given as (name, reason)."""
    reports = [SimpleNamespace(nodeid=name, longrepr=("file.py", 1, f"Skipped: {reason}")) for name, reason in skipped]
    lines: list[str] = []
    pytest_terminal_summary(SimpleNamespace(getreports=lambda _: reports, section=lines.append, write_line=lines.append))
    return lines


def test_skipped_tests_are_grouped_by_reason() -> None:
    assert summary(("b::y", "no GPU"), ("a::x", "no Chromium"), ("b::x", "no GPU")) == [
        "3 skipped",
        "   1  no Chromium",
        "      a::x",
        "   2  no GPU",
        "      b::x",
        "      b::y",
    ]
    assert summary() == []
