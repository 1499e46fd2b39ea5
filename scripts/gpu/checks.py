"""Stage `tests`: the tests marked gpu, as many as the time allows; the file says which passed, failed and were not run."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import stage


class Outcomes:
    """A plugin that keeps the outcome of every test, and stops when the time is over."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds
        self.wanted: list[str] = []
        self.outcome: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.session = session
        self.wanted = [item.nodeid for item in session.items]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcome[report.nodeid] = report.outcome
            self.seconds[report.nodeid] = round(report.duration, 2)
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext[-2000:]

    def pytest_runtest_logfinish(self) -> None:
        if time.monotonic() > self.until:
            self.session.shouldstop = "the time is over"


def main() -> None:
    options = stage.options(__doc__)
    options.add_argument("--seconds", type=float, required=True)
    args = options.parse_args()
    stage.device(args)
    os.chdir(Path(__file__).resolve().parents[2])
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    files.reverse()  # compiled steps, which take longest, are at the end of tests/decoding
    outcomes = Outcomes(args.seconds)
    status = pytest.main(["-q", "-m", "gpu", "--durations=10", *files], plugins=[outcomes])
    result = {
        **Counter(outcomes.outcome.values()),
        "not run": [name for name in outcomes.wanted if name not in outcomes.outcome],
        "failures": outcomes.failed,
        "seconds": outcomes.seconds,
    }
    stage.publish(args, "tests marked gpu", result)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
