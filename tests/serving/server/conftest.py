"""Servers for the tests of this folder."""

import logging
from collections.abc import Callable, Iterator

import pytest
from servers import Running, run_server

from cllm.serving.server.service import Limits


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """Shared by all tests that leave it as it was."""
    with run_server(Limits(body_bytes=20_000, new_tokens=200, waiting=100)) as running:
        yield running


@pytest.fixture
def start() -> Callable[..., object]:
    """Servers with other limits: ``with start(Limits(...)) as running``."""
    return run_server


@pytest.fixture(autouse=True)
def no_errors_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever clients do, the log shows no error and no stack trace."""
    yield
    bad = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR or record.exc_info]
    assert not bad, [record.getMessage() for record in bad]
