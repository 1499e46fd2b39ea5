"""The quick start's report: the committed results give the table of the quick start's page."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import sql_questions

from cllm.making.sources import Source, gather

ROOT = Path(__file__).parents[1]
REPORT = runpy.run_path(str(ROOT / "scripts" / "quickstart_report.py"))
RESULTS = ROOT / "docs" / "results" / "quickstart"
SECONDS = json.loads((RESULTS / "make.json").read_text())["seconds"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the quick start leaves, without its models."""
    sql_questions.main([str(tmp_path / "data"), "576", "32"])
    work = tmp_path / "cllm" / "make"
    work.mkdir(parents=True)
    shutil.copy(RESULTS / "make.json", tmp_path / "cllm")
    shutil.copy(RESULTS / "speedup.json", work)
    asked = gather([Source.parse(f"spider:{tmp_path / 'data'}")], "test").examples.values()
    (work / "held_out.jsonl").write_text("".join(json.dumps({"messages": example.messages}) + "\n" for example in asked))
    (tmp_path / "seconds.txt").write_text("model: 31\ntarget: 594\n")
    return tmp_path


def test_the_report_of_the_committed_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    REPORT["main"](folder)
    printed = capsys.readouterr().out.replace("1.00 [1.00, 1.00]", "1.00").replace("100.0%", "100%")
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in page_table()]
    assert len(rows) == 5 and set(rows) <= {tuple(re.split(r"\s{2,}", line.strip())) for line in printed.splitlines()}
    assert "seconds per stage: model 31, target 594" in printed and f"adapter {SECONDS['adapter']}" in printed
    assert (folder / "accepted.png").read_bytes().startswith(b"\x89PNG")


def page_table() -> list[str]:
    lines = (ROOT / "docs" / "quickstart.md").read_text().split("## Results")[1].splitlines()
    return [line for line in lines if line.startswith("|")][2:]


def test_answers_are_matched_with_their_questions(folder: Path) -> None:
    """The measured prompts are in another order than the data's."""
    measured = json.loads((folder / "cllm" / "make" / "speedup.json").read_text())
    score = REPORT["execution_accuracy"](folder, measured)
    assert f"| {score:.1%} |" in next(line for line in page_table() if "accuracy" in line)
    for prompt in measured["prompts"]:
        prompt["responses"]["jacobi"] = "SELECT 1 FROM nowhere"
    assert REPORT["execution_accuracy"](folder, measured) == 0


def test_the_targets_accuracy_is_unknown_where_a_text_differs() -> None:
    methods = {"ar": {}, "jacobi": {"same_as_ar": 31 / 32}}
    assert [column.score for column in REPORT["columns"]({"methods": methods}, 0.9, None)] == [None, 0.9]
