"""The documentation site builds without warnings, and its pages load nothing external."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

from cllm.cli.main import COMMANDS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package, reason="the site needs the extra docs: pip install -e .[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_references_are_generated_from_the_code(site: Path) -> None:
    commands = (site / "reference" / "cli.html").read_text()
    assert all(f"usage: cllm {name}" in commands for name in COMMANDS)
    python = (site / "reference" / "python.html").read_text()
    assert 'id="cllm.decoding.engine.JacobiDecoder.generate"' in python and ":func:" not in python


@pytest.mark.slow
def test_equations_need_no_script(site: Path) -> None:
    for page in (ROOT / "docs" / "concepts").glob("*.md"):
        shown = (site / "concepts" / page.with_suffix(".html").name).read_text()
        assert shown.count("<math ") == page.read_text().count("```math")


@pytest.mark.slow
def test_nothing_external_is_loaded(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"?(https?:[^\"\s>]+)", page.read_text())
        assert not loaded, page
