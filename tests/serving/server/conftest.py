"""A server in a thread of the test process, on a free port of the loopback interface."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tiny import tiny_model, tiny_tokenizer

from cllm.decoding import JacobiDecoder, Queue
from cllm.prompts import PromptTemplate
from cllm.serving.server.app import create_app
from cllm.serving.server.run import Server, address, bind
from cllm.serving.server.service import Limits, Service


@dataclass
class Running:
    """A server that answers as ``tiny``."""

    service: Service
    server: Server
    url: str

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, whatever their labels."""
        families = text_string_to_metric_families(self.service.metrics.text().decode())
        return sum(s.value for family in families for s in family.samples if s.name == name)


@contextmanager
def run_server(
    limits: Limits, *, context: int = 256, batch_size: int = 4, api_key: str | None = None, eos: Sequence[int] = ()
) -> Iterator[Running]:
    """Without ``eos`` all answers are as long as they may be."""
    decoder = JacobiDecoder(tiny_model(max_position_embeddings=context), 4, eos_token_ids=eos)
    service = Service("tiny", Queue(decoder, batch_size), tiny_tokenizer(), PromptTemplate("chat"), limits)
    server = Server(create_app(service, api_key), service.worker, grace=5)
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Running(service, server, address(listener))
        server.should_exit = True
        thread.join()


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
