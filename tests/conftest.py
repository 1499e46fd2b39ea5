"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest
from tiny import tiny_model_dir  # noqa: F401  (a fixture)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: $CLLM_SHARED_DATA, or ../shared/data beside the repository. Skips without it."""
    folder = Path(os.environ.get("CLLM_SHARED_DATA") or Path(__file__).parents[1].parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}")
    return folder
