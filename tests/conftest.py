"""Fixtures shared by all tests."""

import os
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_model_dir  # noqa: F401  (a fixture)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no worker starts one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the skipped tests by reason, with counts and names."""
    skipped = defaultdict(list)
    for report in terminalreporter.getreports("skipped"):
        skipped[report.longrepr[2].removeprefix("Skipped: ")].append(report.nodeid)
    if skipped:
        terminalreporter.section(f"{sum(map(len, skipped.values()))} skipped")
    for reason, names in sorted(skipped.items()):
        terminalreporter.write_line(f"{len(names):4d}  {reason}")
        for name in sorted(names):
            terminalreporter.write_line(f"      {name}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: $CLLM_SHARED_DATA, or ../shared/data beside the repository. Skips without it."""
    folder = Path(os.environ.get("CLLM_SHARED_DATA") or Path(__file__).parents[1].parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_cases(shared_data: Path) -> Path:
    """The folder of small hard inputs beside ``shared_data``. Skips without it."""
    folder = shared_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"no shared cases in {folder}")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch with one thread, which is faster than several for tiny models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of the size given by ``@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)``."""
    point = tmp_path / "small"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(point)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)  # lazily, since a failed test may hold a file open
