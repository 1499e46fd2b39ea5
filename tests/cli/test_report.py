"""The report command: one page with its pictures inside."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import refused

from cllm.cli import report
from cllm.evaluation import plot

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_repositorys_own_results(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "new" / "page.html"
    report.main([str(RESULTS), "--output", str(output)])
    html = output.read_text()
    page = Page(html)
    assert not page.open and "quickstart/cllm" in page.text
    assert not re.search(r"https?:|<script|<link|url\(|@import", html)  # nothing from outside
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    pictures = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    files = [output.with_name(f"page-{name}.png") for name in plot.FIGURES]
    assert pictures == [file.read_bytes() for file in files] and all(data.startswith(PNG) for data in pictures)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "Written: " + ", ".join(map(str, [output, *files]))


def test_only_what_there_is_and_everything_escaped(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "b.json").write_text(json.dumps({"benchmark": "<b>&", "result": {"a<i>": 0.123456}}))
    for n in range(12):
        (folder / f"<u>{n}.txt").write_text("")
    report.main([str(folder), "--output", str(folder / "page.html")])
    page = Page((folder / "page.html").read_text())
    assert {"b", "i", "u", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert "Benchmark: <b>&" in page.text and "0.1235" in page.text and "<u>11.txt" in page.text
    out = capsys.readouterr().out
    assert "12 other files skipped:" in out and "  ... and 2 more" in out
    assert sorted(path.suffix for path in folder.iterdir()) == [".html", ".json", *[".txt"] * 12]


def test_nothing_to_report(tmp_path: Path, capsys) -> None:
    assert refused(capsys, report.main, tmp_path).startswith(f"no result files in {tmp_path}")
    assert not list(tmp_path.iterdir())
